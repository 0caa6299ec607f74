#include "pipelines/lora_tags.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "core/error.h"
#include "io/file.h"

namespace calotype {

std::vector<LoraTag> TakeLoraTags(std::string& prompt) {
  constexpr std::string_view kBegin = "<lora:";
  std::vector<LoraTag> tags;
  for (size_t begin; (begin = prompt.find(kBegin)) != std::string::npos;) {
    const size_t end = prompt.find('>', begin);
    Check(end != std::string::npos, "prompt: the tag {} has no end",
          Quoted(std::string_view(prompt).substr(begin)));
    const std::string text = prompt.substr(begin, end + 1 - begin);
    LoraTag tag{.name = prompt.substr(begin + kBegin.size(), end - begin - kBegin.size())};
    prompt.erase(begin, end + 1 - begin);
    if (const size_t colon = tag.name.find(':'); colon != std::string::npos) {
      const std::string number = tag.name.substr(colon + 1);
      tag.name.resize(colon);
      Check<UnsupportedError>(number.find(':') == number.npos,
                              "prompt: the tag {} has several weights; one is supported",
                              Quoted(text));
      const char* last = number.data() + number.size();
      const auto [stop, error] = std::from_chars(number.data(), last, tag.weight);
      Check(error == std::errc() && stop == last && std::isfinite(tag.weight),
            "prompt: the weight of the tag {} is no number", Quoted(text));
    }
    Check(!tag.name.empty(), "prompt: the tag {} has no name", Quoted(text));
    if (std::ranges::find(tags, tag.name, &LoraTag::name) == tags.end()) tags.push_back(tag);
  }
  return tags;
}

std::filesystem::path LoraTagFile(const std::filesystem::path& folder, std::string_view name) {
  Check(!name.empty() && name[0] != '.' && name.find('/') == name.npos,
        "prompt: {} is no name of a LoRA", Quoted(name));
  const std::filesystem::path path = folder / (std::string(name) + ".safetensors");
  std::error_code ignored;
  Check<FileError>(std::filesystem::exists(path, ignored), "{}: no such file, for <lora:{}>",
                   path.string(), name);
  return path;
}

}  // namespace calotype
