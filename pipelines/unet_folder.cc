#include "pipelines/unet_folder.h"

#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "core/error.h"
#include "io/atomic_file.h"
#include "io/file.h"
#include "io/safetensors.h"

namespace calotype {

namespace fs = std::filesystem;

namespace {

constexpr std::string_view kDiffusers = "diffusion_pytorch_model", kTransformers = "model";
constexpr uint64_t kMaxText = 1 << 26;  // of configs, indices and vocabularies

// Calls `use`, with the path in front of what it says is wrong with the content.
template <class F>
auto Naming(const fs::path& path, const F& use) {
  try {
    return use();
  } catch (const UnsupportedError& e) {
    Fail<UnsupportedError>("{}: {}", path.string(), e.what());
  } catch (const ValueError& e) {
    Fail("{}: {}", path.string(), e.what());
  }
}

template <class Config>
Config ReadConfig(const fs::path& path) {
  std::string text = ReadFile(path, kMaxText);
  return Naming(path, [&] { return Config::FromJson(text); });
}

void LoadTensors(Layer& layer, std::map<std::string, Tensor> tensors, const fs::path& path) {
  try {
    layer.LoadParameters(std::move(tensors));
  } catch (const ValueError& e) {
    Fail<FileError>("{}: {}", path.string(), e.what());
  }
}

void Save(const fs::path& folder, std::string_view stem, Layer& layer, const std::string& config) {
  std::error_code error;
  fs::create_directories(folder, error);
  Check<FileError>(!error, "{}: cannot make the folder: {}", folder.string(), error.message());
  WriteSafetensors(folder / fmt::format("{}.safetensors", stem), {layer.SaveParameters(), {}});
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
  nlohmann::json index;
  std::map<std::string, std::string> files;
  try {
    index = nlohmann::json::parse(ReadFile(path, kMaxText));
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

}  // namespace

std::map<std::string, Tensor> ReadModelTensors(const fs::path& folder, std::string_view stem) {
  fs::path index = WeightsFile(folder, stem);
  if (index.extension() != ".json") return ReadSafetensors(index).tensors;
  std::map<std::string, std::string> files = ReadShardIndex(index);
  std::set<std::string> shards;
  for (const auto& [name, file] : files) shards.insert(file);
  std::map<std::string, Tensor> tensors;
  for (const std::string& shard : shards) {
    for (auto& [name, tensor] : ReadSafetensors(folder / shard).tensors) {
      auto listed = files.find(name);
      Check<FileError>(listed != files.end() && listed->second == shard,
                       "{}: tensor {} is not listed for this shard in {}",
                       (folder / shard).string(), Quoted(name), index.filename().string());
      tensors.emplace(name, std::move(tensor));
      files.erase(listed);
    }
  }
  Check<FileError>(files.empty(), "{}: shard {} lacks tensor {}", index.string(),
                   files.empty() ? "" : files.begin()->second,
                   files.empty() ? "" : Quoted(files.begin()->first));
  return tensors;
}

UNet2DConditionConfig ReadUNetConfig(const fs::path& path) {
  return ReadConfig<UNet2DConditionConfig>(path);
}

void LoadWeights(Layer& layer, const fs::path& path) {
  LoadTensors(layer, ReadSafetensors(path).tensors, path);
}

std::unique_ptr<UNet2DConditionModel> LoadUNet(const fs::path& folder) {
  auto unet = std::make_unique<UNet2DConditionModel>(ReadUNetConfig(folder / "config.json"));
  LoadTensors(*unet, ReadModelTensors(folder, kDiffusers), WeightsFile(folder, kDiffusers));
  return unet;
}

std::unique_ptr<AutoencoderKL> LoadAutoencoderKL(const fs::path& folder) {
  auto config = ReadConfig<AutoencoderKLConfig>(folder / "config.json");
  auto vae = std::make_unique<AutoencoderKL>(config);
  auto tensors = Naming(WeightsFile(folder, kDiffusers), [&] {
    return AutoencoderKL::CurrentNames(ReadModelTensors(folder, kDiffusers));
  });
  LoadTensors(*vae, std::move(tensors), WeightsFile(folder, kDiffusers));
  return vae;
}

std::unique_ptr<CLIPTextModel> LoadCLIPTextModel(const fs::path& folder) {
  auto config = ReadConfig<CLIPTextConfig>(folder / "config.json");
  auto text_encoder = std::make_unique<CLIPTextModel>(config);
  LoadTensors(*text_encoder, CLIPTextModel::CurrentNames(ReadModelTensors(folder, kTransformers)),
              WeightsFile(folder, kTransformers));
  return text_encoder;
}

std::unique_ptr<CLIPTokenizer> LoadCLIPTokenizer(const fs::path& folder) {
  CLIPTokenizerConfig config;
  fs::path config_path = folder / "tokenizer_config.json";
  if (fs::exists(config_path)) config = ReadConfig<CLIPTokenizerConfig>(config_path);
  std::string vocabulary = ReadFile(folder / "vocab.json", kMaxText);
  std::string merges = ReadFile(folder / "merges.txt", kMaxText);
  return Naming(folder,
                [&] { return std::make_unique<CLIPTokenizer>(vocabulary, merges, config); });
}

void SaveUNet(const fs::path& folder, UNet2DConditionModel& unet) {
  Save(folder, kDiffusers, unet, unet.config().ToJson());
}

void SaveAutoencoderKL(const fs::path& folder, AutoencoderKL& vae) {
  Save(folder, kDiffusers, vae, vae.config().ToJson());
}

void SaveCLIPTextModel(const fs::path& folder, CLIPTextModel& text_encoder) {
  Save(folder, kTransformers, text_encoder, text_encoder.config().ToJson());
}

}  // namespace calotype
