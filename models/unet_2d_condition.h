// UNet2DConditionModel of diffusers: the denoiser of Stable Diffusion 1.5 and 2.x and of small
// models of the same kind. Parameter names and shapes are diffusers' own, so its files load by
// name.
#pragma once

#include <optional>
#include <vector>

#include "layers/conv2d.h"
#include "layers/norm.h"
#include "layers/timesteps.h"
#include "models/unet_blocks.h"
#include "models/unet_config.h"

namespace calotype {

// Inputs:
//   sample [B, in_channels, H, W], any H and W;
//   timestep [B] or [1], f32, i32 or i64;
//   encoder_hidden_states [B or 1, S, cross_attention_dim, or encoder_hid_dim if there is one];
//   encoder_attention_mask (optional) [B, S], 1 for tokens to see and 0 for others, or a bias [B,
//   1, S];
//   attention_mask (optional), the same for the pixels as keys of the self-attention;
//   class_labels, with class_embed_type or num_class_embeds: [B or 1], i32 or i64 (of a table), f32
//   or an integer type ("timestep"), or vectors f32 [B or 1, width] (the other types);
//   timestep_cond (optional, with time_cond_proj_dim) [B or 1, time_cond_proj_dim];
//   mid_block_additional_residual (optional), added to the result of the mid block;
//   down_block_additional_residuals (all or none), added to the skips in their order, that of
//   conv_in first: what a ControlNet gives;
//   down_intrablock_additional_residuals (optional), one for each down block, absent ones undefined
//   or missing at the end: what a T2I-Adapter gives, see UNetDownBlock2D::Build.
// Output: [B, out_channels, H, W], the model's prediction (noise, velocity or picture, as trained).
class UNet2DConditionModel : public Layer {
 public:
  // Errors: as UNet2DConditionConfig::Validate.
  explicit UNet2DConditionModel(const UNet2DConditionConfig& config);
  const UNet2DConditionConfig& config() const { return config_; }

  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;
  std::map<std::string, std::string> GetDiagnostics() const override;

  // FreeU for the first two up blocks: backbone factors b1, b2, skip factors s1, s2. As in
  // diffusers it leaves Simple... and Resnet... blocks alone; UnsupportedError if both are such.
  struct FreeU {
    double s1 = 1, s2 = 1, b1 = 1, b2 = 1;
  };
  void SetFreeU(const std::optional<FreeU>& freeu);
  // Gradient checkpointing: for gradients, the inner values of every resnet and every transformer
  // are computed again instead of being kept. The same gradients, more time, less memory.
  void EnableGradientCheckpointing(bool enable = true);
  // Index of the input mid_block_additional_residual; the others follow it.
  static constexpr size_t kMidResidual = 7;
  // Number of values that go from the down path to the up path.
  size_t skips() const { return skips_; }

 private:
  bool TakesFreeU(size_t up_block) const;
  // The time embedding with that of the class labels.
  Value TimeEmbedding(Value t, Value class_labels, Value timestep_cond);

  size_t skips_ = 0;
  std::optional<FreeU> freeu_;
  UNet2DConditionConfig config_;
  nn::Conv2d *conv_in_, *conv_out_;
  nn::Timesteps* time_proj_;
  nn::TimestepEmbedding* time_embedding_;
  Layer* class_embedding_ = nullptr;  // Embedding, TimestepEmbedding or Linear
  nn::Linear* encoder_hid_proj_ = nullptr;
  std::vector<nn::UNetDownBlock2D*> down_blocks_;
  nn::UNetMidBlock2D* mid_block_;
  std::vector<nn::UNetUpBlock2D*> up_blocks_;
  nn::GroupNorm* conv_norm_out_;
};

}  // namespace calotype
