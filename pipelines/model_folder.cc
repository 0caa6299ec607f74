#include "pipelines/model_folder.h"

#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "core/error.h"
#include "core/json.h"
#include "io/atomic_file.h"
#include "io/file.h"
#include "io/safetensors.h"

namespace calotype {

namespace fs = std::filesystem;

namespace {

constexpr const char* kAddedTokens = "added_tokens.json";
constexpr std::string_view kDiffusers = "diffusion_pytorch_model", kTransformers = "model";
constexpr uint64_t kMaxText = 1 << 26;  // of configs, indices and vocabularies

template <class Config>
Config ReadConfig(const fs::path& path) {
  std::string text = ReadFile(path, kMaxText);
  return InFile(path, [&] { return Config::FromJson(text); });
}

// A file, or its tensors without their values: what those of floating point point to must not be
// read.
TensorFile ReadTensors(const fs::path& path, Weights weights) {
  if (weights == Weights::kLoad) return ReadSafetensors(path);
  alignas(8) static std::byte nothing[8];
  std::map<std::string, Tensor> types;
  TensorFile file = ReadSafetensors(path, [&](const TensorEntry& entry) {
    const bool f64 = entry.dtype == "F64";
    if (!f64 && entry.dtype != "F32" && entry.dtype != "F16" && entry.dtype != "BF16") return true;
    types.emplace(entry.name,
                  Tensor::Borrow(entry.shape, f64 ? DType::kF64 : DType::kF32, nothing));
    return false;
  });
  file.tensors.merge(types);
  return file;
}

void LoadTensors(Layer& layer, std::map<std::string, Tensor> tensors, const fs::path& path,
                 Weights weights) {
  InFile(path, [&] {
    if (weights == Weights::kLoad) {
      layer.LoadParameters(std::move(tensors));
    } else {
      LoadReport report = layer.CheckParameters(tensors);
      Check(report.complete(), "{}: the tensors do not fit the layer\n{}", layer.type(),
            report.ToString());
    }
  });
}

void Save(const fs::path& folder, std::string_view stem, Layer& layer, const std::string& config,
          FloatFormat dtype) {
  std::error_code error;
  fs::create_directories(folder, error);
  Check<FileError>(!error, "{}: cannot make the folder: {}", folder.string(), error.message());
  TensorFile file{layer.SaveParameters(), {}};
  file.SetFormat(dtype);
  WriteSafetensors(folder / fmt::format("{}.safetensors", stem), file);
  WriteFile(folder / "config.json", config);
}

// STEM.safetensors, its index of shards, or its half-precision variant, whichever is there first.
fs::path WeightsFile(const fs::path& folder, std::string_view stem) {
  fs::path whole = folder / fmt::format("{}.safetensors", stem);
  fs::path index = folder / fmt::format("{}.safetensors.index.json", stem);
  fs::path half = folder / fmt::format("{}.fp16.safetensors", stem);
  for (const fs::path& path : {whole, index, half}) {
    if (fs::exists(path)) return path;
  }
  Fail<FileError>("{}: no such file, and no {} or {} beside it", whole.string(),
                  index.filename().string(), half.filename().string());
}

// Tensor name -> file name, as an index of shards gives it.
std::map<std::string, std::string> ReadShardIndex(const fs::path& path) {
  const nlohmann::json index = ParseJsonObject(ReadFile(path, kMaxText), path.string());
  std::map<std::string, std::string> files;
  try {
    index.at("weight_map").get_to(files);
  } catch (const nlohmann::json::exception& e) {
    Fail<FileError>("{}: not an index of shards: {}", path.string(), e.what());
  }
  for (const auto& [name, file] : files) {
    Check<FileError>(!file.empty() && file[0] != '.' && file.find('/') == file.npos,
                     "{}: tensor {} is in {}, which is no file name", path.string(), Quoted(name),
                     Quoted(file));
  }
  return files;
}

// The texts of vocab.json and merges.txt that a tokenizer.json stands for.
std::pair<std::string, std::string> VocabularyOfFastTokenizer(const std::string& text) {
  const auto document = ParseJsonObject<ValueError>(text, "not a tokenizer");
  Check(document.contains("model") && document["model"].is_object(),
        "not a tokenizer: no object `model`");
  const nlohmann::json& model = document["model"];
  const auto type = model.find("type"), vocabulary = model.find("vocab"),
             merges = model.find("merges");
  Check<UnsupportedError>(type != model.end() && *type == "BPE",
                          "model.type is {}, only BPE is supported",
                          type == model.end() ? "missing" : JsonText(*type));
  Check(vocabulary != model.end() && merges != model.end() && merges->is_array(),
        "model.vocab or model.merges is missing");
  std::string lines = "#version: 0.2\n";
  for (const nlohmann::json& merge : *merges) {
    const bool pair =
        merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string();
    Check(pair || merge.is_string(), "model.merges has {}, expected two tokens", JsonText(merge));
    lines += pair ? merge[0].get<std::string>() + " " + merge[1].get<std::string>()
                  : merge.get<std::string>();
    lines += '\n';
  }
  return {JsonText(*vocabulary), lines};
}

// The words that tokenizer files name beyond the vocabulary, by id.
class AddedWords {
 public:
  explicit AddedWords(const CLIPTokenizer& tokenizer) : tokenizer_(tokenizer) {}

  // added_tokens.json: {"<cat>": 49408}.
  void TakeList(const nlohmann::json& list) {
    for (const auto& [word, id] : list.items()) {
      Check(id.is_number_integer(),
            "{} is {}, but this file maps words to ids, as {{\"<cat>\": {}}} does", Quoted(word),
            JsonText(id), tokenizer_.vocab_size());
      Take(id, word);
    }
  }
  // added_tokens of tokenizer.json, and added_tokens_decoder of tokenizer_config.json by id.
  void TakeDescribed(const nlohmann::json& list) {
    for (const auto& [key, token] : list.items()) {
      Check(token.is_object() && token.contains("content") && token["content"].is_string(),
            "the added token {} has no string `content`", key);
      nlohmann::json id = list.is_object() ? ParseJson(key) : token.value("id", nlohmann::json());
      const std::string word = token["content"];
      if (!Take(id, word)) continue;
      // Of the vocabulary's own tokens the special ones are read otherwise, whatever is said here.
      for (auto [field, only] : {std::pair{"lstrip", false},
                                 {"rstrip", false},
                                 {"single_word", false},
                                 {"special", false},
                                 {"normalized", true}}) {
        const nlohmann::json value = token.value(field, nlohmann::json(only));
        Check<UnsupportedError>(value == only, "the added token {} has {} {}, only {} is supported",
                                Quoted(word), field, JsonText(value), only);
      }
    }
  }
  void AddTo(CLIPTokenizer& tokenizer) const {
    for (auto it = words_.begin(); it != words_.end();) {
      const auto& [first, word] = *it;
      Check(first == tokenizer.end_of_ids(), "the added token {} has the id {}, expected {}",
            Quoted(word), first, tokenizer.end_of_ids());
      int64_t vectors = 1;
      while (++it != words_.end() && it->first == first + vectors &&
             it->second == fmt::format("{}_{}", word, vectors)) {
        ++vectors;
      }
      tokenizer.AddToken(word, first, vectors);
    }
  }

 private:
  // Returns whether the word is one beyond the vocabulary.
  bool Take(const nlohmann::json& id, const std::string& word) {
    Check(id.is_number_integer() && id.get<int64_t>() >= 0,
          "the id of the added token {} is {}, expected a non-negative integer", Quoted(word),
          JsonText(id));
    const auto number = id.get<int64_t>();
    if (number < tokenizer_.vocab_size()) {
      Check(tokenizer_.IdOf(word) == number,
            "the added token {} has the id {}, in the vocabulary {}", Quoted(word), number,
            tokenizer_.IdOf(word));
      return false;
    }
    const std::string& known = words_.emplace(number, word).first->second;
    Check(known == word, "the id {} is that of two added tokens, {} and {}", number, Quoted(known),
          Quoted(word));
    return true;
  }

  const CLIPTokenizer& tokenizer_;
  std::map<int64_t, std::string> words_;
};

// Adds the words beyond the vocabulary.
void AddListedWords(const std::map<std::string, std::string>& files, const fs::path& folder,
                    CLIPTokenizer& tokenizer) {
  AddedWords words(tokenizer);
  auto take = [&](const char* name, const auto& from) {
    auto found = files.find(name);
    if (found == files.end()) return;
    InFile(folder / name,
           [&] { from(ParseJsonObject<ValueError>(found->second, "not a tokenizer")); });
  };
  take("tokenizer.json", [&](const nlohmann::json& document) {
    words.TakeDescribed(document.value("added_tokens", nlohmann::json::array()));
  });
  take("tokenizer_config.json", [&](const nlohmann::json& document) {
    words.TakeDescribed(document.value("added_tokens_decoder", nlohmann::json::object()));
  });
  take(kAddedTokens, [&](const nlohmann::json& document) { words.TakeList(document); });
  InFile(folder, [&] { words.AddTo(tokenizer); });
}

TensorFile ReadModel(const fs::path& folder, std::string_view stem, Weights weights) {
  fs::path index = WeightsFile(folder, stem);
  if (index.extension() != ".json") {
    TensorFile file = ReadTensors(index, weights);
    file.metadata.clear();
    return file;
  }
  std::map<std::string, std::string> files = ReadShardIndex(index);
  std::set<std::string> shards;
  for (const auto& [name, file] : files) shards.insert(file);
  TensorFile result;
  for (const std::string& shard : shards) {
    TensorFile file = ReadTensors(folder / shard, weights);
    result.formats.merge(file.formats);
    for (auto& [name, tensor] : file.tensors) {
      auto listed = files.find(name);
      Check<FileError>(listed != files.end() && listed->second == shard,
                       "{}: tensor {} is not listed for this shard in {}",
                       (folder / shard).string(), Quoted(name), index.filename().string());
      result.tensors.emplace(name, std::move(tensor));
      files.erase(listed);
    }
  }
  Check<FileError>(files.empty(), "{}: shard {} lacks tensor {}", index.string(),
                   files.empty() ? "" : files.begin()->second,
                   files.empty() ? "" : Quoted(files.begin()->first));
  return result;
}

}  // namespace

TensorFile ReadModelFile(const fs::path& folder, std::string_view stem) {
  return ReadModel(folder, stem, Weights::kLoad);
}

UNet2DConditionConfig ReadUNetConfig(const fs::path& path) {
  return ReadConfig<UNet2DConditionConfig>(path);
}

void LoadWeights(Layer& layer, const fs::path& path, Weights weights) {
  LoadTensors(layer, ReadTensors(path, weights).tensors, path, weights);
}

AutoencoderKLConfig ReadAutoencoderKLConfig(const fs::path& path) {
  return ReadConfig<AutoencoderKLConfig>(path);
}

CLIPTextConfig ReadCLIPTextConfig(const fs::path& path) { return ReadConfig<CLIPTextConfig>(path); }

void LoadWeightsOf(UNet2DConditionModel& unet, const fs::path& folder, Weights weights) {
  LoadTensors(unet, ReadModel(folder, kDiffusers, weights).tensors, WeightsFile(folder, kDiffusers),
              weights);
}

void LoadWeightsOf(AutoencoderKL& vae, const fs::path& folder, Weights weights) {
  auto tensors = InFile(WeightsFile(folder, kDiffusers), [&] {
    return AutoencoderKL::CurrentNames(ReadModel(folder, kDiffusers, weights).tensors);
  });
  LoadTensors(vae, std::move(tensors), WeightsFile(folder, kDiffusers), weights);
}

void LoadWeightsOf(CLIPTextModel& text_encoder, const fs::path& folder, Weights weights) {
  LoadTensors(text_encoder,
              CLIPTextModel::CurrentNames(ReadModel(folder, kTransformers, weights).tensors),
              WeightsFile(folder, kTransformers), weights);
}

std::unique_ptr<UNet2DConditionModel> LoadUNet(const fs::path& folder) {
  auto unet = std::make_unique<UNet2DConditionModel>(ReadUNetConfig(folder / "config.json"));
  LoadWeightsOf(*unet, folder);
  return unet;
}

std::unique_ptr<AutoencoderKL> LoadAutoencoderKL(const fs::path& folder) {
  auto vae = std::make_unique<AutoencoderKL>(ReadAutoencoderKLConfig(folder / "config.json"));
  LoadWeightsOf(*vae, folder);
  return vae;
}

std::unique_ptr<CLIPTextModel> LoadCLIPTextModel(const fs::path& folder) {
  auto text_encoder = std::make_unique<CLIPTextModel>(ReadCLIPTextConfig(folder / "config.json"));
  LoadWeightsOf(*text_encoder, folder);
  return text_encoder;
}

std::map<std::string, std::string> ReadTokenizerFiles(const fs::path& folder) {
  std::map<std::string, std::string> files;
  auto read = [&](const char* name) { files[name] = ReadFile(folder / name, kMaxText); };
  const bool fast = !fs::exists(folder / "vocab.json") && fs::exists(folder / "tokenizer.json");
  if (fast) {
    read("tokenizer.json");
  } else {
    read("vocab.json"), read("merges.txt");
  }
  for (const char* name : {"tokenizer_config.json", "special_tokens_map.json", kAddedTokens}) {
    if (fs::exists(folder / name)) read(name);
  }
  return files;
}

CLIPTokenizer MakeCLIPTokenizer(const std::map<std::string, std::string>& files,
                                const fs::path& folder) {
  CLIPTokenizerConfig config;
  if (auto found = files.find("tokenizer_config.json"); found != files.end()) {
    config =
        InFile(folder / found->first, [&] { return CLIPTokenizerConfig::FromJson(found->second); });
  }
  auto make = [&] {
    if (auto found = files.find("tokenizer.json"); found != files.end()) {
      return InFile(folder / found->first, [&] {
        auto [vocabulary, merges] = VocabularyOfFastTokenizer(found->second);
        return CLIPTokenizer(vocabulary, merges, config);
      });
    }
    return InFile(folder / "{vocab.json, merges.txt}", [&] {
      return CLIPTokenizer(files.at("vocab.json"), files.at("merges.txt"), config);
    });
  };
  CLIPTokenizer tokenizer = make();
  AddListedWords(files, folder, tokenizer);
  return tokenizer;
}

const char* ClassOfTokenizer(const std::map<std::string, std::string>& files) {
  return files.contains("vocab.json") ? "CLIPTokenizer" : "CLIPTokenizerFast";
}

std::unique_ptr<CLIPTokenizer> LoadCLIPTokenizer(const fs::path& folder) {
  return std::make_unique<CLIPTokenizer>(MakeCLIPTokenizer(ReadTokenizerFiles(folder), folder));
}

void SaveUNet(const fs::path& folder, UNet2DConditionModel& unet, FloatFormat dtype) {
  Save(folder, kDiffusers, unet, unet.config().ToJson(), dtype);
}

void SaveAutoencoderKL(const fs::path& folder, AutoencoderKL& vae, FloatFormat dtype) {
  Save(folder, kDiffusers, vae, vae.config().ToJson(), dtype);
}

void SaveCLIPTextModel(const fs::path& folder, CLIPTextModel& text_encoder, FloatFormat dtype) {
  Save(folder, kTransformers, text_encoder, text_encoder.config().ToJson(), dtype);
}

}  // namespace calotype
