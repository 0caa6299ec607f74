#include "pipelines/lora_file.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>
#include <span>

#include "core/error.h"
#include "core/json.h"
#include "io/file.h"
#include "io/safetensors.h"
#include "pipelines/lora_names.h"

namespace calotype {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr std::array<std::string_view, 4> kDialects = {"processor", "diffusers", "peft", "kohya"};
constexpr const char* kPeftMetadata = "lora_adapter_metadata";

enum class Part : uint8_t { kDown, kUp, kAlpha };

// What the name of a tensor says.
struct Name {
  std::string module;
  Part part;
  std::optional<LoraDialect> dialect;
};

// Takes `suffix` from the end of `text` if it is there.
bool Strip(std::string_view& text, std::string_view suffix) {
  if (!text.ends_with(suffix)) return false;
  text.remove_suffix(suffix.size());
  return true;
}
bool StripPrefix(std::string_view& text, std::string_view prefix) {
  if (!text.starts_with(prefix)) return false;
  text.remove_prefix(prefix.size());
  return true;
}

// "...attn1.processor.to_out_lora" as the layer that the term belongs to.
std::string ProcessorTarget(std::string_view name) {
  Strip(name, "_lora");
  std::string text(name);
  bool text_encoder = text.find("self_attn.") != std::string::npos;
  if (size_t at = text.find(".processor."); at != std::string::npos) text.erase(at, 10);
  size_t last = text.rfind('.') + 1;
  std::string leaf = text.substr(last);
  if (text_encoder) {
    if (leaf.starts_with("to_")) text.replace(last, std::string::npos, leaf.substr(3) + "_proj");
  } else if (leaf == "to_out") {
    text += ".0";
  }
  return text;
}

std::optional<Name> ParseName(std::string_view key) {
  StripPrefix(key, "base_model.model.");
  std::string_view name = key;
  if (name.starts_with("lora_unet_") || name.starts_with("lora_te")) {
    if (Strip(name, ".lora_down.weight")) return Name{std::string(name), Part::kDown, {}};
    if (Strip(name, ".lora_up.weight")) return Name{std::string(name), Part::kUp, {}};
    if (Strip(name, ".alpha")) return Name{std::string(name), Part::kAlpha, {}};
    return std::nullopt;
  }
  if (Strip(name, ".alpha")) return Name{std::string(name), Part::kAlpha, {}};
  if (!Strip(name, ".weight")) return std::nullopt;
  std::optional<Part> part;
  std::string_view halved = name;
  if (Strip(halved, ".down")) part = Part::kDown;
  if (!part && Strip(halved, ".up")) part = Part::kUp;
  if (part) {
    if (Strip(halved, ".lora") || Strip(halved, ".lora_linear_layer"))
      return Name{std::string(halved), *part, LoraDialect::kDiffusers};
    if (halved.ends_with("_lora"))
      return Name{ProcessorTarget(halved), *part, LoraDialect::kProcessor};
    return std::nullopt;
  }
  // M.lora_A, or M.lora_A.NAME of an adapter.
  for (auto [text, which] : {std::pair(".lora_A", Part::kDown), std::pair(".lora_B", Part::kUp)}) {
    size_t at = name.rfind(text);
    if (at == std::string_view::npos) continue;
    std::string_view adapter = name.substr(at + 7);
    bool fits = adapter.empty() ||
                (adapter.size() > 1 && adapter[0] == '.' && adapter.find('.', 1) == adapter.npos);
    if (fits) return Name{std::string(name.substr(0, at)), which, LoraDialect::kPeft};
  }
  return std::nullopt;
}

// Tensors of methods whose effect is not that of a low-rank term.
void CheckMethod(const TensorFile& file, const std::string& source) {
  constexpr std::array<std::pair<std::string_view, std::string_view>, 9> kMethods = {{
      {".hada_", "LoHa (hada_)"},
      {".lokr_", "LoKr (lokr_)"},
      {".oft_", "OFT (oft_)"},
      {"dora_scale", "DoRA (dora_scale)"},
      {"lora_magnitude_vector", "DoRA (lora_magnitude_vector)"},
      {".lora_mid.", "a CP decomposition (lora_mid)"},
      {".diff", "full differences (diff)"},
      {".on_input", "IA3 (on_input)"},
      {".lora_B.bias", "a bias (lora_B.bias)"},
  }};
  for (auto [mark, method] : kMethods) {
    auto count = std::ranges::count_if(file.tensors, [&, text = mark](const auto& t) {
      return t.first.find(text) != t.first.npos;
    });
    Check<UnsupportedFileError>(count == 0,
                                "{}: {} of {} tensors belong to {}, which is not supported; only "
                                "low-rank terms (lora_down and lora_up, lora_A and lora_B) are",
                                source, count, file.tensors.size(), method);
  }
}

Tensor Values(const Tensor& tensor, const std::string& source, const std::string& name) {
  Check<FileError>(tensor.dtype() == DType::kF32 || tensor.dtype() == DType::kF64,
                   "{}: tensor {} is {}, must be floating point", source, Shown(name),
                   tensor.dtype());
  Tensor values = tensor.dtype() == DType::kF64 ? tensor.To(DType::kF32) : tensor;
  for (float v : std::as_const(values).values()) {
    Check<FileError>(std::isfinite(v), "{}: tensor {} has values that are not finite", source,
                     Shown(name));
  }
  return values;
}

void CheckShapes(const LoraModule& m, const std::string& source, const std::string& name) {
  Check<FileError>(m.down.defined() && m.up.defined(), "{}: module {} has only its {} half", source,
                   Shown(name),
                   m.down.defined() ? "down (A)"
                   : m.up.defined() ? "up (B)"
                                    : "alpha");
  const Shape &down = m.down.shape(), &up = m.up.shape();
  bool fits = (down.rank() == 2 || down.rank() == 4) && (up.rank() == 2 || up.rank() == 4) &&
              down[0] > 0 && up[1] == down[0] && m.down.elements() > 0 && m.up.elements() > 0 &&
              (up.rank() == 2 || (up[2] == 1 && up[3] == 1));
  Check<FileError>(fits,
                   "{}: module {}: down (A) {} and up (B) {} do not fit; they must be [r, in] and "
                   "[out, r], or [r, in, k, k] and [out, r, 1, 1]",
                   source, Shown(name), down, up);
}

// ---------------------------------------------------------------- PEFT's configuration

// True if `pattern`, a key of rank_pattern or alpha_pattern, is `path` or its end. Patterns are
// regular expressions; those that diffusers and PEFT write are plain paths, perhaps after "^".
bool Matches(std::string_view pattern, std::string_view path, const std::string& source) {
  bool whole = StripPrefix(pattern, "^");
  Check<UnsupportedFileError>(
      std::ranges::all_of(pattern,
                          [](unsigned char c) { return std::isalnum(c) || c == '_' || c == '.'; }),
      "{}: the pattern {} in the metadata is not a plain path", source, Shown(pattern));
  if (path == pattern) return true;
  return !whole && path.size() > pattern.size() && path.ends_with(pattern) &&
         path[path.size() - pattern.size() - 1] == '.';
}

// Fills in alphas as a PEFT configuration gives them; its fields are named PREFIXr,
// PREFIXlora_alpha and so on.
void SetAlphas(const json& config, const std::string& prefix, std::string_view component,
               LoraFile& lora) {
  if (!config.contains(prefix + "lora_alpha")) return;
  auto flag = [&](const char* name) { return config.value(prefix + name, false); };
  Check<UnsupportedFileError>(
      !flag("use_dora"), "{}: the metadata asks for DoRA, which is not supported", lora.source);
  double alpha = config.at(prefix + "lora_alpha").get<double>();
  bool rank_stabilised = flag("use_rslora");
  json patterns = config.value(prefix + "alpha_pattern", json::object());
  for (auto& [name, module] : lora.modules) {
    std::string_view path = name;
    if (!StripPrefix(path, component)) continue;
    double own = alpha;
    for (const auto& [pattern, value] : patterns.items()) {
      if (Matches(pattern, path, lora.source)) {
        own = value.get<double>();
        break;
      }
    }
    // rsLoRA divides by the root of the rank.
    if (rank_stabilised) own *= std::sqrt(static_cast<double>(module.rank()));
    Check<FileError>(std::isfinite(own), "{}: the alpha of {} in the metadata is not finite",
                     lora.source, Shown(name));
    if (!module.alpha) module.alpha = own;
  }
}

void ReadPeftConfig(const std::string& text, const std::string& where, LoraFile& lora) {
  const json config = ParseJsonObject(text, lora.source + ": " + where);
  try {
    for (std::string component : {"unet", "text_encoder"}) {
      SetAlphas(config, component + ".", component + ".", lora);
    }
    SetAlphas(config, "", "unet.", lora);
  } catch (const json::exception& e) {
    Fail<FileError>("{}: {} is not a PEFT configuration: {}", lora.source, where, e.what());
  }
}

// ---------------------------------------------------------------- reading

LoraFile FromTensors(TensorFile file, const std::string& source) {
  CheckMethod(file, source);
  LoraFile lora{.source = source, .metadata = std::move(file.metadata)};
  std::array<int64_t, kDialects.size()> counts{};
  bool prefixed = std::ranges::any_of(file.tensors, [](const auto& t) {
    std::string_view name = t.first;
    StripPrefix(name, "base_model.model.");
    return name.starts_with("unet.") || name.starts_with("text_encoder");
  });
  for (const auto& [key, tensor] : file.tensors) {
    std::optional<Name> name = ParseName(key);
    if (!name) {
      lora.unknown.push_back(key);
      continue;
    }
    bool kohya = !name->dialect && name->module.starts_with("lora_");
    std::string module = name->module;
    if (!kohya && !prefixed) module.insert(0, "unet.");
    // "unet.base_model.model.M"
    if (size_t at = module.find(".base_model.model."); at != std::string::npos)
      module.erase(at, 17);
    LoraModule& m = lora.modules[module];
    if (name->part == Part::kAlpha) {
      Check<FileError>(tensor.elements() == 1, "{}: alpha {} must be one number, not {}", source,
                       Shown(key), tensor.shape());
      m.alpha = tensor.Item();
      Check<FileError>(std::isfinite(*m.alpha), "{}: alpha {} is not finite", source, Shown(key));
      continue;
    }
    Tensor& half = name->part == Part::kDown ? m.down : m.up;
    Check<FileError>(!half.defined(), "{}: module {} has two {} tensors; the second is {}", source,
                     Shown(module), name->part == Part::kDown ? "down (A)" : "up (B)", Shown(key));
    half = Values(tensor, source, key);
    ++counts[static_cast<size_t>(kohya ? LoraDialect::kKohya : *name->dialect)];
  }
  for (const auto& [name, module] : lora.modules) CheckShapes(module, source, name);
  Check<FileError>(!lora.modules.empty(), "{}: no LoRA; it has {} tensors, none named as one",
                   source, file.tensors.size());
  lora.dialect = static_cast<LoraDialect>(std::ranges::max_element(counts) - counts.begin());
  if (auto it = lora.metadata.find(kPeftMetadata); it != lora.metadata.end()) {
    ReadPeftConfig(it->second, fmt::format("the metadata {}", kPeftMetadata), lora);
  }
  return lora;
}

}  // namespace

std::string_view NameOf(LoraDialect dialect) { return kDialects[static_cast<size_t>(dialect)]; }

LoraDialect ParseLoraDialect(std::string_view name) {
  for (size_t i = 0; i < kDialects.size(); ++i) {
    if (kDialects[i] == name) return static_cast<LoraDialect>(i);
  }
  Fail("LoRA: format {} is unknown; known are {}", name, fmt::join(kDialects, ", "));
}

LoraFile LoadLora(const fs::path& path) {
  std::error_code ignored;  // a path that cannot be looked at is an error where it is read
  fs::path file = path;
  if (fs::is_directory(path, ignored)) file /= "pytorch_lora_weights.safetensors";
  const fs::path ending = file.extension();
  Check<UnsupportedFileError>(
      ending != ".ckpt" && ending != ".pt" && ending != ".pth" && ending != ".bin",
      "{}: a pickle, which is not read; save it as safetensors", file.string());
  LoraFile lora = FromTensors(ReadSafetensors(file), file.string());
  fs::path config = file.parent_path() / "adapter_config.json";
  if (file.filename() == "adapter_model.safetensors" && fs::exists(config, ignored)) {
    ReadPeftConfig(ReadFile(config, 16 << 20), config.string(), lora);
  }
  return lora;
}

LoraFile ParseLora(std::string_view bytes, const std::string& name) {
  return FromTensors(ParseSafetensors(bytes, name), name);
}

// ---------------------------------------------------------------- writing

namespace {

// The PEFT configuration of the modules below `component` ("unet."), as diffusers writes it.
void AddPeftConfig(const LoraFile& lora, const std::string& component, json& config) {
  std::map<std::pair<int64_t, double>, int64_t> counts;
  for (const auto& [name, m] : lora.modules) {
    if (name.starts_with(component)) {
      ++counts[{m.rank(), m.alpha.value_or(static_cast<double>(m.rank()))}];
    }
  }
  if (counts.empty()) return;
  auto [rank, alpha] =
      std::ranges::max_element(counts, {}, [](const auto& c) { return c.second; })->first;
  std::set<std::string> targets;
  json ranks = json::object(), alphas = json::object();
  for (const auto& [name, m] : lora.modules) {
    std::string_view path = name;
    if (!StripPrefix(path, component)) continue;
    // Newer text encoders of transformers have no such prefix.
    StripPrefix(path, "text_model.");
    // A target is a path or its end: "to_q", but "to_out.0" and "net.0.proj".
    std::string_view head = path;
    size_t dot = head.rfind('.');
    while (dot != head.npos && std::isdigit(static_cast<unsigned char>(head[dot + 1]))) {
      head = head.substr(0, dot);
      dot = head.rfind('.');
    }
    targets.emplace(dot == head.npos ? path : path.substr(dot + 1));
    double own = m.alpha.value_or(static_cast<double>(m.rank()));
    if (m.rank() != rank) ranks[std::string(path)] = m.rank();
    if (own != alpha) alphas[std::string(path)] = own;
  }
  config[component + "r"] = rank;
  config[component + "lora_alpha"] = alpha;
  config[component + "target_modules"] = targets;
  config[component + "rank_pattern"] = ranks;
  config[component + "alpha_pattern"] = alphas;
  config[component + "peft_type"] = "LORA";
}

}  // namespace

void SaveLora(const fs::path& path, const LoraFile& lora, LoraDialect dialect) {
  Check(dialect != LoraDialect::kProcessor,
        "LoRA: the format processor is read only; write kohya, peft or diffusers");
  TensorFile file;
  file.metadata["format"] = "pt";
  std::set<int64_t> ranks;
  std::set<double> alphas;
  for (const auto& [name, m] : lora.modules) {
    bool text_encoder = name.starts_with("text_encoder.");
    Check(text_encoder || name.starts_with("unet."),
          "LoRA: module {} is not named by a path below unet. or text_encoder.", name);
    double alpha = m.alpha.value_or(static_cast<double>(m.rank()));
    ranks.insert(m.rank());
    alphas.insert(alpha);
    if (dialect == LoraDialect::kKohya) {
      std::string flat = KohyaName(name);
      file.tensors[flat + ".lora_down.weight"] = m.down;
      file.tensors[flat + ".lora_up.weight"] = m.up;
      file.tensors[flat + ".alpha"] = Tensor::Scalar(static_cast<float>(alpha));
    } else if (dialect == LoraDialect::kPeft) {
      file.tensors[name + ".lora_A.weight"] = m.down;
      file.tensors[name + ".lora_B.weight"] = m.up;
    } else {
      std::string term = name + (text_encoder ? ".lora_linear_layer" : ".lora");
      file.tensors[term + ".down.weight"] = m.down;
      file.tensors[term + ".up.weight"] = m.up;
    }
  }
  if (dialect == LoraDialect::kKohya) {
    // One number if it is one.
    auto one = [](const auto& set) {
      return set.size() == 1 ? fmt::format("{}", *set.begin()) : "Dynamic";
    };
    file.metadata["ss_network_module"] = "networks.lora";
    file.metadata["ss_network_dim"] = one(ranks);
    file.metadata["ss_network_alpha"] = one(alphas);
  } else {
    json config = json::object();
    for (std::string component : {"unet.", "text_encoder."}) {
      AddPeftConfig(lora, component, config);
    }
    file.metadata[kPeftMetadata] = JsonText(config, 2);
  }
  WriteSafetensors(path, file);
}

}  // namespace calotype
