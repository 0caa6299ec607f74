// The names of a Stable Diffusion model's tensors in the original single-file layout (CompVis,
// Stability AI: "model.diffusion_model.input_blocks.1.0.in_layers.0.weight") beside their names in
// diffusers' folders ("down_blocks.0.resnets.0.norm1.weight"). One table, derived from the
// configuration, serves both directions.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "models/autoencoder_kl.h"
#include "models/clip_text_model.h"
#include "models/unet_config.h"

namespace calotype {

// The prefixes of the three models in a file.
constexpr std::string_view kOriginalUNet = "model.diffusion_model.";
constexpr std::string_view kOriginalVae = "first_stage_model.";
constexpr std::string_view kOriginalText = "cond_stage_model.transformer.";  // CLIP, SD 1.x
constexpr std::string_view kOriginalOpenClip = "cond_stage_model.model.";    // OpenCLIP, SD 2.x

// One tensor of the original layout.
struct OriginalKey {
  struct Part {
    std::string name;  // in diffusers' layout, without the model's folder
    Shape shape;
  };
  std::string original;      // with its prefix
  std::vector<Part> parts;   // if several, their rows below each other make the original tensor
  bool convolution = false;  // a [out, in] matrix that the original keeps as [out, in, 1, 1]

  Shape OriginalShape() const;
};

// A row for every tensor of the model. Errors: those of Validate; UnsupportedError for a U-Net with
// block types that the original layout has no names for.
std::vector<OriginalKey> OriginalUNetKeys(const UNet2DConditionConfig& config);
std::vector<OriginalKey> OriginalVaeKeys(const AutoencoderKLConfig& config);
enum class TextLayout : uint8_t { kTransformers, kOpenClip };
std::vector<OriginalKey> OriginalTextKeys(const CLIPTextConfig& config, TextLayout layout);

// The tensors under their names in diffusers' layout, and back. Takes (erases) those of `keys` from
// `tensors` and leaves the others. Errors: ValueError that lists all missing tensors and wrong
// shapes; `tensors` is then as it was.
std::map<std::string, Tensor> ToDiffusers(const std::vector<OriginalKey>& keys,
                                          std::map<std::string, Tensor>& tensors);
std::map<std::string, Tensor> ToOriginal(const std::vector<OriginalKey>& keys,
                                         std::map<std::string, Tensor>& tensors);

}  // namespace calotype
