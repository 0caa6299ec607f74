// Downsample2D and Upsample2D of diffusers: halve or double a picture, with or without a
// convolution.
#pragma once

#include <string>

#include "layers/conv2d.h"

namespace calotype::nn {

// x [B, channels, H, W] -> [B, out_channels, about H/2, about W/2]: a 3x3 convolution of stride 2
// with `padding` zeros around (0: one zero to the right and at the bottom), or without use_conv the
// mean of each 2x2 square.
class Downsample2D : public Layer {
 public:
  struct Options {
    int64_t channels = 0;
    bool use_conv = false;
    int64_t out_channels = 0;  // 0: channels
    int64_t padding = 1;
    // Decides the parameter's name as in diffusers: "conv" and "Conv2d_0" -> Conv2d_0.weight, any
    // other, such as the U-Net's "op" -> conv.weight.
    std::string name = "conv";
    int64_t kernel_size = 3;
    bool bias = true;
  };
  // Errors: ValueError for sizes out of range, or other out_channels without use_conv.
  explicit Downsample2D(const Options& options);
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  Options options_;
  Conv2d* conv_ = nullptr;
};

// x [B, channels, H, W] -> [B, out_channels, 2H, 2W]: each pixel repeated 2x2, then with use_conv a
// 3x3 convolution.
class Upsample2D : public Layer {
 public:
  struct Options {
    int64_t channels = 0;
    bool use_conv = false;
    int64_t out_channels = 0;   // 0: channels
    std::string name = "conv";  // "conv" -> conv.weight, any other -> Conv2d_0.weight
    int64_t kernel_size = 3, padding = 1;
    bool bias = true;
  };
  explicit Upsample2D(const Options& options);  // Errors: as Downsample2D's
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;
  // The same to height x width instead of 2H x 2W (nearest pixel).
  Value Resize(Value x, int64_t height, int64_t width);

 private:
  Value Build(Value x, int64_t height, int64_t width);

  Options options_;
  Conv2d* conv_ = nullptr;
};

}  // namespace calotype::nn
