#include "pipelines/diffusion_model.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "core/error.h"
#include "io/atomic_file.h"
#include "io/file.h"
#include "io/safetensors.h"
#include "pipelines/unet_folder.h"

namespace calotype {
namespace {

namespace fs = std::filesystem;

constexpr const char* kWeights = "model.safetensors";

std::string ReadText(const fs::path& path) { return ReadFile(path, 64 << 20); }

// Runs f; the text of a ValueError is led by the path of the file it is about.
template <class F>
auto InFile(const fs::path& path, F&& f) {
  try {
    return f();
  } catch (const UnsupportedError& e) {
    Fail<UnsupportedError>("{}: {}", path.string(), e.what());
  } catch (const ValueError& e) {
    Fail("{}: {}", path.string(), e.what());
  }
}

}  // namespace

DiffusionModel::DiffusionModel(const UNet2DConditionConfig& unet,
                               const CaptionEncoderConfig& encoder,
                               const SchedulerConfig& scheduler)
    : Layer("DiffusionModel"), scheduler_(scheduler), tokenizer_(encoder.Tokenizer()) {
  Validate(scheduler);
  for (int64_t width : unet.cross_attention_dim) {
    Check(width == encoder.hidden_size,
          "model: the U-Net's cross_attention_dim is {}, the caption encoder's hidden_size {}",
          width, encoder.hidden_size);
  }
  Check(unet.in_channels == unet.out_channels,
        "model: the U-Net has {} input and {} output channels; they must be equal",
        unet.in_channels, unet.out_channels);
  unet_ = AddLayer<UNet2DConditionModel>("unet", unet);
  encoder_ = AddLayer<CaptionEncoder>("caption_encoder", encoder);
}

std::vector<Value> DiffusionModel::ExportComputationGraph(ComputationGraph&,
                                                          std::span<const Value> inputs) {
  return {Denoise(Required(inputs, 0, "sample"), Required(inputs, 1, "timestep"),
                  Encode(Required(inputs, 2, "tokens")))};
}

Tensor DiffusionModel::Tokens(std::span<const std::string> texts,
                              const std::function<void(const std::string&)>& warn) const {
  std::set<std::string> reported;
  Tensor tokens({static_cast<int64_t>(texts.size()), tokenizer_.length()}, DType::kI64);
  for (size_t i = 0; i < texts.size(); ++i) {
    CaptionTokenizer::Encoded encoded = tokenizer_.Encode(texts[i]);
    Check(encoded.words == 0 || static_cast<int64_t>(encoded.unknown.size()) == 0 ||
              std::count(encoded.ids.begin(), encoded.ids.end(), CaptionTokenizer::kUnknown) <
                  std::min(encoded.words, tokenizer_.length()),
          "prompt \"{}\": the model knows none of its words ({})", texts[i],
          fmt::join(encoded.unknown, ", "));
    auto report = [&](const std::string& text) {
      if (warn && reported.insert(text).second) warn(text);
    };
    for (const std::string& word : encoded.unknown)
      report(fmt::format("the model does not know the word \"{}\"; taken as <unk>", word));
    for (const std::string& word : encoded.cut) {
      report(fmt::format("prompt \"{}\": \"{}\" is behind the {} words that the model reads",
                         texts[i], word, tokenizer_.length()));
    }
    std::copy(encoded.ids.begin(), encoded.ids.end(),
              tokens.data<int64_t>() + static_cast<int64_t>(i) * tokenizer_.length());
  }
  return tokens;
}

std::unique_ptr<DiffusionModel> DiffusionModel::Load(const fs::path& folder) {
  fs::path index = folder / "model_index.json",
           scheduler = folder / "scheduler" / "scheduler_config.json",
           encoder = folder / "caption_encoder" / "config.json";
  auto document = nlohmann::json::parse(ReadText(index), nullptr, false);
  Check<FileError>(
      document.is_object() && document.value("_class_name", nlohmann::json()) == "CalotypePipeline",
      "{}: not the index of a Calotype model (_class_name CalotypePipeline)", index.string());
  auto unet_config = ReadUNetConfig(folder / "unet" / "config.json");
  auto encoder_config =
      InFile(encoder, [&] { return CaptionEncoderConfig::FromJson(ReadText(encoder)); });
  auto scheduler_config =
      InFile(scheduler, [&] { return ParseSchedulerConfig(ReadText(scheduler)); });
  auto model = InFile(folder, [&] {
    return std::make_unique<DiffusionModel>(unet_config, encoder_config, scheduler_config);
  });
  LoadWeights(model->unet(), folder / "unet" / "diffusion_pytorch_model.safetensors");
  LoadWeights(model->encoder(), folder / "caption_encoder" / kWeights);
  model->SetTrainingMode(false);
  return model;
}

void DiffusionModel::Save(const fs::path& folder) {
  std::error_code error;
  for (const char* part : {"caption_encoder", "scheduler"}) {
    if (!error) fs::create_directories(folder / part, error);
  }
  Check<FileError>(!error, "{}: cannot make the folder: {}", folder.string(), error.message());
  SaveUNet(folder / "unet", *unet_);
  WriteSafetensors(folder / "caption_encoder" / kWeights, {encoder_->SaveParameters(), {}});
  WriteFile(folder / "caption_encoder" / "config.json", encoder_->config().ToJson());
  WriteFile(folder / "scheduler" / "scheduler_config.json", ToJson(scheduler_));
  nlohmann::ordered_json index = {{"_class_name", "CalotypePipeline"},
                                  {"_calotype_version", CALOTYPE_VERSION},
                                  {"unet", {"diffusers", "UNet2DConditionModel"}},
                                  {"caption_encoder", {"calotype", "CaptionEncoder"}},
                                  {"scheduler", {"diffusers", scheduler_.type}}};
  WriteFile(folder / "model_index.json", index.dump(2) + "\n");
}

}  // namespace calotype
