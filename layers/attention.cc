#include "layers/attention.h"

#include <cmath>

#include "graph/functions.h"

namespace calotype::nn {

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
  Check<UnsupportedError>(o.dropout == 0, "Attention: dropout {} is not supported, only 0",
                          o.dropout);
  Check<UnsupportedError>(o.qk_norm.empty() || o.qk_norm == "layer_norm",
                          "Attention: qk_norm '{}' is not supported; known is layer_norm",
                          o.qk_norm);
  Check(o.rescale_output_factor != 0, "Attention: rescale_output_factor must not be 0");
  int64_t inner = CheckedMul(o.heads, o.dim_head, "Attention");
  int64_t cross = o.cross_attention_dim > 0 ? o.cross_attention_dim : o.query_dim;
  int64_t out = o.out_dim > 0 ? o.out_dim : o.query_dim;
  Check(!o.residual_connection || out == o.query_dim,
        "Attention: residual_connection needs out_dim {} to be query_dim {}", out, o.query_dim);

  if (o.norm_num_groups > 0) {
    group_norm_ = AddLayer<GroupNorm>("group_norm",
                                      GroupNorm::Options{o.norm_num_groups, o.query_dim, o.eps});
  }
  if (o.qk_norm == "layer_norm") {
    norm_q_ = AddLayer<LayerNorm>("norm_q", LayerNorm::Options{o.dim_head, o.eps});
    norm_k_ = AddLayer<LayerNorm>("norm_k", LayerNorm::Options{o.dim_head, o.eps});
  }
  if (o.cross_attention_norm == "layer_norm") {
    norm_cross_layer_ = AddLayer<LayerNorm>("norm_cross", LayerNorm::Options{cross, 1e-5});
  } else if (o.cross_attention_norm == "group_norm") {
    norm_cross_group_ = AddLayer<GroupNorm>(
        "norm_cross", GroupNorm::Options{o.cross_attention_norm_num_groups, cross, 1e-5});
  } else {
    Check<UnsupportedError>(o.cross_attention_norm.empty(),
                            "Attention: cross_attention_norm '{}' is not supported; known are "
                            "layer_norm, group_norm",
                            o.cross_attention_norm);
  }
  to_q_ = AddLayer<Linear>("to_q", Linear::Options{o.query_dim, inner, o.bias});
  to_k_ = AddLayer<Linear>("to_k", Linear::Options{cross, inner, o.bias});
  to_v_ = AddLayer<Linear>("to_v", Linear::Options{cross, inner, o.bias});
  to_out_ = AddLayer<Linear>("to_out.0", Linear::Options{inner, out, o.out_bias});
  SetProcessor(!o.processor.empty() ? o.processor
               : o.scale_qk         ? "AttnProcessor2_0"
                                    : "AttnProcessor");
}

void Attention::SetProcessor(std::string_view name) {
  const AttentionProcessor& processor = FindAttentionProcessor(name);
  if (processor.check) processor.check(*this);
  processor_ = &processor;
  Changed();
}

std::vector<Value> Attention::ExportComputationGraph(ComputationGraph&,
                                                     std::span<const Value> inputs) {
  AttentionInputs in{Required(inputs, 0, "hidden_states"), Optional(inputs, 1),
                     Optional(inputs, 2)};
  const Shape& x = in.hidden_states.shape();
  Check<ShapeError>((x.rank() == 3 && x[2] == options_.query_dim) ||
                        (x.rank() == 4 && x[1] == options_.query_dim),
                    "{}: hidden_states {} must be [B, T, {}] or [B, {}, H, W]", Describe(), x,
                    options_.query_dim, options_.query_dim);
  if (in.encoder_hidden_states.defined()) {
    const Shape& e = in.encoder_hidden_states.shape();
    int64_t width =
        options_.cross_attention_dim > 0 ? options_.cross_attention_dim : options_.query_dim;
    Check<ShapeError>(e.rank() == 3 && (e[0] == x[0] || e[0] == 1) && e[2] == width,
                      "{}: encoder_hidden_states {} must be [{} or 1, S, {}]", Describe(), e, x[0],
                      width);
  } else {
    Check<ShapeError>(
        options_.cross_attention_dim == 0 || options_.cross_attention_dim == options_.query_dim,
        "{}: without encoder_hidden_states the module attends to its own input, which needs "
        "cross_attention_dim {} = query_dim {}",
        Describe(), options_.cross_attention_dim, options_.query_dim);
  }
  return {processor_->build(*this, in)};
}

std::map<std::string, std::string> Attention::GetDiagnostics() const {
  auto facts = Layer::GetDiagnostics();
  facts["attention.processor"] = processor_->name;
  facts["attention.heads"] = fmt::format("{}", options_.heads);
  facts["attention.dim_head"] = fmt::format("{}", options_.dim_head);
  facts["attention.scale"] = fmt::format("{}", scale());
  return facts;
}

double Attention::scale() const {
  return options_.scale_qk ? 1 / std::sqrt(static_cast<double>(options_.dim_head)) : 1;
}

Value Attention::PrepareMask(Value mask, int64_t batch, int64_t tokens, int64_t keys) const {
  if (!mask.defined()) return mask;
  Check<ShapeError>(mask.rank() == 3, "{}: attention_mask {} must be [B, 1 or T, S]", Describe(),
                    mask.shape());
  // Masks are chosen, not learned; their gradient would be as large as the scores.
  mask = StopGradient(mask);
  Shape given = mask.shape();
  if (given[2] != keys) mask = Pad(mask, {0, 0, 0}, {0, 0, keys});
  bool per_head = given[0] == batch * options_.heads && options_.heads > 1;
  Check<ShapeError>((given[0] == batch || per_head) && (given[1] == 1 || given[1] == tokens) &&
                        mask.dim(2) == keys,
                    "{}: attention_mask {} must be [{} or {}, 1 or {}, {}] (batch, tokens, keys)",
                    Describe(), given, batch, batch * options_.heads, tokens, keys);
  return Reshape(mask, {batch, per_head ? options_.heads : 1, given[1], keys});
}

Value Attention::Tokens(Value hidden_states) {
  Value x = hidden_states;
  if (x.rank() == 4) {
    x = Reshape(x, {x.dim(0), x.dim(1), x.dim(2) * x.dim(3)});
    if (group_norm_) x = group_norm_->Call(x);
    return Permute(x, {0, 2, 1});
  }
  if (group_norm_) x = Permute(group_norm_->Call(Permute(x, {0, 2, 1})), {0, 2, 1});
  return x;
}

Value Attention::Source(Value encoder_hidden_states, Value tokens) {
  if (!encoder_hidden_states.defined()) return tokens;
  Value e = encoder_hidden_states;
  if (norm_cross_layer_) e = norm_cross_layer_->Call(e);
  if (norm_cross_group_) e = Permute(norm_cross_group_->Call(Permute(e, {0, 2, 1})), {0, 2, 1});
  return e;
}

Value Attention::NormalizeHeads(LayerNorm* norm, Value x) {
  if (!norm) return x;
  Shape shape = x.shape();
  x = norm->Call(Reshape(x, {shape[0], shape[1], options_.heads, options_.dim_head}));
  return Reshape(x, shape);
}

Value Attention::Query(Value tokens) { return NormalizeHeads(norm_q_, to_q_->Call(tokens)); }
Value Attention::Key(Value source) { return NormalizeHeads(norm_k_, to_k_->Call(source)); }
Value Attention::ValueOf(Value source) { return to_v_->Call(source); }

Value Attention::Finish(Value attended, Value hidden_states) {
  Value y = to_out_->Call(attended);
  if (hidden_states.rank() == 4) {
    y = Reshape(Permute(y, {0, 2, 1}),
                {y.dim(0), y.dim(2), hidden_states.dim(2), hidden_states.dim(3)});
  }
  if (options_.residual_connection) y = y + hidden_states;
  if (options_.rescale_output_factor != 1) {
    y = y / static_cast<float>(options_.rescale_output_factor);
  }
  return y;
}

}  // namespace calotype::nn
