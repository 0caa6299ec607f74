#include "layers/conv2d.h"

#include <cmath>

#include "graph/functions.h"

namespace calotype::nn {

Conv2d::Conv2d(const Options& options) : LoRACompatible("Conv2d"), options_(options) {
  const Options& o = options_;
  Check(o.in_channels > 0 && o.out_channels > 0 && o.kernel_size > 0 && o.stride > 0,
        "Conv2d: in_channels {}, out_channels {}, kernel_size {} and stride {} must be positive",
        o.in_channels, o.out_channels, o.kernel_size, o.stride);
  Check(o.padding >= 0 && o.extra_padding >= 0, "Conv2d: padding {} and {} must not be negative",
        o.padding, o.extra_padding);
  int64_t fan_in = o.in_channels * o.kernel_size * o.kernel_size;
  float bound = 1 / std::sqrt(static_cast<float>(fan_in));
  AddParameter("weight", {o.out_channels, o.in_channels, o.kernel_size, o.kernel_size},
               Initializer::Uniform(bound));
  if (o.bias) AddParameter("bias", {o.out_channels}, Initializer::Uniform(bound));
}

std::vector<Value> Conv2d::ExportComputationGraph(ComputationGraph& graph,
                                                  std::span<const Value> inputs) {
  Value x = Required(inputs, 0, "x");
  Check<ShapeError>(x.rank() == 4 && x.dim(1) == options_.in_channels,
                    "{}: x {} must be [B, C, H, W] with {} channels", Describe(), x.shape(),
                    options_.in_channels);
  int64_t near = options_.padding, far = options_.padding + options_.extra_padding;
  Value y =
      calotype::Conv2d(x, Leaf(graph, "weight"), options_.bias ? Leaf(graph, "bias") : Value{},
                       {options_.stride, near, far, near, far});
  return {WithLoRA(x, y)};
}

LoRALayer* Conv2d::MakeLoRA(const std::string& name, int64_t rank,
                            std::optional<double> network_alpha) {
  const Options& o = options_;
  return AddLayer<LoRAConv2dLayer>(
      name, LoRAConv2dLayer::Options{o.in_channels, o.out_channels, o.kernel_size, o.stride,
                                     o.padding, o.extra_padding, rank, network_alpha});
}

}  // namespace calotype::nn
