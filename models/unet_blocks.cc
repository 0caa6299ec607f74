#include "models/unet_blocks.h"

#include "graph/functions.h"

namespace calotype::nn {

namespace {

ResnetBlock2D::Options Resnet(int64_t in, int64_t out, const UNetBlockOptions& block) {
  return {.in_channels = in,
          .out_channels = out,
          .temb_channels = block.temb_channels,
          .groups = block.groups,
          .eps = block.eps,
          .non_linearity = block.act_fn,
          .time_embedding_norm = block.time_scale_shift};
}

Transformer2DModel::Options Transformer(int64_t channels, const UNetBlockOptions& block) {
  Check(block.heads > 0 && channels % block.heads == 0,
        "U-Net block: {} heads must divide {} channels", block.heads, channels);
  return {.num_attention_heads = block.heads,
          .attention_head_dim = channels / block.heads,
          .in_channels = channels,
          .num_layers = block.transformer_layers,
          .norm_num_groups = block.groups,
          .cross_attention_dim = block.cross_attention_dim,
          .use_linear_projection = block.use_linear_projection,
          .only_cross_attention = block.only_cross_attention,
          .upcast_attention = block.upcast_attention};
}

Value Transform(Transformer2DModel* transformer, Value x, const UNetCondition& condition) {
  return transformer->Call({x, condition.context, Value{}, condition.context_mask});
}

}  // namespace

// ---------------------------------------------------------------- down

UNetDownBlock2D::UNetDownBlock2D(const Options& options) : Layer("UNetDownBlock2D") {
  const Options& o = options;
  if (o.block.attention) {
    for (int64_t i = 0; i < o.num_layers; ++i) {
      attentions_.push_back(AddLayer<Transformer2DModel>(fmt::format("attentions.{}", i),
                                                         Transformer(o.out_channels, o.block)));
    }
  }
  for (int64_t i = 0; i < o.num_layers; ++i) {
    resnets_.push_back(AddLayer<ResnetBlock2D>(
        fmt::format("resnets.{}", i),
        Resnet(i == 0 ? o.in_channels : o.out_channels, o.out_channels, o.block)));
  }
  if (o.add_downsample) {
    downsampler_ = AddLayer<Downsample2D>("downsamplers.0",
                                          Downsample2D::Options{.channels = o.out_channels,
                                                                .use_conv = true,
                                                                .padding = o.downsample_padding,
                                                                .name = "op"});
  }
}

Value UNetDownBlock2D::Build(Value x, const UNetCondition& condition, std::vector<Value>& skips) {
  auto scope = Scope(*x.graph);
  for (size_t i = 0; i < resnets_.size(); ++i) {
    x = resnets_[i]->Call({x, condition.temb});
    if (!attentions_.empty()) x = Transform(attentions_[i], x, condition);
    skips.push_back(x);
  }
  if (downsampler_) {
    x = downsampler_->Call(x);
    skips.push_back(x);
  }
  return x;
}

std::vector<Value> UNetDownBlock2D::ExportComputationGraph(ComputationGraph&,
                                                           std::span<const Value> inputs) {
  std::vector<Value> skips;
  Value y = Build(Required(inputs, 0, "hidden_states"),
                  {Required(inputs, 1, "temb"), Optional(inputs, 2), Optional(inputs, 3)}, skips);
  skips.insert(skips.begin(), y);
  return skips;
}

// ---------------------------------------------------------------- middle

UNetMidBlock2D::UNetMidBlock2D(const Options& options) : Layer("UNetMidBlock2D") {
  const Options& o = options;
  ResnetBlock2D::Options resnet = Resnet(o.in_channels, o.in_channels, o.block);
  resnet.output_scale_factor = o.output_scale_factor;
  attention_ = AddLayer<Transformer2DModel>("attentions.0", Transformer(o.in_channels, o.block));
  resnet_0_ = AddLayer<ResnetBlock2D>("resnets.0", resnet);
  resnet_1_ = AddLayer<ResnetBlock2D>("resnets.1", resnet);
}

Value UNetMidBlock2D::Build(Value x, const UNetCondition& condition) {
  auto scope = Scope(*x.graph);
  x = resnet_0_->Call({x, condition.temb});
  x = Transform(attention_, x, condition);
  return resnet_1_->Call({x, condition.temb});
}

std::vector<Value> UNetMidBlock2D::ExportComputationGraph(ComputationGraph&,
                                                          std::span<const Value> inputs) {
  return {Build(Required(inputs, 0, "hidden_states"),
                {Required(inputs, 1, "temb"), Optional(inputs, 2), Optional(inputs, 3)})};
}

// ---------------------------------------------------------------- up

UNetUpBlock2D::UNetUpBlock2D(const Options& options) : Layer("UNetUpBlock2D") {
  const Options& o = options;
  size_t layers = o.skip_channels.size();
  if (o.block.attention) {
    for (size_t i = 0; i < layers; ++i) {
      attentions_.push_back(AddLayer<Transformer2DModel>(fmt::format("attentions.{}", i),
                                                         Transformer(o.out_channels, o.block)));
    }
  }
  for (size_t i = 0; i < layers; ++i) {
    int64_t in = (i == 0 ? o.in_channels : o.out_channels) + o.skip_channels[i];
    resnets_.push_back(
        AddLayer<ResnetBlock2D>(fmt::format("resnets.{}", i), Resnet(in, o.out_channels, o.block)));
  }
  if (o.add_upsample) {
    upsampler_ = AddLayer<Upsample2D>(
        "upsamplers.0", Upsample2D::Options{.channels = o.out_channels, .use_conv = true});
  }
}

Value UNetUpBlock2D::Build(Value x, const UNetCondition& condition, std::vector<Value>& skips) {
  auto scope = Scope(*x.graph);
  for (size_t i = 0; i < resnets_.size(); ++i) {
    Check<ShapeError>(!skips.empty(), "{}: {} skips are missing", Describe(), resnets_.size() - i);
    x = resnets_[i]->Call({Concat({x, skips.back()}, 1), condition.temb});
    skips.pop_back();
    if (!attentions_.empty()) x = Transform(attentions_[i], x, condition);
  }
  if (!upsampler_) return x;
  return skips.empty() ? upsampler_->Call(x)
                       : upsampler_->Resize(x, skips.back().dim(2), skips.back().dim(3));
}

std::vector<Value> UNetUpBlock2D::ExportComputationGraph(ComputationGraph&,
                                                         std::span<const Value> inputs) {
  std::vector<Value> skips;
  for (size_t i = 4; i < inputs.size(); ++i) skips.push_back(Required(inputs, i, "skip"));
  Check<ShapeError>(skips.size() == resnets_.size(), "{}: {} skips given, {} needed", Describe(),
                    skips.size(), resnets_.size());
  return {Build(Required(inputs, 0, "hidden_states"),
                {Required(inputs, 1, "temb"), Optional(inputs, 2), Optional(inputs, 3)}, skips)};
}

}  // namespace calotype::nn
