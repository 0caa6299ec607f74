#include "layers/resnet.h"

#include "graph/functions.h"
#include "layers/activation.h"

namespace calotype::nn {

ResnetBlock2D::ResnetBlock2D(const Options& options) : Layer("ResnetBlock2D"), options_(options) {
  Options& o = options_;
  if (o.out_channels == 0) o.out_channels = o.in_channels;
  if (o.groups_out == 0) o.groups_out = o.groups;
  if (o.conv_2d_out_channels == 0) o.conv_2d_out_channels = o.out_channels;
  Check<UnsupportedError>(o.dropout == 0, "ResnetBlock2D: dropout {} is not supported, only 0",
                          o.dropout);
  bool scale_shift = o.time_embedding_norm == "scale_shift";
  Check<UnsupportedError>(
      scale_shift || o.time_embedding_norm == "default",
      "ResnetBlock2D: time_embedding_norm '{}' is not supported; known are default, scale_shift",
      o.time_embedding_norm);
  Check(!scale_shift || o.temb_channels > 0,
        "ResnetBlock2D: time_embedding_norm scale_shift needs temb_channels");
  Check(!(o.up && o.down), "ResnetBlock2D: up and down exclude each other");
  Check(o.output_scale_factor != 0, "ResnetBlock2D: output_scale_factor must not be 0");
  CheckActivation(o.non_linearity);

  norm1_ = AddLayer<GroupNorm>("norm1", GroupNorm::Options{o.groups, o.in_channels, o.eps});
  conv1_ = AddLayer<Conv2d>("conv1", Conv2d::Options{o.in_channels, o.out_channels, 3, 1, 1});
  if (o.temb_channels > 0) {
    time_emb_proj_ = AddLayer<Linear>(
        "time_emb_proj",
        Linear::Options{o.temb_channels, scale_shift ? 2 * o.out_channels : o.out_channels});
  }
  norm2_ = AddLayer<GroupNorm>("norm2", GroupNorm::Options{o.groups_out, o.out_channels, o.eps});
  conv2_ =
      AddLayer<Conv2d>("conv2", Conv2d::Options{o.out_channels, o.conv_2d_out_channels, 3, 1, 1});
  if (o.up) upsample_ = AddLayer<Upsample2D>("upsample", Upsample2D::Options{o.in_channels});
  if (o.down)
    downsample_ = AddLayer<Downsample2D>("downsample", Downsample2D::Options{o.in_channels});
  if (o.use_in_shortcut.value_or(o.in_channels != o.conv_2d_out_channels)) {
    conv_shortcut_ = AddLayer<Conv2d>(
        "conv_shortcut",
        Conv2d::Options{o.in_channels, o.conv_2d_out_channels, 1, 1, 0, o.conv_shortcut_bias});
  } else {
    Check(o.in_channels == o.conv_2d_out_channels,
          "ResnetBlock2D: {} input and {} output channels need the shortcut convolution",
          o.in_channels, o.conv_2d_out_channels);
  }
}

std::vector<Value> ResnetBlock2D::ExportComputationGraph(ComputationGraph&,
                                                         std::span<const Value> inputs) {
  const Options& o = options_;
  Value x = Required(inputs, 0, "input_tensor");
  auto resize = [&](Value v) {
    return upsample_ ? upsample_->Call(v) : downsample_ ? downsample_->Call(v) : v;
  };
  Value h = resize(Activate(o.non_linearity, norm1_->Call(x)));
  x = resize(x);
  h = conv1_->Call(h);

  Value t;
  if (time_emb_proj_) {
    t = Required(inputs, 1, "temb");
    Check<ShapeError>(t.rank() == 2 && (t.dim(0) == x.dim(0) || t.dim(0) == 1),
                      "{}: temb {} must be [{} or 1, {}]", Describe(), t.shape(), x.dim(0),
                      o.temb_channels);
    t = time_emb_proj_->Call(o.skip_time_act ? t : Activate(o.non_linearity, t));
    t = Reshape(t, {t.dim(0), t.dim(1), 1, 1});
  }
  if (o.time_embedding_norm == "scale_shift") {
    Value scale = Slice(t, 1, 0, o.out_channels),
          shift = Slice(t, 1, o.out_channels, o.out_channels);
    h = norm2_->Call(h) * (1.0f + scale) + shift;
  } else {
    if (time_emb_proj_) h = h + t;
    h = norm2_->Call(h);
  }
  h = conv2_->Call(Activate(o.non_linearity, h));

  Value y = (conv_shortcut_ ? conv_shortcut_->Call(x) : x) + h;
  if (o.output_scale_factor != 1) y = y / static_cast<float>(o.output_scale_factor);
  return {y};
}

}  // namespace calotype::nn
