// Named model sizes.
#pragma once

#include <string_view>
#include <vector>

#include "models/unet_config.h"

namespace calotype {

// "toy16": 16x16 RGB, 1,001,251 parameters, the demo's model; "small32": 32x32 RGB; "attn32": 32x32
// RGB with attention from the first level on, for benchmarks; "sd15": the U-Net of Stable Diffusion
// 1.5. Errors: ValueError for another name, listing the known ones.
UNet2DConditionConfig UNetPreset(std::string_view name);
std::vector<std::string_view> UNetPresetNames();

}  // namespace calotype
