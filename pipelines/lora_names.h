// What LoRA files call the layers of a model.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace calotype {

// "unet.down_blocks.0.conv" -> "lora_unet_down_blocks_0_conv"; text_encoder. -> lora_te_.
std::string KohyaName(std::string_view path);

// The flat name in the numbering of the original U-Net's blocks (input_blocks, middle_block,
// output_blocks), as files made with Stability's code have it: "unet.down_blocks.0.resnets.0.conv1"
// -> "lora_unet_input_blocks_1_0_in_layers_2". layers_per_block: resnets of a down block. Nothing
// for a path of other parts.
std::optional<std::string> SgmName(std::string_view path, int64_t layers_per_block);

// All spellings of the layers of one model.
class LoraNames {
 public:
  // Paths begin with "unet." or "text_encoder.".
  explicit LoraNames(std::span<const std::string> paths);
  // The index of the path that a file calls `name`, with dots or without, or nothing.
  std::optional<size_t> Find(const std::string& name) const;

 private:
  std::map<std::string, size_t> names_;
};

// down_blocks.0.attentions.1.to_q -> down_blocks.*.attentions.*.to_q, the same with _: layers that
// differ in their numbers alone are one group of a report.
std::string LoraNameGroup(std::string_view name);

// A file's name of a layer or tensor for messages: as it is, or Quoted if it has other characters
// than printable ASCII.
std::string Shown(std::string_view name);

}  // namespace calotype
