// LoRAs named in prompts, as AUTOMATIC1111's web UI writes them: "a lighthouse <lora:style:0.8>".
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace calotype {

struct LoraTag {
  std::string name;
  double weight = 1;
  bool operator==(const LoraTag&) const = default;
};

// Takes the tags <lora:NAME> and <lora:NAME:WEIGHT> out of a prompt and returns them in order, of a
// name that is there twice the first. Errors: ValueError for a tag without an end or a name, or
// whose weight is no finite number; UnsupportedError for one with several weights.
std::vector<LoraTag> TakeLoraTags(std::string& prompt);

// The file that a name stands for: FOLDER/NAME.safetensors. Errors: ValueError for a name with a
// slash or that begins with a dot; FileError naming the file if there is none.
std::filesystem::path LoraTagFile(const std::filesystem::path& folder, std::string_view name);

}  // namespace calotype
