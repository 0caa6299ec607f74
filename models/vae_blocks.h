// Encoder and decoder of diffusers' AutoencoderKL: resnets without a time embedding, one attention
// layer in the middle, no skips from one to the other.
#pragma once

#include <string>
#include <vector>

#include "layers/attention.h"
#include "layers/conv2d.h"
#include "layers/resample.h"
#include "layers/resnet.h"

namespace calotype::nn {

struct VaeOptions {
  int64_t in_channels = 3, out_channels = 3;
  std::vector<int64_t> block_out_channels = {64};  // from the picture's side to the latents'
  int64_t layers_per_block = 2;
  int64_t norm_num_groups = 32;
  std::string act_fn = "silu";  // of the resnets; SiLU follows the last norm
  bool mid_block_add_attention = true;
};

// num_layers resnets, then half the size (DownEncoderBlock2D: a convolution of stride 2, one zero
// to the right and at the bottom) or twice the size (UpDecoderBlock2D), or neither.
class VaeBlock2D : public Layer {
 public:
  enum class Resample : uint8_t { kNone, kDown, kUp };
  VaeBlock2D(int64_t in_channels, int64_t out_channels, int64_t num_layers, Resample resample,
             const VaeOptions& options);
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  std::vector<ResnetBlock2D*> resnets_;
  Layer* resample_ = nullptr;
};

// resnet, attention with one head over the pixels (with mid_block_add_attention), resnet.
class VaeMidBlock2D : public Layer {
 public:
  VaeMidBlock2D(int64_t channels, const VaeOptions& options);
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  ResnetBlock2D *resnet_0_, *resnet_1_;
  Attention* attention_ = nullptr;
};

// x [B, in_channels, H, W] -> [B, out_channels, H/f, W/f], f = 2^(blocks - 1).
class VaeEncoder : public Layer {
 public:
  explicit VaeEncoder(const VaeOptions& options);
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  Conv2d *conv_in_, *conv_out_;
  std::vector<VaeBlock2D*> down_blocks_;
  VaeMidBlock2D* mid_block_;
  GroupNorm* conv_norm_out_;
};

// z [B, in_channels, h, w] -> [B, out_channels, f h, f w].
class VaeDecoder : public Layer {
 public:
  explicit VaeDecoder(const VaeOptions& options);
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  Conv2d *conv_in_, *conv_out_;
  VaeMidBlock2D* mid_block_;
  std::vector<VaeBlock2D*> up_blocks_;
  GroupNorm* conv_norm_out_;
};

}  // namespace calotype::nn
