#include "layers/resample.h"

#include "graph/functions.h"

namespace calotype::nn {

Downsample2D::Downsample2D(const Options& options) : Layer("Downsample2D"), options_(options) {
  Options& o = options_;
  if (o.out_channels == 0) o.out_channels = o.channels;
  Check(o.channels > 0, "Downsample2D: channels {} must be positive", o.channels);
  Check(o.use_conv || o.out_channels == o.channels,
        "Downsample2D: without use_conv out_channels {} must be channels {}", o.out_channels,
        o.channels);
  if (!o.use_conv) return;
  conv_ = AddLayer<Conv2d>(
      o.name == "conv" || o.name == "Conv2d_0" ? "Conv2d_0" : "conv",
      Conv2d::Options{o.channels, o.out_channels, o.kernel_size, /*stride=*/2, o.padding, o.bias,
                      /*extra_padding=*/o.padding == 0 ? 1 : 0});
}

std::vector<Value> Downsample2D::ExportComputationGraph(ComputationGraph&,
                                                        std::span<const Value> inputs) {
  Value x = Required(inputs, 0, "hidden_states");
  if (conv_) return {conv_->Call(x)};
  Check<ShapeError>(x.rank() == 4 && x.dim(1) == options_.channels,
                    "{}: x {} must be [B, C, H, W] with {} channels", Describe(), x.shape(),
                    options_.channels);
  return {AvgPool2x2(x)};
}

Upsample2D::Upsample2D(const Options& options) : Layer("Upsample2D"), options_(options) {
  Options& o = options_;
  if (o.out_channels == 0) o.out_channels = o.channels;
  Check(o.channels > 0, "Upsample2D: channels {} must be positive", o.channels);
  Check(o.use_conv || o.out_channels == o.channels,
        "Upsample2D: without use_conv out_channels {} must be channels {}", o.out_channels,
        o.channels);
  if (!o.use_conv) return;
  conv_ = AddLayer<Conv2d>(
      o.name == "conv" ? "conv" : "Conv2d_0",
      Conv2d::Options{o.channels, o.out_channels, o.kernel_size, 1, o.padding, o.bias});
}

std::vector<Value> Upsample2D::ExportComputationGraph(ComputationGraph&,
                                                      std::span<const Value> inputs) {
  Value x = Required(inputs, 0, "hidden_states");
  Check<ShapeError>(x.rank() == 4, "{}: x {} must be [B, C, H, W]", Describe(), x.shape());
  return {Build(x, 2 * x.dim(2), 2 * x.dim(3))};
}

Value Upsample2D::Resize(Value x, int64_t height, int64_t width) {
  auto scope = Scope(*x.graph);
  return Build(x, height, width);
}

Value Upsample2D::Build(Value x, int64_t height, int64_t width) {
  Check<ShapeError>(x.rank() == 4 && x.dim(1) == options_.channels,
                    "{}: x {} must be [B, C, H, W] with {} channels", Describe(), x.shape(),
                    options_.channels);
  Value y = ResizeNearest(x, height, width);
  return conv_ ? conv_->Call(y) : y;
}

}  // namespace calotype::nn
