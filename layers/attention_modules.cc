#include "layers/attention_modules.h"

#include <algorithm>
#include <functional>
#include <type_traits>

namespace calotype::nn {

namespace {

constexpr std::string_view kSuffix = ".processor";

void Collect(Layer& layer, size_t skip, std::vector<std::pair<std::string, Attention*>>& modules) {
  if (auto* attention = dynamic_cast<Attention*>(&layer)) {
    modules.emplace_back(attention->path().substr(std::min(skip, attention->path().size())),
                         attention);
    return;
  }
  for (const auto& child : layer.layers()) Collect(*child, skip, modules);
}

bool IsAddedKV(const AttentionProcessor& processor) {
  return NameOf(processor).find("AddedKV") != std::string_view::npos;
}

// Sets the processor that `choose` gives for each module; if one does not fit, all are as before.
void SetEach(const std::vector<std::pair<std::string, Attention*>>& modules,
             const std::function<AttentionProcessor(size_t)>& choose) {
  // A processor that fits changes nothing that another module's check looks at.
  for (size_t i = 0; i < modules.size(); ++i) modules[i].second->CheckProcessor(choose(i));
  for (size_t i = 0; i < modules.size(); ++i) modules[i].second->SetProcessor(choose(i));
}

void CheckNothingIsLost(const std::vector<std::pair<std::string, Attention*>>& modules) {
  for (const auto& [path, module] : modules) {
    Check(
        !module->processor_has_parameters(),
        "attention: the {} of {} has parameters, which would be lost; set another processor first",
        NameOf(module->processor()), path);
  }
}

void SetSlices(Layer& model, const std::function<int64_t(size_t, const Attention&)>& size) {
  auto modules = AttentionModules(model);
  CheckNothingIsLost(modules);
  SetEach(modules, [&](size_t i) -> AttentionProcessor {
    const Attention& module = *modules[i].second;
    int64_t rows = size(i, module);
    Check(rows >= 1 && rows <= module.options().heads,
          "attention: slice size {} for {} must be from 1 to its {} heads", rows, modules[i].first,
          module.options().heads);
    if (module.options().added_kv_proj_dim > 0) return SlicedAttnAddedKVProcessor{rows};
    return SlicedAttnProcessor{rows};
  });
}

}  // namespace

std::vector<std::pair<std::string, Attention*>> AttentionModules(Layer& model) {
  std::vector<std::pair<std::string, Attention*>> modules;
  Collect(model, model.path().empty() ? 0 : model.path().size() + 1, modules);
  return modules;
}

std::vector<std::pair<std::string, AttentionProcessor>> AttnProcessors(Layer& model) {
  std::vector<std::pair<std::string, AttentionProcessor>> processors;
  for (const auto& [path, module] : AttentionModules(model)) {
    processors.emplace_back(path + std::string(kSuffix), module->processor());
  }
  return processors;
}

void SetAttnProcessor(Layer& model, const AttentionProcessor& processor) {
  SetEach(AttentionModules(model), [&](size_t) { return processor; });
}

void SetAttnProcessor(Layer& model, const std::map<std::string, AttentionProcessor>& processors) {
  auto modules = AttentionModules(model);
  std::vector<std::string> missing, unknown;
  std::map<std::string, bool> known;
  for (const auto& [path, module] : modules) {
    std::string name = path + std::string(kSuffix);
    known[name] = true;
    if (!processors.contains(name)) missing.push_back(name);
  }
  for (const auto& [name, processor] : processors) {
    if (!known.contains(name)) unknown.push_back(name);
  }
  Check(missing.empty() && unknown.empty(),
        "attention: the model has {} modules, {} processors are given; missing: {}; of no module: "
        "{}",
        modules.size(), processors.size(), fmt::join(missing, ", "), fmt::join(unknown, ", "));
  SetEach(modules,
          [&](size_t i) { return processors.at(modules[i].first + std::string(kSuffix)); });
}

void SetDefaultAttnProcessor(Layer& model) {
  auto modules = AttentionModules(model);
  auto added = std::ranges::count_if(
      modules, [](const auto& module) { return IsAddedKV(module.second->processor()); });
  Check(added == 0 || added == static_cast<std::ptrdiff_t>(modules.size()),
        "attention: {} of {} modules have AddedKV processors, so no default fits all", added,
        modules.size());
  Check(!modules.empty(), "attention: the model has no attention module");
  CheckNothingIsLost(modules);
  for (const auto& [path, module] : modules) {
    std::string_view name = NameOf(module->processor());
    Check(!name.starts_with("CrossFrame") && !name.starts_with("Fused"),
          "attention: the {} of {} has no default to go back to; set another processor by name",
          name, path);
  }
  SetEach(modules, [&](size_t) -> AttentionProcessor {
    if (added > 0) return AttnAddedKVProcessor{};
    return AttnProcessor{};
  });
}

void SetAttentionSlice(Layer& model, int64_t slice_size) {
  SetSlices(model, [&](size_t, const Attention&) { return slice_size; });
}

void SetAttentionSlice(Layer& model, std::span<const int64_t> slice_sizes) {
  size_t count = AttentionModules(model).size();
  Check(slice_sizes.size() == count, "attention: {} slice sizes for {} modules", slice_sizes.size(),
        count);
  SetSlices(model, [&](size_t i, const Attention&) { return slice_sizes[i]; });
}

void SetAttentionSlice(Layer& model, std::string_view mode) {
  if (mode == "none") {
    auto modules = AttentionModules(model);
    CheckNothingIsLost(modules);
    for (const auto& [path, module] : modules) module->SetDefaultProcessor();
    return;
  }
  Check(mode == "auto" || mode == "max",
        "attention: slice mode '{}' is not known; known are auto, max, none", mode);
  SetSlices(model, [&](size_t, const Attention& module) {
    return mode == "max" ? 1 : std::max<int64_t>(1, module.options().heads / 2);
  });
}

namespace {

template <ScoreKernel kernel>
AttentionProcessor WithKernel(const AttentionProcessor& processor, std::string_view path,
                              const AttentionProcessor& plain,
                              AttentionOpArgument<kernel> attention_op) {
  return std::visit(
      [&]<class P>(const P& p) -> AttentionProcessor {
        if constexpr (requires { p.train_kv; }) {
          return CustomDiffusionProcessor<kernel>{
              p.train_kv, p.train_q_out, p.hidden_size, p.cross_attention_dim,
              p.out_bias, p.dropout,     attention_op};
        } else if constexpr (requires { p.q_rank; }) {
          return LoRAProcessor<kernel>{
              p.hidden_size, p.cross_attention_dim, p.rank,   p.network_alpha,
              p.q_rank,      p.q_hidden_size,       p.v_rank, p.v_hidden_size,
              p.out_rank,    p.out_hidden_size,     p.scale,  attention_op};
        } else {
          constexpr bool kPlain =
              std::is_same_v<P, AttnProcessor> || std::is_same_v<P, AttnProcessor2_0> ||
              std::is_same_v<P, XFormersAttnProcessor> || std::is_same_v<P, SlicedAttnProcessor>;
          Check<UnsupportedError>(kPlain, "attention: the {} of {} has no XFormers form", P::kName,
                                  path);
          return plain;
        }
      },
      processor);
}

}  // namespace

void SetUseMemoryEfficientAttentionXFormers(Layer& model, bool use, AttentionOp attention_op) {
  auto modules = AttentionModules(model);
  std::vector<AttentionProcessor> chosen;
  std::vector<std::map<std::string, Tensor>> values(modules.size());
  std::vector<std::pair<Attention*, std::string>> frozen;
  for (const auto& [path, module] : modules) {
    const AttentionProcessor& now = module->processor();
    if (use) {
      chosen.push_back(WithKernel<ScoreKernel::kXFormers>(
          now, path, XFormersAttnProcessor{attention_op}, attention_op));
    } else if (module->options().scale_qk) {
      chosen.push_back(WithKernel<ScoreKernel::kFused>(now, path, AttnProcessor2_0{}, {}));
    } else {
      chosen.push_back(WithKernel<ScoreKernel::kExplicit>(now, path, AttnProcessor{}, {}));
    }
    if (!module->processor_has_parameters()) continue;
    for (const ParameterPtr& parameter : module->NamedParameters()) {
      std::string name =
          parameter->name().substr(module->path().empty() ? 0 : module->path().size() + 1);
      if (name.starts_with("processor.")) {
        values[chosen.size() - 1][name] = parameter->value().Clone();
        if (!parameter->trainable()) frozen.emplace_back(module, name);
      }
    }
  }
  SetEach(modules, [&](size_t i) { return chosen[i]; });
  for (size_t i = 0; i < modules.size(); ++i) {
    if (!values[i].empty()) modules[i].second->LoadParameters(values[i], /*strict=*/false);
  }
  for (const auto& [module, name] : frozen) module->FindParameter(name)->set_trainable(false);
}

std::map<std::string, AttentionProcessor> FuseQkvProjections(Layer& model) {
  auto modules = AttentionModules(model);
  CheckNothingIsLost(modules);
  std::map<std::string, AttentionProcessor> before;
  for (const auto& [path, module] : modules) {
    Check<UnsupportedError>(!IsAddedKV(module->processor()),
                            "attention: {} has added keys, its projections cannot be fused", path);
    Check<UnsupportedError>(module->options().scale_qk,
                            "attention: {} has scale_qk = false, which {} does not serve", path,
                            FusedAttnProcessor2_0::kName);
    before.emplace(path + std::string(kSuffix), module->processor());
  }
  for (const auto& [path, module] : modules) {
    module->FuseProjections();
    module->SetProcessor(FusedAttnProcessor2_0{});
  }
  return before;
}

void UnfuseQkvProjections(Layer& model, const std::map<std::string, AttentionProcessor>& before) {
  SetAttnProcessor(model, before);
  for (const auto& [path, module] : AttentionModules(model)) module->UnfuseProjections();
}

}  // namespace calotype::nn
