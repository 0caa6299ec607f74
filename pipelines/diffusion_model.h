// DiffusionModel: all that one text-to-image model consists of: the U-Net, a text encoder with its
// tokenizer, the noise schedule and, if the U-Net works on latents, the autoencoder. It is a Layer,
// so its networks train together, and it is what a model folder holds: our own run folders as well
// as diffusers' folders of Stable Diffusion 1.x and 2.x.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "diffusion/scheduler_config.h"
#include "models/autoencoder_kl.h"
#include "models/caption_encoder.h"
#include "models/clip_text_model.h"
#include "models/clip_tokenizer.h"
#include "models/unet_2d_condition.h"
#include "pipelines/model_folder.h"

namespace calotype {

// The parts of a model. Exactly one of the text encoders is there.
struct DiffusionModelConfig {
  UNet2DConditionConfig unet;
  std::optional<CaptionEncoderConfig> caption_encoder;  // its own small vocabulary
  std::optional<CLIPTextConfig> text_encoder;           // CLIP, with its tokenizer
  std::shared_ptr<const CLIPTokenizer> tokenizer;
  std::map<std::string, std::string> tokenizer_files;  // name -> content, which Save writes again
  std::optional<AutoencoderKLConfig> vae;              // none: the U-Net works on pictures
  SchedulerConfig scheduler;
  std::string scheduler_json;  // the file with the fields of other samplers, or empty
};

// Sampling and training give a U-Net the sample, the timestep and the context. Errors:
// UnsupportedFileError, naming `source` and the field, for one that takes more: class_labels or
// timestep_cond.
void CheckUNetInputs(const UNet2DConditionConfig& unet, std::string_view source);

// Inputs: sample [B, C, H, W], timestep i64 [B], tokens i64 [B, L]; output: the prediction [B, C,
// H, W]. Samples are what the sampler walks on: pictures, or latents if there is an autoencoder.
class DiffusionModel : public Layer {
 public:
  using Warn = std::function<void(const std::string&)>;

  // Errors: ValueError if the parts do not fit together.
  explicit DiffusionModel(DiffusionModelConfig config);
  DiffusionModel(const UNet2DConditionConfig& unet, const CaptionEncoderConfig& encoder,
                 const SchedulerConfig& scheduler);

  // The layout of diffusers' folders: model_index.json names the parts, each in the folder of its
  // name: unet, scheduler, vae, and text_encoder with tokenizer or caption_encoder. Read are our
  // own models (_class_name CalotypePipeline) and StableDiffusionPipeline, ...Img2ImgPipeline and
  // ...InpaintPipeline. Other entries (safety_checker, feature_extractor) are left out; one warning
  // names those that are not null. Errors: FileError, ValueError, UnsupportedError naming file and
  // field.
  static std::unique_ptr<DiffusionModel> Load(const std::filesystem::path& folder,
                                              const Warn& warn = {});
  // The same, but of the weights only the headers of their files are read, so that most errors come
  // now; using a weight is a ValueError until LoadPart.
  static std::unique_ptr<DiffusionModel> Open(const std::filesystem::path& folder,
                                              const Warn& warn = {});
  // Reads the weights of a part (unet(), text_encoder(), caption_encoder() or vae()) from the
  // folder that was opened or loaded. Errors: FileError; ValueError for a model without a folder.
  void LoadPart(Layer& part, Weights weights = Weights::kLoad);
  // Writes the folder; each file is replaced atomically. A Stable Diffusion model is a
  // StableDiffusionPipeline, or ...InpaintPipeline if its U-Net takes a mask. Errors: FileError.
  void Save(const std::filesystem::path& folder);

  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;
  // Its two halves: context [B, L, D] of the tokens, and the prediction.
  Value Encode(Value tokens);
  Value Denoise(Value sample, Value timestep, Value context) {
    return unet_->Call({sample, timestep, context});
  }

  // Token rows i64 [texts, L]. Words that a caption encoder does not know are reported to `warn` by
  // name and taken as <unk>; what is behind the L-th word or token is reported and dropped. Errors:
  // ValueError for a text all of whose words are unknown, and for one that is not UTF-8.
  Tensor Tokens(std::span<const std::string> texts, const Warn& warn) const;

  // Adds a word for prompts and captions, such as "<new1>", that CLIP reads as these embeddings f32
  // [n, context_width]: see CLIPTokenizer::AddToken and CLIPTextModel::AddTokens. Returns their
  // parameter. Save does not write it. Errors: theirs; ValueError for a model without CLIP.
  ParameterPtr AddToken(const std::string& token, const Tensor& embeddings);

  // For who samples or trains: as CheckUNetInputs, naming the folder if there is one.
  void CheckInputs() const;

  UNet2DConditionModel& unet() { return *unet_; }
  // One of them is null.
  CaptionEncoder* caption_encoder() { return caption_encoder_; }
  CLIPTextModel* text_encoder() { return text_encoder_; }
  const CLIPTokenizer* tokenizer() const { return tokenizer_.get(); }  // of text_encoder
  // That of a caption encoder; null for CLIP.
  const CaptionTokenizer* caption_tokenizer() const { return words_ ? &*words_ : nullptr; }
  AutoencoderKL* vae() { return vae_; }  // null: samples are pictures

  // CLIP and an autoencoder. As in diffusers' pipeline the schedule then has steps_offset 1 and
  // clip_sample false, whatever its file says.
  bool stable_diffusion() const { return text_encoder_ && vae_; }
  const SchedulerConfig& scheduler() const { return scheduler_; }
  // The config of a sampler by name (see WithSampler) for this model, "": the model's own. As with
  // diffusers' from_config, the fields of the model's file count for the other samplers too.
  SchedulerConfig SchedulerFor(std::string_view sampler) const;

  int64_t channels() const { return unet_->config().out_channels; }  // of a sample
  int64_t factor() const;  // pixels of a picture's side for each of the sample's
  int64_t sample_side() const { return unet_->config().sample_size.value_or(64); }
  int64_t side() const { return sample_side() * factor(); }  // of a picture
  // True if the U-Net also takes a mask and the masked picture, as additional channels of its input
  // behind the sample's.
  bool takes_mask() const { return unet_->config().in_channels != channels(); }
  int64_t caption_tokens() const;   // L
  int64_t vocabulary_size() const;  // words or tokens, added ones not counted
  int64_t context_width() const;    // D

 private:
  static std::unique_ptr<DiffusionModel> FromFolder(const std::filesystem::path& folder,
                                                    const Warn& warn);

  std::filesystem::path folder_;  // empty: none
  UNet2DConditionModel* unet_;
  CaptionEncoder* caption_encoder_ = nullptr;
  CLIPTextModel* text_encoder_ = nullptr;
  AutoencoderKL* vae_ = nullptr;
  SchedulerConfig scheduler_;
  std::string scheduler_json_;
  std::optional<CaptionTokenizer> words_;
  std::shared_ptr<const CLIPTokenizer> tokenizer_;
  std::map<std::string, std::string> tokenizer_files_;
};

}  // namespace calotype
