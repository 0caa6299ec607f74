#include "layers/transformer.h"

#include "graph/functions.h"
#include "layers/attention_math.h"

namespace calotype::nn {

Value MaskToBias(Value mask) {
  if (!mask.defined() || mask.rank() == 3) return mask;
  Check<ShapeError>(mask.rank() == 2, "attention mask {} must be [B, S] or [B, 1 or T, S]",
                    mask.shape());
  if (mask.type().dtype != DType::kF32) mask = Cast(mask);
  return Reshape((1.0f - mask) * -10000.0f, {mask.dim(0), 1, mask.dim(1)});
}

BasicTransformerBlock::BasicTransformerBlock(const Options& options)
    : Layer("BasicTransformerBlock"), options_(options) {
  const Options& o = options_;
  Check<UnsupportedError>(o.dropout == 0,
                          "BasicTransformerBlock: dropout {} is not supported, only 0", o.dropout);
  Check(!o.only_cross_attention || o.cross_attention_dim > 0,
        "BasicTransformerBlock: only_cross_attention needs cross_attention_dim");
  LayerNorm::Options norm{o.dim, o.norm_eps, o.norm_elementwise_affine};
  auto attention = [&](int64_t cross_attention_dim) {
    return Attention::Options{.query_dim = o.dim,
                              .cross_attention_dim = cross_attention_dim,
                              .heads = o.num_attention_heads,
                              .dim_head = o.attention_head_dim,
                              .bias = o.attention_bias,
                              .upcast_attention = o.upcast_attention,
                              .out_bias = o.attention_out_bias};
  };
  norm1_ = AddLayer<LayerNorm>("norm1", norm);
  attn1_ =
      AddLayer<Attention>("attn1", attention(o.only_cross_attention ? o.cross_attention_dim : 0));
  if (o.cross_attention_dim > 0 || o.double_self_attention) {
    norm2_ = AddLayer<LayerNorm>("norm2", norm);
    attn2_ = AddLayer<Attention>("attn2",
                                 attention(o.double_self_attention ? 0 : o.cross_attention_dim));
  }
  norm3_ = AddLayer<LayerNorm>("norm3", norm);
  ff_ = AddLayer<FeedForward>("ff", FeedForward::Options{.dim = o.dim,
                                                         .activation_fn = o.activation_fn,
                                                         .inner_dim = o.ff_inner_dim,
                                                         .bias = o.ff_bias});
}

std::vector<Value> BasicTransformerBlock::ExportComputationGraph(ComputationGraph&,
                                                                 std::span<const Value> inputs) {
  Value x = Required(inputs, 0, "hidden_states");
  Value context = Optional(inputs, 1), mask = Optional(inputs, 2),
        context_mask = Optional(inputs, 3);
  x = x + attn1_->Call({norm1_->Call(x), options_.only_cross_attention ? context : Value{}, mask});
  if (attn2_) {
    Value source = options_.double_self_attention ? Value{} : context;
    x = x + attn2_->Call({norm2_->Call(x), source, context_mask});
  }
  return {x + ff_->Call(norm3_->Call(x))};
}

Transformer2DModel::Transformer2DModel(const Options& options)
    : Layer("Transformer2DModel"), options_(options) {
  Options& o = options_;
  if (o.out_channels == 0) o.out_channels = o.in_channels;
  Check(o.in_channels > 0 && o.num_layers > 0,
        "Transformer2DModel: in_channels {} and num_layers {} must be positive", o.in_channels,
        o.num_layers);
  Check(o.out_channels == o.in_channels,
        "Transformer2DModel: out_channels {} must be in_channels {}, since the input is added",
        o.out_channels, o.in_channels);
  Check<UnsupportedError>(o.dropout == 0, "Transformer2DModel: dropout {} is not supported, only 0",
                          o.dropout);
  int64_t inner = CheckedMul(o.num_attention_heads, o.attention_head_dim, "Transformer2DModel");
  norm_ = AddLayer<GroupNorm>("norm", GroupNorm::Options{o.norm_num_groups, o.in_channels, 1e-6});
  auto projection = [&](const char* name, int64_t in, int64_t out) -> Layer* {
    if (o.use_linear_projection) return AddLayer<Linear>(name, Linear::Options{in, out});
    return AddLayer<Conv2d>(name, Conv2d::Options{in, out, /*kernel_size=*/1});
  };
  proj_in_ = projection("proj_in", o.in_channels, inner);
  for (int64_t i = 0; i < o.num_layers; ++i) {
    blocks_.push_back(AddLayer<BasicTransformerBlock>(
        fmt::format("transformer_blocks.{}", i),
        BasicTransformerBlock::Options{.dim = inner,
                                       .num_attention_heads = o.num_attention_heads,
                                       .attention_head_dim = o.attention_head_dim,
                                       .cross_attention_dim = o.cross_attention_dim,
                                       .activation_fn = o.activation_fn,
                                       .attention_bias = o.attention_bias,
                                       .only_cross_attention = o.only_cross_attention,
                                       .double_self_attention = o.double_self_attention,
                                       .upcast_attention = o.upcast_attention,
                                       .norm_elementwise_affine = o.norm_elementwise_affine,
                                       .norm_eps = o.norm_eps}));
  }
  proj_out_ = projection("proj_out", inner, o.out_channels);
}

std::vector<Value> Transformer2DModel::ExportComputationGraph(ComputationGraph&,
                                                              std::span<const Value> inputs) {
  Value x = Required(inputs, 0, "hidden_states");
  Value context = Optional(inputs, 1);
  Value mask = MaskToBias(Optional(inputs, 2)), context_mask = MaskToBias(Optional(inputs, 3));
  Check<ShapeError>(x.rank() == 4 && x.dim(1) == options_.in_channels,
                    "{}: hidden_states {} must be [B, {}, H, W]", Describe(), x.shape(),
                    options_.in_channels);
  int64_t height = x.dim(2), width = x.dim(3);
  bool linear = options_.use_linear_projection;
  Value h = norm_->Call(x);
  h = linear ? proj_in_->Call(PictureToTokens(h)) : PictureToTokens(proj_in_->Call(h));
  for (BasicTransformerBlock* block : blocks_) h = block->Call({h, context, mask, context_mask});
  h = linear ? TokensToPicture(proj_out_->Call(h), height, width)
             : proj_out_->Call(TokensToPicture(h, height, width));
  return {h + x};
}

}  // namespace calotype::nn
