#include "pipelines/custom_diffusion.h"

#include <map>
#include <set>
#include <string>

#include "io/safetensors.h"
#include "layers/attention_modules.h"

namespace calotype {
namespace {

constexpr std::string_view kProcessor = ".processor";
constexpr std::string_view kMark = "_custom_diffusion";

std::string Relative(const Layer& unet, const std::string& name) {
  return name.substr(unet.path().empty() ? 0 : unet.path().size() + 1);
}

// "to_out_custom_diffusion.0.weight" -> "to_out.0.weight", the parameter that it replaces.
std::string Replaced(std::string name) { return name.erase(name.find(kMark), kMark.size()); }

// The copies that a processor with these arguments has, by their names below "processor.".
std::set<std::string> NamesOf(const nn::CustomDiffusionAttnProcessor2_0& p) {
  std::set<std::string> names;
  auto add = [&](const char* name) { names.insert(name); };
  if (p.train_kv) add("to_k_custom_diffusion.weight"), add("to_v_custom_diffusion.weight");
  if (p.train_q_out) add("to_q_custom_diffusion.weight"), add("to_out_custom_diffusion.0.weight");
  if (p.train_q_out && p.out_bias) add("to_out_custom_diffusion.0.bias");
  return names;
}

}  // namespace

void AddCustomDiffusion(Layer& unet, std::string_view freeze_model) {
  Check(freeze_model == "crossattn_kv" || freeze_model == "crossattn",
        "custom diffusion: freeze_model is {}, must be crossattn_kv or crossattn", freeze_model);
  std::map<std::string, nn::AttentionProcessor> processors;
  for (const auto& [path, module] : nn::AttentionModules(unet)) {
    bool cross = module->options().cross_attention_dim > 0;
    processors[path + std::string(kProcessor)] =
        nn::CustomDiffusionAttnProcessor2_0{.train_kv = cross,
                                            .train_q_out = cross && freeze_model == "crossattn",
                                            .out_bias = module->options().out_bias};
  }
  Check(!processors.empty(), "custom diffusion: the U-Net has no attention");
  nn::SetAttnProcessor(unet, processors);
  for (const auto& [path, module] : nn::AttentionModules(unet)) {
    const auto& p = std::get<nn::CustomDiffusionAttnProcessor2_0>(module->processor());
    for (const std::string& name : NamesOf(p)) {
      module->FindParameter("processor." + name)
          ->Write()
          .CopyFrom(module->FindParameter(Replaced(name))->value());
    }
  }
}

std::vector<ParameterPtr> CustomDiffusionParameters(Layer& unet) {
  std::vector<ParameterPtr> parameters;
  for (const ParameterPtr& p : unet.NamedParameters()) {
    if (p->name().find(kMark) != std::string::npos) parameters.push_back(p);
  }
  return parameters;
}

void SaveCustomDiffusion(const std::filesystem::path& path, Layer& unet) {
  TensorFile file;
  for (const ParameterPtr& p : CustomDiffusionParameters(unet))
    file.tensors[Relative(unet, p->name())] = p->value();
  Check(!file.tensors.empty(), "custom diffusion: the U-Net has no weights of it");
  WriteSafetensors(path, file);
}

void LoadCustomDiffusion(const std::filesystem::path& path, Layer& unet) {
  std::map<std::string, Tensor> tensors = ReadSafetensors(path).tensors;
  Check<FileError>(!tensors.empty(), "{}: no tensors", path.string());
  std::map<std::string, nn::AttentionProcessor> processors;
  std::string problems;
  size_t found = 0;
  for (const auto& [module_path, module] : nn::AttentionModules(unet)) {
    std::string prefix = module_path + std::string(kProcessor);
    auto has = [&](const char* name) { return tensors.contains(prefix + "." + name); };
    nn::CustomDiffusionAttnProcessor2_0 p{.train_kv = has("to_k_custom_diffusion.weight"),
                                          .train_q_out = has("to_q_custom_diffusion.weight"),
                                          .out_bias = has("to_out_custom_diffusion.0.bias")};
    for (const std::string& name : NamesOf(p)) {
      auto it = tensors.find(prefix + "." + name);
      if (it == tensors.end()) {
        problems += fmt::format("\n  {}.{} is missing", prefix, name);
        continue;
      }
      ++found;
      bool there = false;
      Shape expected;
      for (const auto& [full, shape] : module->ParameterShapes()) {
        if (full == module->path() + "." + Replaced(name)) there = true, expected = shape;
      }
      if (!there || it->second.shape() != expected || it->second.dtype() != DType::kF32) {
        problems += fmt::format("\n  {}: {} does not fit the layer's {}", it->first,
                                it->second.type(), expected);
      }
    }
    processors[prefix] = p;
  }
  if (found != tensors.size() && problems.empty())
    problems = fmt::format("\n  {} of {} tensors belong to no layer", tensors.size() - found,
                           tensors.size());
  Check<FileError>(problems.empty(), "{}: the Custom Diffusion weights do not fit the U-Net:{}",
                   path.string(), problems);
  nn::SetAttnProcessor(unet, processors);
  for (const auto& [name, value] : tensors) unet.FindParameter(name)->Write().CopyFrom(value);
}

}  // namespace calotype
