// Stable Diffusion 1.x and 2.x models between the two layouts in which they are passed around: one
// .safetensors file with the original names, and the folder of diffusers. Weights are renamed (see
// models/original_keys.h), never computed with: back and forth gives the same bits.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "io/safetensors.h"

namespace calotype {

struct ConvertOptions {
  // A file becomes a folder, a folder a file. `out` must not exist; it appears complete or not at
  // all.
  std::filesystem::path in, out;
  // Of all tensors that are written; empty: that in which each of them is read.
  std::optional<FloatFormat> dtype;
  // A file has no configurations, unless Calotype wrote it. They come from the parts unet, vae,
  // text_encoder, scheduler and tokenizer of this folder, as far as it has them (one at least);
  // then from the file's metadata; then from names and shapes of the tensors and what SD 1.x and
  // 2.x have in common.
  std::filesystem::path config;
  // A folder with vocab.json and merges.txt, or tokenizer.json, copied to `out`. If it has no
  // tokenizer_config.json one is written: CLIP's tokens, the text encoder's length, and "!" as
  // padding for SD 2.x.
  std::filesystem::path tokenizer;
  std::string prediction_type;   // epsilon or v_prediction; SD 2.x files do not say which it is
  bool allow_unmatched = false;  // leave out tensors that no model has, instead of failing
};

// Returns what was done, a line each. Errors: FileError naming the file and all tensors that are
// missing, unknown or of a wrong shape; ValueError for an option; UnsupportedError for SDXL and
// other layouts, pickled files (.ckpt) and U-Nets that the original layout has no names for.
std::vector<std::string> ConvertModel(const ConvertOptions& options);

}  // namespace calotype
