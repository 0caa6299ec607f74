#include "pipelines/lora_names.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <vector>

#include "core/error.h"
#include "io/file.h"

namespace calotype {
namespace {

constexpr std::string_view kUNet = "unet.", kTextEncoder = "text_encoder.";

std::string Flat(std::string_view path) {
  std::string flat(path);
  std::ranges::replace(flat, '.', '_');
  return flat;
}

std::vector<std::string_view> SplitPath(std::string_view path) {
  std::vector<std::string_view> parts;
  for (size_t begin = 0; begin <= path.size();) {
    size_t end = std::min(path.find('.', begin), path.size());
    parts.push_back(path.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

// Below a resnet.
std::string_view SgmResnetPart(std::string_view part) {
  constexpr std::array<std::pair<std::string_view, std::string_view>, 4> kParts = {{
      {"conv1", "in_layers_2"},
      {"conv2", "out_layers_3"},
      {"time_emb_proj", "emb_layers_1"},
      {"conv_shortcut", "skip_connection"},
  }};
  for (auto [ours, theirs] : kParts) {
    if (part == ours) return theirs;
  }
  return part;
}

}  // namespace

std::string KohyaName(std::string_view path) {
  if (path.starts_with(kUNet)) return "lora_unet_" + Flat(path.substr(kUNet.size()));
  Check(path.starts_with(kTextEncoder), "LoRA: {} is neither below unet. nor text_encoder.", path);
  return "lora_te_" + Flat(path.substr(kTextEncoder.size()));
}

std::optional<std::string> SgmName(std::string_view path, int64_t layers_per_block) {
  if (!path.starts_with(kUNet)) return std::nullopt;
  std::vector<std::string_view> parts = SplitPath(path.substr(kUNet.size()));
  auto number = [&](size_t i) -> int64_t {
    int64_t value = 0;
    for (char c : parts.at(i)) value = value * 10 + (c - '0');
    return value;
  };
  auto is_number = [&](size_t i) {
    return i < parts.size() && !parts[i].empty() && parts[i].size() < 6 &&
           std::ranges::all_of(parts[i], [](unsigned char c) { return std::isdigit(c); });
  };
  auto rest = [&](size_t from) {
    std::string text;
    for (size_t i = from; i < parts.size(); ++i) {
      text += "_";
      text += parts[1 + (parts[0] == "mid_block" ? 0 : 1)] == "resnets" ? SgmResnetPart(parts[i])
                                                                        : parts[i];
    }
    return text;
  };
  if (path == "unet.conv_in") return "lora_unet_input_blocks_0_0";
  if (path == "unet.conv_out") return "lora_unet_out_2";
  if (path == "unet.time_embedding.linear_1") return "lora_unet_time_embed_0";
  if (path == "unet.time_embedding.linear_2") return "lora_unet_time_embed_2";
  const int64_t down = layers_per_block + 1, up = layers_per_block + 1;
  if (parts[0] == "mid_block" && parts.size() > 3 && is_number(2)) {
    // resnet, attention, resnet
    int64_t index = parts[1] == "resnets" ? 2 * number(2) : 1 + 2 * number(2);
    return fmt::format("lora_unet_middle_block_{}{}", index, rest(3));
  }
  if (parts.size() < 5 || !is_number(1) || !is_number(3)) return std::nullopt;
  int64_t block = number(1), layer = number(3);
  int inner = parts[2] == "resnets" ? 0 : parts[2] == "attentions" ? 1 : 2;
  if (parts[0] == "down_blocks") {
    if (inner == 2)  // downsamplers.0.conv
      return fmt::format("lora_unet_input_blocks_{}_0_op", (block + 1) * down);
    return fmt::format("lora_unet_input_blocks_{}_{}{}", block * down + layer + 1, inner, rest(4));
  }
  if (parts[0] == "up_blocks") {
    if (inner == 2)  // upsamplers.0.conv, behind the last layer; see LoraNames for blocks without
                     // attention
      return fmt::format("lora_unet_output_blocks_{}_2_conv", block * up + layers_per_block);
    return fmt::format("lora_unet_output_blocks_{}_{}{}", block * up + layer, inner, rest(4));
  }
  return std::nullopt;
}

LoraNames::LoraNames(std::span<const std::string> paths) {
  // Resnets of a down block.
  int64_t layers = 1;
  auto has = [&](const std::string& prefix) {
    return std::ranges::any_of(paths, [&](const std::string& p) { return p.starts_with(prefix); });
  };
  while (has(fmt::format("unet.down_blocks.0.resnets.{}.", layers))) ++layers;
  for (size_t i = 0; i < paths.size(); ++i) {
    const std::string& path = paths[i];
    auto add = [&](const std::string& name) { names_.emplace(name, i); };
    add(path);
    std::string kohya = KohyaName(path);
    add(kohya);
    if (path.starts_with(kTextEncoder)) {
      std::string below = path.substr(kTextEncoder.size());
      add("lora_te1_" + Flat(below));
      // Newer text encoders of transformers have no such prefix.
      std::string_view stem = "text_model.";
      if (below.starts_with(stem)) {
        std::string bare = below.substr(stem.size());
        add(std::string(kTextEncoder) + bare);
        add("lora_te_" + Flat(bare));
        add("lora_te1_" + Flat(bare));
      }
    } else if (auto sgm = SgmName(path, layers)) {
      add(*sgm);
      // Without attentions the upsampler is the second of its block.
      if (size_t at = path.find(".upsamplers."); at != std::string::npos) {
        bool attends = has(path.substr(0, at) + ".attentions.");
        if (!attends) add(sgm->replace(sgm->size() - 6, 6, "1_conv"));
      }
    }
  }
}

std::optional<size_t> LoraNames::Find(const std::string& name) const {
  auto it = names_.find(name);
  return it == names_.end() ? std::nullopt : std::optional(it->second);
}

std::string Shown(std::string_view name) {
  const bool plain = std::ranges::all_of(name, [](char c) { return c > 0x20 && c < 0x7f; });
  return plain ? std::string(name) : Quoted(name);
}

std::string LoraNameGroup(std::string_view name) {
  std::string group;
  for (size_t i = 0; i < name.size();) {
    bool starts = i == 0 || name[i - 1] == '.' || name[i - 1] == '_';
    size_t end = i;
    while (end < name.size() && std::isdigit(static_cast<unsigned char>(name[end]))) ++end;
    bool ends = end == name.size() || name[end] == '.' || name[end] == '_';
    if (starts && ends && end > i) {
      group += "*";
      i = end;
    } else {
      group += name[i++];
    }
  }
  return group;
}

}  // namespace calotype
