// U-Nets in diffusers' folder layout: config.json and diffusion_pytorch_model.safetensors.
#pragma once

#include <filesystem>
#include <memory>

#include "models/unet_2d_condition.h"

namespace calotype {

// Errors: FileError for a file that is missing or damaged, or whose tensors do not fit the config
// (all problems in one text); ValueError or UnsupportedError naming a field of the config.
std::unique_ptr<UNet2DConditionModel> LoadUNet(const std::filesystem::path& folder);

// Makes the folder if needed; each file is replaced atomically. Errors: FileError.
void SaveUNet(const std::filesystem::path& folder, UNet2DConditionModel& unet);

// The config in a file. Errors: FileError, and those of UNet2DConditionConfig::FromJson with the
// path.
UNet2DConditionConfig ReadUNetConfig(const std::filesystem::path& path);

// Copies the tensors of a file into a layer. Errors: FileError naming the file and all that does
// not fit.
void LoadWeights(Layer& layer, const std::filesystem::path& path);

}  // namespace calotype
