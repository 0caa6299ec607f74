// Configurations of the three models of a Stable Diffusion checkpoint in the original single-file
// layout, derived from names and shapes of its tensors. What shapes cannot tell is as in Stable
// Diffusion 1.x (CLIP text encoder) or 2.x (OpenCLIP): number of heads, activation, norm groups,
// and sample_size, which is that of models for 512 pixels.
#pragma once

#include <map>
#include <string>

#include "models/original_keys.h"

namespace calotype {

struct OriginalConfigs {
  UNet2DConditionConfig unet;
  AutoencoderKLConfig vae;
  CLIPTextConfig text_encoder;
  TextLayout layout = TextLayout::kTransformers;
};

// `shapes`: of all tensors of the file, by name. Errors: ValueError naming a tensor that every such
// checkpoint has and this one has not, UnsupportedError for a layout that is not that of SD 1.x or
// 2.x (SDXL, a U-Net with class labels). The results are not validated.
OriginalConfigs DeriveOriginalConfigs(const std::map<std::string, Shape>& shapes);

}  // namespace calotype
