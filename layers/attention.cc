#include "layers/attention.h"

#include <algorithm>
#include <cmath>

#include "graph/functions.h"
#include "layers/attention_processor_builder.h"

namespace calotype::nn {

SpatialNorm::SpatialNorm(int64_t channels, int64_t spatial_channels) : Layer("SpatialNorm") {
  norm_layer_ = AddLayer<GroupNorm>("norm_layer", GroupNorm::Options{32, channels, 1e-6});
  conv_y_ = AddLayer<Conv2d>("conv_y", Conv2d::Options{spatial_channels, channels, 1});
  conv_b_ = AddLayer<Conv2d>("conv_b", Conv2d::Options{spatial_channels, channels, 1});
}

std::vector<Value> SpatialNorm::ExportComputationGraph(ComputationGraph&,
                                                       std::span<const Value> inputs) {
  Value f = Required(inputs, 0, "f"), z = Required(inputs, 1, "z");
  Check<ShapeError>(f.rank() == 4 && z.rank() == 4 && z.dim(0) == f.dim(0),
                    "{}: f {} and z {} must be pictures of one batch", Describe(), f.shape(),
                    z.shape());
  z = ResizeNearest(z, f.dim(2), f.dim(3));
  return {norm_layer_->Call(f) * conv_y_->Call(z) + conv_b_->Call(z)};
}

Attention::Attention(const Options& options) : Layer("Attention"), options_(options) {
  Options& o = options_;
  Check(o.query_dim > 0 && o.dim_head > 0 && o.heads > 0 && o.cross_attention_dim >= 0,
        "Attention: query_dim {}, heads {} and dim_head {} must be positive", o.query_dim, o.heads,
        o.dim_head);
  if (o.out_dim > 0) {
    Check(o.out_dim % o.dim_head == 0, "Attention: dim_head {} must divide out_dim {}", o.dim_head,
          o.out_dim);
    o.heads = o.out_dim / o.dim_head;
  }
  Check(o.dropout >= 0 && o.dropout < 1, "Attention: dropout {} must be in [0, 1)", o.dropout);
  Check<UnsupportedError>(o.qk_norm.empty() || o.qk_norm == "layer_norm",
                          "Attention: qk_norm '{}' is not supported; known is layer_norm",
                          o.qk_norm);
  Check(o.rescale_output_factor != 0, "Attention: rescale_output_factor must not be 0");
  Check(!o.only_cross_attention || o.added_kv_proj_dim > 0,
        "Attention: only_cross_attention needs added_kv_proj_dim, since there are no other keys");
  int64_t inner = CheckedMul(o.heads, o.dim_head, "Attention");
  int64_t cross = o.cross_attention_dim > 0 ? o.cross_attention_dim : o.query_dim;
  int64_t out = o.out_dim > 0 ? o.out_dim : o.query_dim;
  Check(!o.residual_connection || out == o.query_dim,
        "Attention: residual_connection needs out_dim {} to be query_dim {}", out, o.query_dim);

  if (o.norm_num_groups > 0) {
    group_norm_ = AddLayer<GroupNorm>("group_norm",
                                      GroupNorm::Options{o.norm_num_groups, o.query_dim, o.eps});
  }
  if (o.spatial_norm_dim > 0) {
    spatial_norm_ = AddLayer<SpatialNorm>("spatial_norm", o.query_dim, o.spatial_norm_dim);
  }
  if (o.qk_norm == "layer_norm") {
    norm_q_ = AddLayer<LayerNorm>("norm_q", LayerNorm::Options{o.dim_head, o.eps});
    norm_k_ = AddLayer<LayerNorm>("norm_k", LayerNorm::Options{o.dim_head, o.eps});
  }
  if (o.cross_attention_norm == "layer_norm") {
    norm_cross_layer_ = AddLayer<LayerNorm>("norm_cross", LayerNorm::Options{cross, 1e-5});
  } else if (o.cross_attention_norm == "group_norm") {
    // With added keys the norm serves encoder_hidden_states, which have that width.
    norm_cross_group_ = AddLayer<GroupNorm>(
        "norm_cross",
        GroupNorm::Options{o.cross_attention_norm_num_groups,
                           o.added_kv_proj_dim > 0 ? o.added_kv_proj_dim : cross, 1e-5});
  } else {
    Check<UnsupportedError>(o.cross_attention_norm.empty(),
                            "Attention: cross_attention_norm '{}' is not supported; known are "
                            "layer_norm, group_norm",
                            o.cross_attention_norm);
  }
  to_q_ = AddLayer<Linear>("to_q", Linear::Options{o.query_dim, inner, o.bias});
  if (!o.only_cross_attention) {
    to_k_ = AddLayer<Linear>("to_k", Linear::Options{cross, inner, o.bias});
    to_v_ = AddLayer<Linear>("to_v", Linear::Options{cross, inner, o.bias});
  }
  if (o.added_kv_proj_dim > 0) {
    add_k_proj_ = AddLayer<Linear>("add_k_proj", Linear::Options{o.added_kv_proj_dim, inner});
    add_v_proj_ = AddLayer<Linear>("add_v_proj", Linear::Options{o.added_kv_proj_dim, inner});
  }
  to_out_ = AddLayer<Linear>("to_out.0", Linear::Options{inner, out, o.out_bias});
  if (o.processor.empty()) {
    SetDefaultProcessor();
  } else {
    SetProcessor(o.processor);
  }
}

void Attention::SetDefaultProcessor() {
  if (options_.added_kv_proj_dim > 0) {
    if (options_.scale_qk) {
      SetProcessor(AttnAddedKVProcessor2_0{});
    } else {
      SetProcessor(AttnAddedKVProcessor{});
    }
  } else if (options_.scale_qk) {
    SetProcessor(AttnProcessor2_0{});
  } else {
    SetProcessor(AttnProcessor{});
  }
}

void Attention::CheckProcessor(const AttentionProcessor& processor) const {
  DeclareProcessor(*this, processor);
}

void Attention::SetProcessor(const AttentionProcessor& processor) {
  // Checks before anything changes.
  std::vector<ProcessorLayer> layers = DeclareProcessor(*this, processor);
  for (const auto& [name, layer] : processor_layers_) RemoveLayer(layer);
  processor_layers_.clear();
  for (const ProcessorLayer& declared : layers) {
    std::string name = "processor." + declared.name;
    if (declared.lora) {
      processor_layers_[declared.name] = AddLayer<LoRALinearLayer>(name, *declared.lora);
    } else {
      processor_layers_[declared.name] = AddLayer<Linear>(name, declared.linear);
    }
  }
  processor_ = processor;
  Changed();
}

void Attention::SetAttentionProbsHook(AttentionProbsHook hook) {
  probs_hook_ = std::move(hook);
  Changed();
}

void Attention::FuseProjections() {
  const Options& o = options_;
  Check<UnsupportedError>(o.added_kv_proj_dim == 0,
                          "{}: a module with added_kv_proj_dim cannot be fused", Describe());
  if (fused_) return;
  bool cross = o.cross_attention_dim > 0;
  int64_t in = cross ? o.cross_attention_dim : o.query_dim;
  std::vector<std::string> parts;
  if (!cross) parts.push_back("to_q");
  parts.insert(parts.end(), {"to_k", "to_v"});
  int64_t rows = static_cast<int64_t>(parts.size()) * inner_dim();
  fused_ = AddLayer<Linear>(cross ? "to_kv" : "to_qkv", Linear::Options{in, rows, o.bias});
  for (const char* kind : {"weight", "bias"}) {
    if (!o.bias && std::string_view(kind) == "bias") continue;
    float* to = fused_->FindParameter(kind)->Write().data();
    for (const std::string& part : parts) {
      const Tensor& from = FindParameter(part + "." + kind)->value();
      to = std::copy_n(from.data(), from.elements(), to);
    }
  }
  Changed();
}

void Attention::UnfuseProjections() {
  Check(!std::holds_alternative<FusedAttnProcessor2_0>(processor_),
        "{}: set another processor than {} before the fused projections are removed", Describe(),
        FusedAttnProcessor2_0::kName);
  if (fused_) RemoveLayer(fused_);
  fused_ = nullptr;
  Changed();
}

void Attention::CheckInputs(const AttentionInputs& in) const {
  const Options& o = options_;
  const Shape& x = in.hidden_states.shape();
  bool added = o.added_kv_proj_dim > 0;
  Check<ShapeError>(
      (x.rank() == 3 && x[added ? 1 : 2] == o.query_dim) || (x.rank() == 4 && x[1] == o.query_dim),
      "{}: hidden_states {} must be {} or [B, {}, H, W]", Describe(), x,
      added ? fmt::format("[B, {}, T]", o.query_dim) : fmt::format("[B, T, {}]", o.query_dim),
      o.query_dim);
  int64_t cross = o.cross_attention_dim > 0 ? o.cross_attention_dim : o.query_dim;
  int64_t width = added ? o.added_kv_proj_dim : cross;
  if (in.encoder_hidden_states.defined()) {
    const Shape& e = in.encoder_hidden_states.shape();
    Check<ShapeError>(e.rank() == 3 && (e[0] == x[0] || e[0] == 1) && e[2] == width,
                      "{}: encoder_hidden_states {} must be [{} or 1, S, {}]", Describe(), e, x[0],
                      width);
  } else {
    Check<ShapeError>(
        width == o.query_dim,
        "{}: without encoder_hidden_states the module attends to its own input, which needs "
        "{} {} = query_dim {}",
        Describe(), added ? "added_kv_proj_dim" : "cross_attention_dim", width, o.query_dim);
  }
  if (spatial_norm_) {
    Check<ShapeError>(x.rank() == 4 && in.temb.defined(),
                      "{}: spatial_norm needs a picture (hidden_states is {}) and temb", Describe(),
                      x);
  } else {
    Check<ShapeError>(!in.temb.defined(), "{}: temb is given, but there is no spatial_norm",
                      Describe());
  }
}

std::vector<Value> Attention::ExportComputationGraph(ComputationGraph&,
                                                     std::span<const Value> inputs) {
  AttentionInputs in{Required(inputs, 0, "hidden_states"), Optional(inputs, 1), Optional(inputs, 2),
                     Optional(inputs, 3), Optional(inputs, 4)};
  CheckInputs(in);
  return {AttentionProcessorBuilder{*this, in}.Build()};
}

std::map<std::string, std::string> Attention::GetDiagnostics() const {
  auto facts = Layer::GetDiagnostics();
  facts["attention.processor"] = NameOf(processor_);
  facts["attention.heads"] = fmt::format("{}", options_.heads);
  facts["attention.dim_head"] = fmt::format("{}", options_.dim_head);
  facts["attention.scale"] = fmt::format("{}", scale());
  return facts;
}

double Attention::scale() const {
  return options_.scale_qk ? 1 / std::sqrt(static_cast<double>(options_.dim_head)) : 1;
}

Value Attention::NormalizeHeads(LayerNorm* norm, Value x) {
  if (!norm) return x;
  Shape shape = x.shape();
  x = norm->Call(Reshape(x, {shape[0], shape[1], options_.heads, options_.dim_head}));
  return Reshape(x, shape);
}

}  // namespace calotype::nn
