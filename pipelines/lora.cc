#include "pipelines/lora.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <filesystem>

#include "core/parallel.h"
#include "io/file.h"
#include "models/clip_text_model.h"
#include "models/unet_2d_condition.h"
#include "pipelines/diffusion_model.h"
#include "pipelines/lora_names.h"

namespace calotype {
namespace {

// Modules of a file and the layers that they belong to.
struct Match {
  std::vector<std::pair<const LoraModule*, size_t>> pairs;  // with the index of the target
  LoraReport report;
};

// True if up down is a change of the weight.
bool Fits(const LoraModule& m, const Shape& weight) {
  const Shape& down = m.down.shape();
  int64_t rank = m.rank(), kernel = weight.rank() == 4 ? weight[2] : 1;
  bool same_kernel = down.rank() == 2 ? kernel == 1 : down[2] == kernel && down[3] == kernel;
  return same_kernel && down[1] == weight[1] && m.up.elements() == weight[0] * rank;
}

std::vector<std::string> Paths(std::span<const LoraTarget> targets) {
  std::vector<std::string> paths;
  for (const LoraTarget& target : targets) paths.push_back(target.path);
  return paths;
}

constexpr size_t kGroupsShown = 12;  // of a kind of mismatch

// With `shapes` false only the names are compared.
Match MatchLora(std::span<const LoraTarget> targets, const LoraNames& names, const LoraFile& lora,
                bool shapes = true) {
  Match match;
  std::vector<bool> taken(targets.size());
  LoraReport& report = match.report;
  report.modules = static_cast<int64_t>(lora.modules.size());
  for (const auto& [name, module] : lora.modules) {
    std::optional<size_t> index = names.Find(name);
    if (!index) {
      report.unmatched.push_back(Shown(name));
    } else if (shapes && !Fits(module, targets[*index].weight)) {
      report.wrong_shape.push_back(fmt::format("{}: down {}, up {}, the layer's weight {}",
                                               Shown(name), module.down.shape(), module.up.shape(),
                                               targets[*index].weight));
    } else if (taken[*index]) {
      report.twice.push_back(fmt::format("{}: {}", Shown(name), targets[*index].path));
    } else {
      taken[*index] = true;
      match.pairs.emplace_back(&module, *index);
    }
  }
  report.matched = static_cast<int64_t>(match.pairs.size());
  for (const std::string& name : lora.unknown) report.unmatched.push_back(Shown(name));
  return match;
}

constexpr const char* kAllowHint =
    "\n(allow_unmatched, on the command line --allow-unmatched, leaves these out)";

// `hint`: what to do about layers that are not there.
void CheckMatch(const LoraReport& report, const LoraFile& lora, const LoraOptions& options,
                const char* hint = kAllowHint) {
  bool only_unmatched = report.matched > 0 && report.wrong_shape.empty() && report.twice.empty();
  Check<FileError>(report.complete() || (options.allow_unmatched && only_unmatched),
                   "{}: the LoRA does not fit the model: {}{}", lora.source, report.ToString(),
                   only_unmatched ? hint : "");
}

Match CheckedMatch(std::span<const LoraTarget> targets, const LoraFile& lora,
                   const LoraOptions& options) {
  Match match = MatchLora(targets, LoraNames(Paths(targets)), lora);
  CheckMatch(match.report, lora, options);
  return match;
}

// sum[o, :] += factor up[o, :] down, all rows.
void AddProduct(const LoraModule& m, double factor, std::span<double> sum) {
  int64_t rank = m.rank(), width = m.down.elements() / rank, rows = m.up.elements() / rank;
  const float *down = m.down.data(), *up = m.up.data();
  ParallelFor(rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      double* row = sum.data() + o * width;
      for (int64_t r = 0; r < rank; ++r) {
        double u = factor * up[o * rank + r];
        for (int64_t i = 0; i < width; ++i) row[i] += u * down[r * width + i];
      }
    }
  });
}

// FNV-1a of the bits of an f32 tensor.
uint64_t Hash(const Tensor& tensor) {
  uint64_t hash = 1469598103934665603u;
  for (float v : tensor.values()) hash = (hash ^ std::bit_cast<uint32_t>(v)) * 1099511628211u;
  return hash;
}

// Every layer that has a term `name`.
template <class F>
int64_t ForEachLora(const LoraModel& model, const std::string& name, F&& f) {
  int64_t count = 0;
  for (const LoraTarget& target : LoraTargets(model)) {
    if (nn::LoRALayer* lora = target.layer->FindLoRA(name)) f(target, *lora), ++count;
  }
  return count;
}

bool IsPathEnd(std::string_view path, std::string_view end) {
  return path == end || (path.size() > end.size() && path.ends_with(end) &&
                         path[path.size() - end.size() - 1] == '.');
}

}  // namespace

LoraModel LoraModelOf(DiffusionModel& model) {
  Layer* text_encoder = model.text_encoder();
  if (!text_encoder) text_encoder = model.caption_encoder();
  return {&model.unet(), text_encoder};
}

std::vector<LoraTarget> LoraTargets(const LoraModel& model) {
  std::vector<LoraTarget> targets;
  auto add = [&](Layer* part, const char* prefix) {
    if (!part) return;
    for (const auto& [path, layer] : nn::LoRACompatibleLayers(*part)) {
      Check(!IsPathEnd(path, "to_qkv") && !IsPathEnd(path, "to_kv"),
            "LoRA: {}{} are fused projections, which would not see the change; unfuse them first",
            prefix, path);
      targets.push_back({part, prefix + path, layer, layer->ParameterShapes().at(0).second});
    }
  };
  add(model.unet, "unet.");
  add(model.text_encoder, "text_encoder.");
  return targets;
}

std::string LoraReport::ToString() const {
  std::string text = fmt::format("{} of {} modules match", matched, modules);
  auto group = [&](std::string_view title, const std::vector<std::string>& entries) {
    if (entries.empty()) return;
    std::map<std::string, std::vector<const std::string*>> groups;
    for (const std::string& entry : entries)
      groups[LoraNameGroup(entry.substr(0, entry.find(':')))].push_back(&entry);
    text += fmt::format("\n{} ({}):", title, entries.size());
    size_t shown = 0;
    for (const auto& [name, members] : groups) {
      if (shown == kGroupsShown && groups.size() > kGroupsShown + 1) {
        text += fmt::format("\n  and {} more kinds of layers", groups.size() - shown);
        break;
      }
      ++shown;
      text += members.size() == 1 ? "\n  " + *members[0]
                                  : fmt::format("\n  {} times {}, the first: {}", members.size(),
                                                name, *members[0]);
    }
  };
  group("no such layer", unmatched);
  group("wrong shape", wrong_shape);
  group("twice", twice);
  return text;
}

LoraReport CheckLora(const LoraModel& model, const LoraFile& lora) {
  std::vector<LoraTarget> targets = LoraTargets(model);
  return MatchLora(targets, LoraNames(Paths(targets)), lora).report;
}

namespace {

LoraFile Renamed(const LoraFile& lora, const Match& match, std::span<const LoraTarget> targets) {
  LoraFile result = lora;
  result.modules.clear();
  result.unknown.clear();
  for (auto [module, index] : match.pairs) result.modules[targets[index].path] = *module;
  return result;
}

}  // namespace

LoraFile ResolveLora(const LoraModel& model, const LoraFile& lora, const LoraOptions& options) {
  std::vector<LoraTarget> targets = LoraTargets(model);
  return Renamed(lora, CheckedMatch(targets, lora, options), targets);
}

LoraFile ResolveLora(const LoraFile& lora) {
  // The defaults are Stable Diffusion's; without values the layers take no memory. 2.x has deeper
  // text encoders.
  UNet2DConditionModel unet{UNet2DConditionConfig{}};
  CLIPTextConfig text;
  text.num_hidden_layers = 24;
  CLIPTextModel text_encoder(text);
  std::vector<LoraTarget> targets = LoraTargets({&unet, &text_encoder});
  Match match = MatchLora(targets, LoraNames(Paths(targets)), lora, /*shapes=*/false);
  CheckMatch(match.report, lora, {},
             "\n(these are not layers of Stable Diffusion; name the model that they are of)");
  return Renamed(lora, match, targets);
}

WeightedLora LoadWeightedLora(std::string_view text) {
  std::string path(text);
  double weight = 1;
  size_t colon = text.rfind(':');
  std::error_code ignored;
  // A file whose own name has a colon is a file.
  if (colon != text.npos && !std::filesystem::exists(path, ignored)) {
    std::string_view number = text.substr(colon + 1);
    auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), weight);
    Check(error == std::errc() && end == number.data() + number.size() && std::isfinite(weight),
          "LoRA: the weight '{}' of {} is no number", number, text.substr(0, colon));
    path = std::string(text.substr(0, colon));
  }
  return {LoadLora(path), weight};
}

// ---------------------------------------------------------------- merged

MergedLora MergeLora(const LoraModel& model, std::span<const WeightedLora> loras,
                     const LoraOptions& options) {
  std::vector<LoraTarget> targets = LoraTargets(model);
  LoraNames names(Paths(targets));
  MergedLora merged;
  merged.kept_ = options.keep_originals;
  // All files are checked before anything changes.
  std::vector<std::vector<std::pair<const LoraModule*, double>>> terms(targets.size());
  for (const WeightedLora& lora : loras) {
    Check(std::isfinite(lora.weight), "LoRA: the weight of {} is not finite", lora.file.source);
    Match match = MatchLora(targets, names, lora.file);
    CheckMatch(match.report, lora.file, options);
    for (auto [module, index] : match.pairs)
      terms[index].emplace_back(module, lora.weight * module->scale());
    merged.reports_.push_back(std::move(match.report));
  }
  for (size_t t = 0; t < targets.size(); ++t) {
    if (terms[t].empty() || (options.only && targets[t].part != options.only)) continue;
    ParameterPtr weight = targets[t].layer->FindParameter("weight");
    std::vector<double> sum(static_cast<size_t>(weight->value().elements()));
    for (auto [module, factor] : terms[t]) AddProduct(*module, factor, sum);
    if (merged.kept_) merged.originals_.push_back({weight, weight->value().Clone(), 0});
    std::span<float> values = weight->Write().values();
    for (size_t i = 0; i < sum.size(); ++i)
      values[i] = static_cast<float>(double{values[i]} + sum[i]);
    if (merged.kept_) merged.originals_.back().merged = Hash(weight->value());
    ++merged.weights_;
  }
  return merged;
}

void MergedLora::Unmerge() {
  Check(kept_, "LoRA: the weights before the merge were not kept, so it cannot be undone");
  for (const Original& original : originals_) {
    Check(Hash(original.parameter->value()) == original.merged,
          "LoRA: {} has been changed since the merge, so the merge cannot be undone",
          original.parameter->name());
  }
  for (Original& original : originals_) original.parameter->Write().CopyFrom(original.value);
  originals_.clear();
  weights_ = 0;
}

// ---------------------------------------------------------------- attached

LoraReport AttachLora(const LoraModel& model, const WeightedLora& lora, const std::string& name,
                      const LoraOptions& options) {
  std::vector<LoraTarget> targets = LoraTargets(model);
  Check(std::isfinite(lora.weight), "LoRA: the weight of {} is not finite", lora.file.source);
  Match match = CheckedMatch(targets, lora.file, options);
  for (const LoraTarget& target : targets) {
    Check(!target.layer->FindLoRA(name), "LoRA: {} has a term '{}' already", target.path, name);
  }
  for (auto [module, index] : match.pairs) {
    nn::LoRALayer& term = targets[index].layer->AddLoRA(name, module->rank(), module->alpha);
    auto set = [&](const char* parameter, const Tensor& value) {
      Tensor& storage = term.FindParameter(parameter)->Write();
      storage.CopyFrom(value.Reshape(storage.shape()));
    };
    set("down.weight", module->down);
    set("up.weight", module->up);
    term.SetScale(lora.weight);
  }
  return match.report;
}

int64_t AddLora(const LoraModel& model, const LoraConfig& config, const std::string& name) {
  Check(config.rank > 0, "LoRA: rank {} must be positive", config.rank);
  Check(std::isfinite(config.alpha.value_or(1)), "LoRA: alpha must be finite");
  std::vector<LoraTarget> targets = LoraTargets(model);
  std::vector<nn::LoRACompatible*> chosen;
  auto choose = [&](std::string_view component, const std::vector<std::string>& ends) {
    std::vector<bool> used(ends.size());
    for (const LoraTarget& target : targets) {
      if (!target.path.starts_with(component)) continue;
      bool match = false;
      for (size_t i = 0; i < ends.size(); ++i) {
        if (!IsPathEnd(target.path, ends[i])) continue;
        match = used[i] = true;
      }
      if (!match) continue;
      Check(!target.layer->FindLoRA(name), "LoRA: {} has a term '{}' already", target.path, name);
      chosen.push_back(target.layer);
    }
    for (size_t i = 0; i < ends.size(); ++i) {
      Check(used[i], "LoRA: target '{}' is the end of no layer's path below {} of {} layers",
            ends[i], component, std::ranges::count_if(targets, [&](const auto& t) {
              return t.path.starts_with(component);
            }));
    }
  };
  choose("unet.", config.targets);
  choose("text_encoder.", config.text_encoder_targets);
  Check(!chosen.empty(), "LoRA: no target");
  for (nn::LoRACompatible* layer : chosen) {
    layer->AddLoRA(name, config.rank, config.alpha).Initialize(config.seed);
  }
  return static_cast<int64_t>(chosen.size());
}

void SetLoraWeight(const LoraModel& model, double weight, const std::string& name) {
  Check(std::isfinite(weight), "LoRA: weight {} must be finite", weight);
  int64_t count = ForEachLora(model, name, [&](const auto&, auto& lora) { lora.SetScale(weight); });
  Check(count > 0, "LoRA: the model has no terms '{}'", name);
}

int64_t DetachLora(const LoraModel& model, const std::string& name) {
  return ForEachLora(model, name,
                     [&](const auto& target, auto&) { target.layer->RemoveLoRA(name); });
}

std::vector<ParameterPtr> LoraParameters(const LoraModel& model, const std::string& name) {
  std::vector<ParameterPtr> parameters;
  ForEachLora(model, name, [&](const auto&, auto& lora) {
    for (const ParameterPtr& p : lora.NamedParameters()) parameters.push_back(p);
  });
  return parameters;
}

LoraFile CollectLora(const LoraModel& model, const std::string& name) {
  LoraFile file{.source = "the model's LoRA " + name};
  ForEachLora(model, name, [&](const auto& target, auto& lora) {
    file.modules[target.path] = {lora.FindParameter("down.weight")->value(),
                                 lora.FindParameter("up.weight")->value(), lora.network_alpha()};
  });
  return file;
}

}  // namespace calotype
