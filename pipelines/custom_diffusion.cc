#include "pipelines/custom_diffusion.h"

#include <algorithm>
#include <iterator>
#include <set>
#include <system_error>

#include "io/file.h"
#include "io/safetensors.h"
#include "layers/attention_modules.h"
#include "pipelines/diffusion_model.h"

namespace calotype {
namespace {

namespace fs = std::filesystem;

constexpr const char* kTextualInversionFile = "learned_embeds.safetensors";
constexpr std::string_view kProcessor = ".processor";
constexpr std::string_view kMark = "_custom_diffusion";
constexpr std::string_view kOutWeight = "to_out_custom_diffusion.0.weight",
                           kOutBias = "to_out_custom_diffusion.0.bias";

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

// The file of the copies. Errors: FileError without any.
CustomDiffusion ReadCopies(const fs::path& path) {
  CustomDiffusion custom{path, ReadSafetensors(path).tensors, {}};
  // Modules without copies: diffusers tells them by tensors of no length.
  std::erase_if(custom.copies, [](const auto& item) {
    return item.second.elements() == 0 && item.first.ends_with(kProcessor);
  });
  Check<FileError>(!custom.copies.empty(), "{}: no tensors", path.string());
  return custom;
}

// The processors that the file is of. Errors: FileError naming all tensors that do not fit.
std::map<std::string, nn::AttentionProcessor> ProcessorsOf(const CustomDiffusion& custom,
                                                           Layer& unet) {
  std::map<std::string, nn::AttentionProcessor> processors;
  std::string problems;
  size_t found = 0;
  for (const auto& [module_path, module] : nn::AttentionModules(unet)) {
    std::string prefix = module_path + std::string(kProcessor);
    auto has = [&](const char* name) { return custom.copies.contains(prefix + "." + name); };
    nn::CustomDiffusionAttnProcessor2_0 p{.train_kv = has("to_k_custom_diffusion.weight"),
                                          .train_q_out = has("to_q_custom_diffusion.weight"),
                                          .out_bias = has("to_out_custom_diffusion.0.bias")};
    for (const std::string& name : NamesOf(p)) {
      auto it = custom.copies.find(prefix + "." + name);
      if (it == custom.copies.end()) {
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
  if (found != custom.copies.size() && problems.empty())
    problems = fmt::format("\n  {} of {} tensors belong to no layer", custom.copies.size() - found,
                           custom.copies.size());
  Check<FileError>(problems.empty(), "{}: the Custom Diffusion weights do not fit the U-Net:{}",
                   custom.source.string(), problems);
  return processors;
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

void SaveCustomDiffusion(const fs::path& path, Layer& unet) {
  TensorFile file{{}, {{"format", "pt"}}};
  for (const ParameterPtr& p : CustomDiffusionParameters(unet))
    file.tensors[Relative(unet, p->name())] = p->value();
  Check(!file.tensors.empty(), "custom diffusion: the U-Net has no weights of it");
  for (const auto& [name, processor] : nn::AttnProcessors(unet)) {
    auto next = file.tensors.lower_bound(name + ".");
    if (next == file.tensors.end() || !next->first.starts_with(name + "."))
      file.tensors[name] = Tensor(Shape{0});
  }
  WriteSafetensors(path, file);
}

void LoadCustomDiffusion(const fs::path& path, Layer& unet) {
  const CustomDiffusion custom = ReadCopies(path);
  nn::SetAttnProcessor(unet, ProcessorsOf(custom, unet));
  for (const auto& [name, value] : custom.copies) unet.FindParameter(name)->Write().CopyFrom(value);
}

void CheckCustomDiffusion(const CustomDiffusion& custom, Layer& unet) {
  if (!custom.copies.empty()) ProcessorsOf(custom, unet);
}

void MergeCustomDiffusion(const CustomDiffusion& custom, Layer& unet) {
  CheckCustomDiffusion(custom, unet);
  for (const auto& [name, value] : custom.copies) {
    std::string replaced = Replaced(name);
    replaced.erase(replaced.rfind(kProcessor), kProcessor.size());
    unet.FindParameter(replaced)->Write().CopyFrom(value);
    // A copy of to_out without a bias takes the place of the module's bias, too.
    if (!name.ends_with(kOutWeight)) continue;
    const std::string prefix = name.substr(0, name.size() - kOutWeight.size());
    for (const auto& [path, module] : nn::AttentionModules(unet)) {
      if (prefix != path + std::string(kProcessor) + "." || !module->options().out_bias) continue;
      if (!custom.copies.contains(prefix + std::string(kOutBias)))
        std::ranges::fill(module->FindParameter("to_out.0.bias")->Write().values(), 0.0f);
    }
  }
}

WordEmbedding ReadWordEmbedding(const fs::path& path) {
  std::map<std::string, Tensor> tensors = ReadSafetensors(path).tensors;
  Check<FileError>(tensors.size() == 1,
                   "{}: {} tensors; the embedding of a word is one, {{word: embedding}}",
                   path.string(), tensors.size());
  auto& [word, x] = *tensors.begin();
  const int rank = x.shape().rank();
  Check<FileError>((rank == 1 || rank == 2) && x.elements() > 0 && x.dtype() == DType::kF32,
                   "{}: {} is {}, the embedding of a word is f32 [width] or [n, width]",
                   path.string(), Quoted(word), x.type());
  return {path, word, x.Reshape({rank == 1 ? 1 : x.shape()[0], x.shape()[rank - 1]})};
}

void SaveWordEmbedding(const fs::path& path, const std::string& word, const Tensor& embedding) {
  const Shape& shape = embedding.shape();
  const bool one = shape.rank() == 2 && shape[0] == 1;
  WriteSafetensors(path,
                   {{{word, one ? embedding.Reshape({shape[1]}) : embedding}}, {{"format", "pt"}}});
}

namespace {

// textual_inversion.py writes its result beside what the word was at earlier steps
// (learned_embeds-steps-500.safetensors): the result counts. Errors: FileError for another word
// that is in two files.
void LeaveFinalWords(std::vector<WordEmbedding>& words) {
  std::map<std::string, const WordEmbedding*> final, first;
  for (const WordEmbedding& word : words) {
    if (word.source.filename() == kTextualInversionFile) final[word.word] = &word;
  }
  for (const WordEmbedding& word : words) {
    const auto [known, is_new] = first.emplace(word.word, &word);
    Check<FileError>(is_new || final.contains(word.word),
                     "two files have the word {}: {}, {}; give one of them", Quoted(word.word),
                     known->second->source.string(), word.source.string());
  }
  std::vector<WordEmbedding> kept;
  std::ranges::copy_if(words, std::back_inserter(kept), [&](const WordEmbedding& word) {
    auto found = final.find(word.word);
    return found == final.end() || found->second == &word;
  });
  words = std::move(kept);
}

}  // namespace

CustomDiffusion ReadCustomDiffusion(const fs::path& path) {
  std::error_code error;
  if (!fs::is_directory(path, error)) {
    CustomDiffusion custom;
    if (path.filename() == kCustomDiffusionFile) return ReadCopies(path);
    custom.words.push_back(ReadWordEmbedding(path));
    return custom;
  }
  CustomDiffusion custom;
  std::vector<fs::path> files, pickles;
  for (const auto& entry : fs::directory_iterator(path, error)) {
    if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
    if (entry.path().extension() == ".bin") pickles.push_back(entry.path());
  }
  Check<FileError>(!error, "{}: cannot be read: {}", path.string(), error.message());
  std::ranges::sort(files);
  std::ranges::sort(pickles);
  for (const fs::path& pickle : pickles) {
    Check<FileError>(
        std::ranges::binary_search(files, fs::path(pickle).replace_extension(".safetensors")),
        "{}: a pickle, which is not read; save it as safetensors, as train_custom_diffusion.py "
        "does without --no_safe_serialization",
        pickle.string());
  }
  Check<FileError>(!files.empty(), "{}: there is neither {} nor the embedding of a word",
                   path.string(), kCustomDiffusionFile);
  for (const fs::path& file : files) {
    if (file.filename() == kCustomDiffusionFile) {
      CustomDiffusion copies = ReadCopies(file);
      custom.source = std::move(copies.source);
      custom.copies = std::move(copies.copies);
    } else {
      custom.words.push_back(ReadWordEmbedding(file));
    }
  }
  LeaveFinalWords(custom.words);
  return custom;
}

void AddWords(const CustomDiffusion& custom, DiffusionModel& model) {
  for (const WordEmbedding& word : custom.words) {
    try {
      model.AddToken(word.word, word.embeddings);
    } catch (const ValueError& e) {
      Fail<FileError>("{}: {}", word.source.string(), e.what());
    }
  }
}

}  // namespace calotype
