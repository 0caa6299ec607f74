// DiffusionModel: all that one text-to-image model in pixel space consists of: the U-Net, the
// caption encoder with its vocabulary, and the noise schedule. It is a Layer, so both networks
// train together, and it is what a run folder holds.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "diffusion/scheduler_config.h"
#include "models/caption_encoder.h"
#include "models/unet_2d_condition.h"

namespace calotype {

// Inputs: sample [B, C, H, W], timestep i64 [B], tokens i64 [B, L]; output: the prediction [B, C,
// H, W].
class DiffusionModel : public Layer {
 public:
  // Errors: ValueError if the parts do not fit together.
  DiffusionModel(const UNet2DConditionConfig& unet, const CaptionEncoderConfig& encoder,
                 const SchedulerConfig& scheduler);

  // The layout of diffusers' folders: model_index.json, unet/{config.json,
  // diffusion_pytorch_model.safetensors}, caption_encoder/{config.json, model.safetensors},
  // scheduler/scheduler_config.json. Errors: FileError, ValueError naming file and field.
  static std::unique_ptr<DiffusionModel> Load(const std::filesystem::path& folder);
  // Writes the folder; each file is replaced atomically. Errors: FileError.
  void Save(const std::filesystem::path& folder);

  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;
  // Its two halves: context [B, L, D] of the tokens, and the prediction.
  Value Encode(Value tokens) { return encoder_->Call(tokens); }
  Value Denoise(Value sample, Value timestep, Value context) {
    return unet_->Call({sample, timestep, context});
  }

  // Token rows i64 [texts, L]. Unknown words are reported to `warn` by name and taken as <unk>,
  // words behind the L-th are reported and dropped. Errors: ValueError for a text all of whose
  // words are unknown.
  Tensor Tokens(std::span<const std::string> texts,
                const std::function<void(const std::string&)>& warn) const;

  UNet2DConditionModel& unet() { return *unet_; }
  CaptionEncoder& encoder() { return *encoder_; }
  const SchedulerConfig& scheduler() const { return scheduler_; }
  int64_t channels() const { return unet_->config().in_channels; }
  int64_t side() const { return unet_->config().sample_size.value_or(64); }
  int64_t caption_tokens() const { return encoder_->config().max_length; }
  int64_t context_width() const { return encoder_->config().hidden_size; }

 private:
  UNet2DConditionModel* unet_;
  CaptionEncoder* encoder_;
  SchedulerConfig scheduler_;
  CaptionTokenizer tokenizer_;
};

}  // namespace calotype
