// LoRA files: low-rank changes of a model's weights as safetensors, in the four spellings that are
// in use. A file is read into a LoraFile without knowing the model; pipelines/lora.h applies it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/tensor.h"

namespace calotype {

// How a file names its tensors; P is the path of an attention module, M that of any layer.
enum class LoraDialect : uint8_t {
  kProcessor,  // diffusers up to 0.20: [unet.]P.processor.to_q_lora.down.weight; text encoder:
               // text_encoder.P.to_q_lora.down.weight
  kDiffusers,  // diffusers' scripts today: unet.M.lora.down.weight,
               // text_encoder.M.lora_linear_layer.down.weight
  kPeft,       // [unet.][base_model.model.]M.lora_A.weight, .lora_B.weight, or .lora_A.NAME.weight
  kKohya,      // kohya, A1111: lora_unet_M.lora_down.weight, .lora_up.weight, .alpha with _ for
               // the dots of M; text encoder lora_te_ or lora_te1_
};
std::string_view NameOf(LoraDialect dialect);  // "processor", "diffusers", "peft", "kohya"
// Errors: ValueError naming the known ones.
LoraDialect ParseLoraDialect(std::string_view name);

// W += alpha / rank up down, without the fraction if there is no alpha.
struct LoraModule {
  Tensor down;  // f32 [rank, in], or [rank, in, k, k] for a convolution
  Tensor up;    // f32 [out, rank], or [out, rank, 1, 1]
  std::optional<double> alpha;
  int64_t rank() const { return down.shape()[0]; }
  double scale() const { return alpha ? *alpha / static_cast<double>(rank()) : 1; }
};

struct LoraFile {
  std::string source = "LoRA";  // path of the file, for messages
  LoraDialect dialect = LoraDialect::kPeft;
  // By the path of the layer: "unet.down_blocks.0...attn1.to_q",
  // "text_encoder.text_model.encoder.layers.0.self_attn.q_proj". The dots of a kohya file are lost;
  // its modules have the names of the file, "lora_unet_down_blocks_0_...attn1_to_q".
  std::map<std::string, LoraModule> modules;
  std::vector<std::string> unknown;  // tensors that belong to no low-rank term
  std::map<std::string, std::string> metadata;
};

// Reads a file, or the pytorch_lora_weights.safetensors in a folder. Alphas come from tensors, from
// the metadata lora_adapter_metadata of diffusers, or from PEFT's adapter_config.json beside an
// adapter_model.safetensors. A file whose tensors name neither unet. nor text_encoder. is one of
// the U-Net. Errors: FileError naming file and tensor, for one half of a pair, shapes that do not
// fit each other or values that are not finite; UnsupportedError for other methods (hada_, lokr_,
// oft_, DoRA, full differences, CP decompositions, biases).
LoraFile LoadLora(const std::filesystem::path& path);
// The same for a file in memory; `name` stands for the path in messages.
LoraFile ParseLora(std::string_view bytes, const std::string& name);

// Writes a file as kohya (alphas always there, = rank if unknown), peft or diffusers (alphas in the
// metadata). Modules must be named by paths: see ResolveLora. Errors: ValueError for other names or
// for kProcessor; FileError.
void SaveLora(const std::filesystem::path& path, const LoraFile& lora, LoraDialect dialect);

}  // namespace calotype
