#include "models/original_keys.h"

#include <algorithm>
#include <utility>

#include "models/unet_2d_condition.h"

namespace calotype {

namespace {

// A module (or a tensor) by its path in diffusers' model and in the original file.
struct Rule {
  std::string ours, original;
  bool convolution = false;  // its weight, see OriginalKey
};

// ---------------------------------------------------------------- U-Net

void AddUNetResnet(std::vector<Rule>& rules, const std::string& ours, const std::string& original) {
  for (auto [name, old_name] : {std::pair("norm1", "in_layers.0"),
                                {"conv1", "in_layers.2"},
                                {"time_emb_proj", "emb_layers.1"},
                                {"norm2", "out_layers.0"},
                                {"conv2", "out_layers.3"},
                                {"conv_shortcut", "skip_connection"}}) {
    rules.push_back({fmt::format("{}.{}", ours, name), fmt::format("{}.{}", original, old_name)});
  }
}

// The original numbers every layer of the down path with its attention, and every downsampler, as
// one of `input_blocks`; every layer of the up path, with attention and upsampler, as one of
// `output_blocks`. Modules that a config does not have give rules that match nothing.
std::vector<Rule> UNetRules(const UNet2DConditionConfig& c) {
  std::vector<Rule> rules = {{"time_embedding.linear_1", "time_embed.0"},
                             {"time_embedding.linear_2", "time_embed.2"},
                             {"conv_in", "input_blocks.0.0"}};
  size_t blocks = c.block_out_channels.size();
  int64_t n = 1;
  for (size_t i = 0; i < blocks; ++i) {
    for (int64_t j = 0; j < c.Of(c.layers_per_block, i); ++j, ++n) {
      AddUNetResnet(rules, fmt::format("down_blocks.{}.resnets.{}", i, j),
                    fmt::format("input_blocks.{}.0", n));
      rules.push_back(
          {fmt::format("down_blocks.{}.attentions.{}", i, j), fmt::format("input_blocks.{}.1", n)});
    }
    if (i + 1 == blocks) continue;
    rules.push_back({fmt::format("down_blocks.{}.downsamplers.0.conv", i),
                     fmt::format("input_blocks.{}.0.op", n++)});
  }
  AddUNetResnet(rules, "mid_block.resnets.0", "middle_block.0");
  rules.push_back({"mid_block.attentions.0", "middle_block.1"});
  AddUNetResnet(rules, "mid_block.resnets.1", "middle_block.2");
  n = 0;
  for (size_t i = 0; i < blocks; ++i) {
    bool attends = c.up_block_types[i].find("CrossAttn") != std::string::npos;
    for (int64_t j = 0; j <= c.Of(c.layers_per_block, blocks - 1 - i); ++j, ++n) {
      AddUNetResnet(rules, fmt::format("up_blocks.{}.resnets.{}", i, j),
                    fmt::format("output_blocks.{}.0", n));
      rules.push_back(
          {fmt::format("up_blocks.{}.attentions.{}", i, j), fmt::format("output_blocks.{}.1", n)});
    }
    rules.push_back({fmt::format("up_blocks.{}.upsamplers.0.conv", i),
                     fmt::format("output_blocks.{}.{}.conv", n - 1, attends ? 2 : 1)});
  }
  rules.push_back({"conv_norm_out", "out.0"});
  rules.push_back({"conv_out", "out.2"});
  return rules;
}

// ---------------------------------------------------------------- autoencoder

void AddVaeResnet(std::vector<Rule>& rules, const std::string& ours, const std::string& original) {
  for (auto [name, old_name] : {std::pair("norm1", "norm1"),
                                {"conv1", "conv1"},
                                {"norm2", "norm2"},
                                {"conv2", "conv2"},
                                {"conv_shortcut", "nin_shortcut"}}) {
    rules.push_back({fmt::format("{}.{}", ours, name), fmt::format("{}.{}", original, old_name)});
  }
}

// The original counts the decoder's blocks from the outermost one.
std::vector<Rule> VaeRules(const AutoencoderKLConfig& c) {
  std::vector<Rule> rules;
  size_t blocks = c.block_out_channels.size();
  for (std::string coder : {"encoder", "decoder"}) {
    bool encoder = coder == "encoder";
    rules.push_back({coder + ".conv_in", coder + ".conv_in"});
    for (size_t i = 0; i < blocks; ++i) {
      std::string ours = fmt::format("{}.{}_blocks.{}", coder, encoder ? "down" : "up", i);
      std::string original = encoder ? fmt::format("encoder.down.{}", i)
                                     : fmt::format("decoder.up.{}", blocks - 1 - i);
      for (int64_t j = 0; j < c.layers_per_block + (encoder ? 0 : 1); ++j) {
        AddVaeResnet(rules, fmt::format("{}.resnets.{}", ours, j),
                     fmt::format("{}.block.{}", original, j));
      }
      rules.push_back({ours + ".downsamplers.0.conv", original + ".downsample.conv"});
      rules.push_back({ours + ".upsamplers.0.conv", original + ".upsample.conv"});
    }
    AddVaeResnet(rules, coder + ".mid_block.resnets.0", coder + ".mid.block_1");
    AddVaeResnet(rules, coder + ".mid_block.resnets.1", coder + ".mid.block_2");
    std::string attention = coder + ".mid_block.attentions.0.", old = coder + ".mid.attn_1.";
    rules.push_back({attention + "group_norm", old + "norm"});
    rules.push_back({attention + "to_q", old + "q", true});
    rules.push_back({attention + "to_k", old + "k", true});
    rules.push_back({attention + "to_v", old + "v", true});
    rules.push_back({attention + "to_out.0", old + "proj_out", true});
    rules.push_back({coder + ".conv_norm_out", coder + ".norm_out"});
    rules.push_back({coder + ".conv_out", coder + ".conv_out"});
  }
  rules.push_back({"quant_conv", "quant_conv"});
  rules.push_back({"post_quant_conv", "post_quant_conv"});
  return rules;
}

// ---------------------------------------------------------------- text encoder

// Rules with the same original tensor make it together, in the order of the rules.
std::vector<Rule> OpenClipRules(const CLIPTextConfig& c) {
  const std::string ours = "text_model.";
  std::vector<Rule> rules = {
      {ours + "embeddings.token_embedding", "token_embedding"},
      {ours + "embeddings.position_embedding.weight", "positional_embedding"}};
  for (int64_t i = 0; i < c.num_hidden_layers; ++i) {
    std::string layer = fmt::format("{}encoder.layers.{}.", ours, i);
    std::string old = fmt::format("transformer.resblocks.{}.", i);
    for (auto [name, old_name] : {std::pair("layer_norm1", "ln_1"),
                                  {"layer_norm2", "ln_2"},
                                  {"mlp.fc1", "mlp.c_fc"},
                                  {"mlp.fc2", "mlp.c_proj"},
                                  {"self_attn.out_proj", "attn.out_proj"}}) {
      rules.push_back({layer + name, old + old_name});
    }
    for (std::string kind : {"weight", "bias"}) {
      for (std::string part : {"q", "k", "v"}) {
        rules.push_back({fmt::format("{}self_attn.{}_proj.{}", layer, part, kind),
                         fmt::format("{}attn.in_proj_{}", old, kind)});
      }
    }
  }
  rules.push_back({ours + "final_layer_norm", "ln_final"});
  return rules;
}

// ---------------------------------------------------------------- the table

using Shapes = std::vector<std::pair<std::string, Shape>>;

std::vector<OriginalKey> Table(const std::vector<Rule>& rules, const Shapes& shapes,
                               std::string_view prefix) {
  std::map<std::string_view, size_t> by_path;
  for (size_t i = 0; i < rules.size(); ++i) by_path[rules[i].ours] = i;
  // The rule whose path is the longest beginning of a name.
  auto find = [&](std::string_view name) {
    for (std::string_view path = name;; path = path.substr(0, path.rfind('.'))) {
      if (auto rule = by_path.find(path); rule != by_path.end()) return rule->second;
      Check<InternalError>(path.find('.') != path.npos, "original layout: no rule for {}", name);
    }
  };
  std::vector<std::pair<size_t, const std::pair<std::string, Shape>*>> order;
  for (const auto& tensor : shapes) order.emplace_back(find(tensor.first), &tensor);
  std::stable_sort(order.begin(), order.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<OriginalKey> keys;
  for (const auto& [index, tensor] : order) {
    const Rule& rule = rules[index];
    const auto& [name, shape] = *tensor;
    std::string original =
        fmt::format("{}{}{}", prefix, rule.original, name.substr(rule.ours.size()));
    if (keys.empty() || keys.back().original != original) {
      keys.push_back({original, {}, rule.convolution && shape.rank() == 2});
    }
    keys.back().parts.push_back({name, shape});
  }
  return keys;
}

// What is wrong with the tensors that `wanted` lists (name, shape), in one error.
void CheckTensors(const Shapes& wanted, const std::map<std::string, Tensor>& tensors) {
  std::vector<std::string> missing, wrong;
  for (const auto& [name, shape] : wanted) {
    auto tensor = tensors.find(name);
    if (tensor == tensors.end()) {
      missing.push_back(name);
    } else if (tensor->second.shape() != shape || tensor->second.dtype() != DType::kF32) {
      wrong.push_back(fmt::format("{} is {} instead of f32{}", name, tensor->second.type(), shape));
    }
  }
  Check(missing.empty() && wrong.empty(), "{} tensors are missing: {}; {} do not fit: {}",
        missing.size(), missing.empty() ? "none" : fmt::format("{}", fmt::join(missing, ", ")),
        wrong.size(), wrong.empty() ? "none" : fmt::format("{}", fmt::join(wrong, ", ")));
}

Tensor Take(std::map<std::string, Tensor>& tensors, const std::string& name) {
  return std::move(tensors.extract(name).mapped());
}

}  // namespace

Shape OriginalKey::OriginalShape() const {
  Shape shape = parts[0].shape;
  if (convolution) return {shape[0], shape[1], 1, 1};
  int64_t rows = 0;
  for (const Part& part : parts) rows += shape.rank() > 0 ? part.shape[0] : 0;
  return parts.size() == 1 ? shape : shape.With(0, rows);
}

std::vector<OriginalKey> OriginalUNetKeys(const UNet2DConditionConfig& config) {
  UNet2DConditionModel model(config);
  for (const auto* types : {&config.down_block_types, &config.up_block_types}) {
    for (const std::string& type : *types) {
      Check<UnsupportedError>(!type.starts_with("Simple") && !type.starts_with("Resnet"),
                              "the original layout has no names for block type {}", type);
    }
  }
  Check<UnsupportedError>(config.mid_block_type == "UNetMidBlock2DCrossAttn",
                          "the original layout has no names for block type {}",
                          config.mid_block_type);
  return Table(UNetRules(config), model.ParameterShapes(), kOriginalUNet);
}

std::vector<OriginalKey> OriginalVaeKeys(const AutoencoderKLConfig& config) {
  return Table(VaeRules(config), AutoencoderKL(config).ParameterShapes(), kOriginalVae);
}

std::vector<OriginalKey> OriginalTextKeys(const CLIPTextConfig& config, TextLayout layout) {
  Shapes shapes = CLIPTextModel(config).ParameterShapes();
  if (layout == TextLayout::kOpenClip) {
    return Table(OpenClipRules(config), shapes, kOriginalOpenClip);
  }
  return Table({{"text_model", "text_model"}}, shapes, kOriginalText);
}

std::map<std::string, Tensor> ToDiffusers(const std::vector<OriginalKey>& keys,
                                          std::map<std::string, Tensor>& tensors) {
  Shapes wanted;
  for (const OriginalKey& key : keys) wanted.emplace_back(key.original, key.OriginalShape());
  CheckTensors(wanted, tensors);
  std::map<std::string, Tensor> result;
  for (const OriginalKey& key : keys) {
    Tensor whole = Take(tensors, key.original);
    if (key.parts.size() == 1) {
      result[key.parts[0].name] = whole.Reshape(key.parts[0].shape);
      continue;
    }
    const float* from = std::as_const(whole).data();
    for (const OriginalKey::Part& part : key.parts) {
      Tensor rows(part.shape);
      std::copy_n(from, rows.elements(), rows.data());
      from += rows.elements();
      result[part.name] = rows;
    }
  }
  return result;
}

std::map<std::string, Tensor> ToOriginal(const std::vector<OriginalKey>& keys,
                                         std::map<std::string, Tensor>& tensors) {
  Shapes wanted;
  for (const OriginalKey& key : keys) {
    for (const OriginalKey::Part& part : key.parts) wanted.emplace_back(part.name, part.shape);
  }
  CheckTensors(wanted, tensors);
  std::map<std::string, Tensor> result;
  for (const OriginalKey& key : keys) {
    if (key.parts.size() == 1) {
      result[key.original] = Take(tensors, key.parts[0].name).Reshape(key.OriginalShape());
      continue;
    }
    Tensor whole(key.OriginalShape());
    float* to = whole.data();
    for (const OriginalKey::Part& part : key.parts) {
      Tensor rows = Take(tensors, part.name);
      to = std::copy_n(std::as_const(rows).data(), rows.elements(), to);
    }
    result[key.original] = whole;
  }
  return result;
}

}  // namespace calotype
