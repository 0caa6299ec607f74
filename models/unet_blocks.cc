#include "models/unet_blocks.h"

#include <cmath>
#include <numbers>

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
          .skip_time_act = block.skip_time_act,
          .time_embedding_norm = block.time_scale_shift,
          .output_scale_factor = block.output_scale_factor};
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

Attention::Options AddedKV(int64_t channels, const UNetBlockOptions& block) {
  Check(block.heads > 0 && channels % block.heads == 0,
        "U-Net block: heads of width {} must divide {} channels", block.heads, channels);
  return {.query_dim = channels,
          .cross_attention_dim = channels,
          .heads = channels / block.heads,
          .dim_head = block.heads,
          .bias = true,
          .upcast_softmax = true,
          .cross_attention_norm = block.cross_attention_norm,
          .added_kv_proj_dim = block.cross_attention_dim,
          .only_cross_attention = block.only_cross_attention,
          .norm_num_groups = block.groups};
}

Value Attend(Layer* layer, Value x, const UNetCondition& condition) {
  if (dynamic_cast<Attention*>(layer)) {
    Value mask = condition.mask.defined() ? condition.mask : condition.context_mask;
    return layer->Call({x, condition.context, mask});
  }
  return layer->Call({x, condition.context, condition.mask, condition.context_mask});
}

// x with its frequencies 0 and -1 in both directions multiplied by `scale`; the real part, as in
// diffusers' fourier_filter. These four frequencies are a projection on cosines and sines, E E^T
// with E [H W, 8], so that no transform is needed: x + (scale - 1) / (H W) x E E^T.
Value FilterLowFrequencies(Value x, double scale) {
  int64_t height = x.dim(2), width = x.dim(3), pixels = height * width;
  Check<ShapeError>(height >= 2 && width >= 2, "FreeU: skip {} has sides below 2", x.shape());
  std::vector<float> basis;
  auto angle = [](int64_t i, int64_t size) {
    return 2 * std::numbers::pi * static_cast<double>(i) / static_cast<double>(size);
  };
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      for (double phase :
           {0.0, angle(i, height), angle(j, width), angle(i, height) + angle(j, width)}) {
        basis.push_back(static_cast<float>(std::cos(phase)));
        basis.push_back(static_cast<float>(std::sin(phase)));
      }
    }
  }
  Value e = x.graph->Constant(Tensor::From({pixels, 8}, basis));
  Value rows = Reshape(x, {x.dim(0) * x.dim(1), pixels});
  Value low = MatMul(MatMul(rows, e), e, false, true);
  auto factor = static_cast<float>((scale - 1) / static_cast<double>(pixels));
  return x + Reshape(low * factor, x.shape());
}

}  // namespace

// ---------------------------------------------------------------- down

UNetDownBlock2D::UNetDownBlock2D(const Options& options) : Layer("UNetDownBlock2D") {
  const Options& o = options;
  auto add_attention = [&](std::string name) -> Layer* {
    if (o.block.simple) return AddLayer<Attention>(name, AddedKV(o.out_channels, o.block));
    return AddLayer<Transformer2DModel>(name, Transformer(o.out_channels, o.block));
  };
  if (o.block.attention) {
    for (int64_t i = 0; i < o.num_layers; ++i) {
      attentions_.push_back(add_attention(fmt::format("attentions.{}", i)));
    }
  }
  for (int64_t i = 0; i < o.num_layers; ++i) {
    resnets_.push_back(AddLayer<ResnetBlock2D>(
        fmt::format("resnets.{}", i),
        Resnet(i == 0 ? o.in_channels : o.out_channels, o.out_channels, o.block)));
  }
  if (o.add_downsample && o.block.simple) {
    ResnetBlock2D::Options resnet = Resnet(o.out_channels, o.out_channels, o.block);
    resnet.down = true;
    downsampler_ = AddLayer<ResnetBlock2D>("downsamplers.0", resnet);
  } else if (o.add_downsample) {
    downsampler_ = AddLayer<Downsample2D>("downsamplers.0",
                                          Downsample2D::Options{.channels = o.out_channels,
                                                                .use_conv = true,
                                                                .padding = o.downsample_padding,
                                                                .name = "op"});
  }
}

Value UNetDownBlock2D::Build(Value x, const UNetCondition& condition, std::vector<Value>& skips,
                             Value adapter) {
  auto scope = Scope(*x.graph);
  auto add = [&](Value to) {
    Check<ShapeError>(adapter.shape() == to.shape(),
                      "{}: down_intrablock_additional_residual {} must have the shape {}",
                      Describe(), adapter.shape(), to.shape());
    return to + adapter;
  };
  for (size_t i = 0; i < resnets_.size(); ++i) {
    x = resnets_[i]->Call({x, condition.temb});
    if (!attentions_.empty()) x = Attend(attentions_[i], x, condition);
    if (adapter.defined() && !attentions_.empty() && i + 1 == resnets_.size()) {
      Check<UnsupportedError>(!dynamic_cast<Attention*>(attentions_[i]),
                              "{}: a block with added keys and values takes no "
                              "down_intrablock_additional_residual",
                              Describe());
      x = add(x);
    }
    skips.push_back(x);
  }
  if (downsampler_) {
    x = downsampler_->Call({x, condition.temb});  // a convolution ignores temb
    skips.push_back(x);
  }
  if (adapter.defined() && attentions_.empty()) skips.back() = x = add(x);
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
  if (o.block.attention && o.block.simple) {
    attention_ = AddLayer<Attention>("attentions.0", AddedKV(o.in_channels, o.block));
  } else if (o.block.attention) {
    attention_ = AddLayer<Transformer2DModel>("attentions.0", Transformer(o.in_channels, o.block));
  }
  resnet_0_ = AddLayer<ResnetBlock2D>("resnets.0", resnet);
  if (o.block.attention) resnet_1_ = AddLayer<ResnetBlock2D>("resnets.1", resnet);
}

Value UNetMidBlock2D::Build(Value x, const UNetCondition& condition) {
  auto scope = Scope(*x.graph);
  x = resnet_0_->Call({x, condition.temb});
  if (!attention_) return x;
  x = Attend(attention_, x, condition);
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
  auto add_attention = [&](std::string name) -> Layer* {
    if (o.block.simple) return AddLayer<Attention>(name, AddedKV(o.out_channels, o.block));
    return AddLayer<Transformer2DModel>(name, Transformer(o.out_channels, o.block));
  };
  if (o.block.attention) {
    for (size_t i = 0; i < layers; ++i) {
      attentions_.push_back(add_attention(fmt::format("attentions.{}", i)));
    }
  }
  for (size_t i = 0; i < layers; ++i) {
    int64_t in = (i == 0 ? o.in_channels : o.out_channels) + o.skip_channels[i];
    resnets_.push_back(
        AddLayer<ResnetBlock2D>(fmt::format("resnets.{}", i), Resnet(in, o.out_channels, o.block)));
  }
  if (o.add_upsample && o.block.simple) {
    ResnetBlock2D::Options resnet = Resnet(o.out_channels, o.out_channels, o.block);
    resnet.up = true;
    resnet_upsampler_ = AddLayer<ResnetBlock2D>("upsamplers.0", resnet);
  } else if (o.add_upsample) {
    upsampler_ = AddLayer<Upsample2D>(
        "upsamplers.0", Upsample2D::Options{.channels = o.out_channels, .use_conv = true});
  }
}

Value UNetUpBlock2D::Build(Value x, const UNetCondition& condition, std::vector<Value>& skips,
                           const FreeUScale* freeu) {
  auto scope = Scope(*x.graph);
  for (size_t i = 0; i < resnets_.size(); ++i) {
    Check<ShapeError>(!skips.empty(), "{}: {} skips are missing", Describe(), resnets_.size() - i);
    Value skip = skips.back();
    skips.pop_back();
    if (freeu) {
      int64_t half = x.dim(1) / 2;
      x = Concat({Slice(x, 1, 0, half) * static_cast<float>(freeu->backbone),
                  Slice(x, 1, half, x.dim(1) - half)},
                 1);
      skip = FilterLowFrequencies(skip, freeu->skip);
    }
    x = resnets_[i]->Call({Concat({x, skip}, 1), condition.temb});
    if (!attentions_.empty()) x = Attend(attentions_[i], x, condition);
  }
  if (resnet_upsampler_) return resnet_upsampler_->Call({x, condition.temb});
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
