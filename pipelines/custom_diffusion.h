// Custom Diffusion: fine-tuning of nothing but a U-Net's cross-attention. Its projections get
// copies in the attention processors, which train, are files of their own, and take the place of
// the projections. Kumari et al. 2022, arXiv:2212.04488. (New words for the text encoder, the
// modifier tokens of diffusers' script, are not part of this.)
#pragma once

#include <filesystem>
#include <string_view>
#include <vector>

#include "core/parameter.h"
#include "layers/layer.h"

namespace calotype {

// Sets CustomDiffusionAttnProcessor2_0 in every attention module: with copies of to_k and to_v in
// cross-attention (freeze_model "crossattn_kv"), of to_q and to_out.0 too ("crossattn"), without
// parameters in self-attention. The U-Net computes the same as before. Errors: ValueError for
// another freeze_model; those of nn::SetAttnProcessor, and nothing is changed then.
void AddCustomDiffusion(Layer& unet, std::string_view freeze_model);
// The copies, to be trained.
std::vector<ParameterPtr> CustomDiffusionParameters(Layer& unet);

// A pytorch_custom_diffusion_weights.safetensors as diffusers writes it: the copies by their paths,
// "down_blocks.0...attn2.processor.to_k_custom_diffusion.weight". Errors: ValueError if the U-Net
// has none; FileError.
void SaveCustomDiffusion(const std::filesystem::path& path, Layer& unet);
// Sets the processors that the file is of, and their weights; modules that it does not name get
// processors without parameters. Errors: FileError naming the file and all tensors that do not fit;
// nothing is changed then.
void LoadCustomDiffusion(const std::filesystem::path& path, Layer& unet);

}  // namespace calotype
