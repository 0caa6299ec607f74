// Conv2d: torch.nn.Conv2d with square kernels, equal strides, no dilation or groups.
#pragma once

#include "layers/lora.h"

namespace calotype::nn {

// Cross-correlation of x [B, in_channels, H, W] with weight [out_channels, in_channels, k, k] and
// bias [out_channels]; weight and bias are drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), fan_in =
// in_channels k k, as in PyTorch.
class Conv2d : public LoRACompatible {
 public:
  struct Options {
    int64_t in_channels = 0, out_channels = 0;
    int64_t kernel_size = 3, stride = 1;
    int64_t padding = 0;  // zeros on every side
    bool bias = true;
    // Further zeros on the right and bottom only: padding 0 and one of these is how diffusers'
    // Downsample2D pads when its padding is 0.
    int64_t extra_padding = 0;
  };
  // Errors: ValueError for sizes out of range.
  explicit Conv2d(const Options& options);
  const Options& options() const { return options_; }
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  LoRALayer* MakeLoRA(const std::string& name, int64_t rank,
                      std::optional<double> network_alpha) override;
  Options options_;
};

}  // namespace calotype::nn
