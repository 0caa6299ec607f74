// Custom Diffusion: fine-tuning of nothing but a U-Net's cross-attention and new words. The
// projections get copies in the attention processors, which train, are files of their own, and take
// the place of the projections; a new word ("<new1>", a modifier token) is an embedding that CLIP
// reads for it, which trains too. Kumari et al. 2022, arXiv:2212.04488. With a word alone it is
// Textual Inversion, Gal et al. 2022, arXiv:2208.01618.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "core/parameter.h"
#include "layers/layer.h"

namespace calotype {

class DiffusionModel;

// What diffusers calls the file of the copies.
constexpr const char* kCustomDiffusionFile = "pytorch_custom_diffusion_weights.safetensors";

// Sets CustomDiffusionAttnProcessor2_0 in every attention module: with copies of to_k and to_v in
// cross-attention (freeze_model "crossattn_kv"), of to_q and to_out.0 too ("crossattn"), without
// parameters in self-attention. The U-Net computes the same as before. Errors: ValueError for
// another freeze_model; those of nn::SetAttnProcessor, and nothing is changed then.
void AddCustomDiffusion(Layer& unet, std::string_view freeze_model);
// The copies, to be trained.
std::vector<ParameterPtr> CustomDiffusionParameters(Layer& unet);

// A pytorch_custom_diffusion_weights.safetensors: the copies by their paths,
// "down_blocks.0...attn2.processor.to_k_custom_diffusion.weight", and for each module without
// copies an empty tensor "down_blocks.0...attn1.processor", without which diffusers does not load
// the file (and which it does not write itself). Errors: ValueError if the U-Net has no copies;
// FileError.
void SaveCustomDiffusion(const std::filesystem::path& path, Layer& unet);
// Sets the processors that the file is of, and their weights; modules that it does not name get
// processors without parameters. Errors: FileError naming the file and all tensors that do not fit;
// nothing is changed then.
void LoadCustomDiffusion(const std::filesystem::path& path, Layer& unet);

// A word and what CLIP reads for it.
struct WordEmbedding {
  std::filesystem::path source;  // for messages
  std::string word;
  Tensor
      embeddings;  // f32 [n, context_width]; n is 1 but for Textual Inversions of several vectors
};
// A file of one tensor {word: [width] or [n, width]}, as diffusers writes and reads Textual
// Inversions. Errors: FileError.
WordEmbedding ReadWordEmbedding(const std::filesystem::path& path);
void SaveWordEmbedding(const std::filesystem::path& path, const std::string& word,
                       const Tensor& embedding);

// The result of a training as files.
struct CustomDiffusion {
  std::filesystem::path source;          // of the copies
  std::map<std::string, Tensor> copies;  // as in the file, without empty tensors
  std::vector<WordEmbedding> words;
};
// A folder with kCustomDiffusionFile, embeddings of words (every other .safetensors file), or both;
// or one such file. Of files with the same word learned_embeds.safetensors counts. Errors:
// FileError naming the file, also for a folder without them, for two files with the same word, and
// for a .bin, a pickle, without a .safetensors of that name.
CustomDiffusion ReadCustomDiffusion(const std::filesystem::path& path);
// Whether the copies fit; needs no weights. Errors: as LoadCustomDiffusion.
void CheckCustomDiffusion(const CustomDiffusion& custom, Layer& unet);
// Writes the copies over the projections that they take the place of: the same prediction as with
// the processors, which are only needed for training. Errors: as CheckCustomDiffusion.
void MergeCustomDiffusion(const CustomDiffusion& custom, Layer& unet);
// DiffusionModel::AddToken for all words. Errors: FileError naming the file of a word that the
// model has, or whose embedding does not fit; words before it are there then.
void AddWords(const CustomDiffusion& custom, DiffusionModel& model);

}  // namespace calotype
