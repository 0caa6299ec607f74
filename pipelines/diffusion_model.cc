#include "pipelines/diffusion_model.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <set>

#include "core/error.h"
#include "core/json.h"
#include "diffusion/sampler_names.h"
#include "io/atomic_file.h"
#include "io/file.h"
#include "io/safetensors.h"
#include "pipelines/model_folder.h"

namespace calotype {
namespace {

namespace fs = std::filesystem;

constexpr const char* kWeights = "model.safetensors";
constexpr const char* kOwnClass = "CalotypePipeline";
constexpr const char* kInpaintClass = "StableDiffusionInpaintPipeline";
constexpr std::array kStableDiffusionClasses{"StableDiffusionPipeline",
                                             "StableDiffusionImg2ImgPipeline", kInpaintClass};

std::string ReadText(const fs::path& path) { return ReadFile(path, 64 << 20); }

// The parts that a model_index.json names, name -> class.
struct Index {
  fs::path path;
  bool stable_diffusion = false;
  std::map<std::string, std::string> parts;

  bool Has(const std::string& part) const { return parts.count(part) > 0; }
  // Errors: FileError without the part, UnsupportedError for another class.
  void Require(const std::string& part, const std::string& type) const {
    auto found = parts.find(part);
    Check<FileError>(found != parts.end(), "{}: the model has no {}", path.string(), part);
    Check<UnsupportedFileError>(found->second == type, "{}: {} is a {}, only {} is supported",
                                path.string(), part, Quoted(found->second), type);
  }
};

// What diffusers' pipeline does to files that are older than these fields.
void AsStableDiffusion(SchedulerConfig& scheduler) {
  scheduler.steps_offset = 1;
  scheduler.clip_sample = false;
}

Index ReadIndex(const fs::path& path, const DiffusionModel::Warn& warn) {
  const auto document = ParseJsonObject(ReadText(path), path.string());
  Index index{.path = path};
  auto name = document.find("_class_name");
  Check<FileError>(name != document.end() && name->is_string(),
                   "{}: not the index of a model: _class_name is missing", path.string());
  std::string type = *name;
  index.stable_diffusion =
      std::count(kStableDiffusionClasses.begin(), kStableDiffusionClasses.end(), type) > 0;
  Check<UnsupportedFileError>(index.stable_diffusion || type == kOwnClass,
                              "{}: _class_name {} is not supported; there are {}, {}",
                              path.string(), Quoted(type), kOwnClass,
                              fmt::join(kStableDiffusionClasses, ", "));
  const std::set<std::string> known{"unet",      "vae",       "text_encoder",
                                    "tokenizer", "scheduler", "caption_encoder"};
  std::vector<std::string> left_out;
  for (const auto& [key, value] : document.items()) {
    bool part = value.is_array() && value.size() == 2;
    if (part && value[0].is_null() && value[1].is_null()) continue;  // absent
    if (known.count(key)) {
      Check<FileError>(part && value[1].is_string(),
                       "{}: {} is {}, must be [library, class] or [null, null]", path.string(), key,
                       JsonText(value));
      index.parts[key] = value[1];
    } else if (part) {
      left_out.push_back(key);
    }
  }
  if (warn && !left_out.empty()) {
    warn(fmt::format("{}: not used: {}", path.string(), fmt::join(left_out, ", ")));
  }
  return index;
}

}  // namespace

void CheckUNetInputs(const UNet2DConditionConfig& unet, std::string_view source) {
  auto absent = [&](bool is, std::string_view field, std::string_view input) {
    Check<UnsupportedFileError>(
        is,
        "{}: with {} the U-Net also takes {}, which neither sampling nor training gives; what "
        "works is the U-Net alone: UNet2DConditionModel from C++, or `calotype unet`",
        source, field, input);
  };
  absent(!unet.class_embed_type, "class_embed_type", "class_labels");
  absent(!unet.num_class_embeds, "num_class_embeds", "class_labels");
  absent(!unet.time_cond_proj_dim, "time_cond_proj_dim", "timestep_cond");
}

void DiffusionModel::CheckInputs() const {
  CheckUNetInputs(unet_->config(),
                  folder_.empty() ? "model" : (folder_ / "unet" / "config.json").string());
}

DiffusionModel::DiffusionModel(const UNet2DConditionConfig& unet,
                               const CaptionEncoderConfig& encoder,
                               const SchedulerConfig& scheduler)
    : DiffusionModel(
          DiffusionModelConfig{.unet = unet, .caption_encoder = encoder, .scheduler = scheduler}) {}

DiffusionModel::DiffusionModel(DiffusionModelConfig config)
    : Layer("DiffusionModel"),
      scheduler_(std::move(config.scheduler)),
      scheduler_json_(std::move(config.scheduler_json)),
      tokenizer_(std::move(config.tokenizer)),
      tokenizer_files_(std::move(config.tokenizer_files)) {
  const bool clip = config.text_encoder.has_value();
  Check(clip != config.caption_encoder.has_value(),
        "model: there must be a text encoder or a caption encoder, one of them");
  const char* encoder = clip ? "text" : "caption";
  const int64_t width =
      clip ? config.text_encoder->hidden_size : config.caption_encoder->hidden_size;
  const bool projected = config.unet.encoder_hid_dim.has_value();
  for (int64_t dim :
       projected ? std::vector{*config.unet.encoder_hid_dim} : config.unet.cross_attention_dim) {
    Check(dim == width, "model: the U-Net's {} is {}, the {} encoder's hidden_size {}",
          projected ? "encoder_hid_dim" : "cross_attention_dim", dim, encoder, width);
  }
  const int64_t channels = config.unet.out_channels;
  Check(config.unet.in_channels == channels || config.unet.in_channels == 2 * channels + 1,
        "model: the U-Net has {} input and {} output channels; they must be equal, or {} for one "
        "that also takes a mask and the masked picture",
        config.unet.in_channels, channels, 2 * channels + 1);
  if (config.vae) {
    Check(config.vae->latent_channels == channels,
          "model: the U-Net has {} output channels, the autoencoder's latent_channels is {}",
          channels, config.vae->latent_channels);
    Check(config.vae->in_channels == 3 && config.vae->out_channels == 3,
          "model: the autoencoder has {} input and {} output channels, pictures have 3",
          config.vae->in_channels, config.vae->out_channels);
  } else {
    Check(channels == 3 || !clip,
          "model: the U-Net has {} channels, pictures have 3, and there is no autoencoder",
          channels);
  }
  if (clip) {
    Check(tokenizer_ != nullptr, "model: the text encoder needs a tokenizer");
    Check(tokenizer_->end_of_ids() <= config.text_encoder->vocab_size,
          "model: the tokenizer has {} tokens, the text encoder's vocab_size is {}",
          tokenizer_->end_of_ids(), config.text_encoder->vocab_size);
    Check(tokenizer_->config().model_max_length <= config.text_encoder->max_position_embeddings,
          "model: the tokenizer's model_max_length is {}, the text encoder's "
          "max_position_embeddings {}",
          tokenizer_->config().model_max_length, config.text_encoder->max_position_embeddings);
  } else {
    words_ = config.caption_encoder->Tokenizer();
  }
  unet_ = AddLayer<UNet2DConditionModel>("unet", config.unet);
  if (clip) {
    text_encoder_ = AddLayer<CLIPTextModel>("text_encoder", *config.text_encoder);
  } else {
    caption_encoder_ = AddLayer<CaptionEncoder>("caption_encoder", *config.caption_encoder);
  }
  if (config.vae) vae_ = AddLayer<AutoencoderKL>("vae", *config.vae);
  if (stable_diffusion()) AsStableDiffusion(scheduler_);
  Validate(scheduler_);
}

std::vector<Value> DiffusionModel::ExportComputationGraph(ComputationGraph&,
                                                          std::span<const Value> inputs) {
  return {Denoise(Required(inputs, 0, "sample"), Required(inputs, 1, "timestep"),
                  Encode(Required(inputs, 2, "tokens")))};
}

Value DiffusionModel::Encode(Value tokens) {
  return text_encoder_ ? text_encoder_->Call(tokens) : caption_encoder_->Call(tokens);
}

int64_t DiffusionModel::factor() const { return vae_ ? vae_->config().Factor() : 1; }
int64_t DiffusionModel::caption_tokens() const {
  return tokenizer_ ? tokenizer_->config().model_max_length : caption_encoder_->config().max_length;
}
int64_t DiffusionModel::vocabulary_size() const {
  return text_encoder_ ? text_encoder_->config().vocab_size
                       : static_cast<int64_t>(caption_encoder_->config().vocabulary.size());
}
int64_t DiffusionModel::context_width() const {
  return text_encoder_ ? text_encoder_->config().hidden_size
                       : caption_encoder_->config().hidden_size;
}

SchedulerConfig DiffusionModel::SchedulerFor(std::string_view sampler) const {
  if (sampler.empty()) return scheduler_;
  if (scheduler_json_.empty()) return WithSampler(scheduler_, sampler);
  SchedulerConfig config =
      ParseSchedulerConfig(scheduler_json_, WithSampler(scheduler_, sampler).type);
  if (stable_diffusion()) AsStableDiffusion(config);
  return WithSampler(config, sampler);
}

ParameterPtr DiffusionModel::AddToken(const std::string& token, const Tensor& embeddings) {
  Check(text_encoder_ && tokenizer_,
        "model: the word {} cannot be added: its text encoder is not CLIP", Quoted(token));
  auto tokenizer = std::make_shared<CLIPTokenizer>(*tokenizer_);
  int64_t first = text_encoder_->config().vocab_size;
  for (const ParameterPtr& added : text_encoder_->added_tokens())
    first += added->value().shape()[0];
  tokenizer->AddToken(token, first, std::max<int64_t>(1, embeddings.shape()[0]));
  text_encoder_->AddTokens("text_encoder.added_tokens." + token, embeddings);
  tokenizer_ = std::move(tokenizer);
  return text_encoder_->added_tokens().back();
}

Tensor DiffusionModel::Tokens(std::span<const std::string> texts, const Warn& warn) const {
  std::set<std::string> reported;
  auto report = [&](const std::string& text) {
    if (warn && reported.insert(text).second) warn(text);
  };
  const int64_t length = caption_tokens();
  Tensor tokens({static_cast<int64_t>(texts.size()), length}, DType::kI64);
  int64_t* row = tokens.data<int64_t>();
  for (const std::string& text : texts) {
    if (tokenizer_) {
      CLIPTokenizer::Encoded encoded = tokenizer_->Encode(text);
      if (!encoded.cut.empty()) {
        report(fmt::format("prompt \"{}\": the model reads {} tokens; \"{}\" is cut off", text,
                           length, encoded.cut));
      }
      row = std::copy(encoded.ids.begin(), encoded.ids.end(), row);
      continue;
    }
    CaptionTokenizer::Encoded encoded = words_->Encode(text);
    Check(encoded.words == 0 || static_cast<int64_t>(encoded.unknown.size()) == 0 ||
              std::count(encoded.ids.begin(), encoded.ids.end(), CaptionTokenizer::kUnknown) <
                  std::min(encoded.words, words_->capacity()),
          "prompt \"{}\": the model knows none of its words ({})", text,
          fmt::join(encoded.unknown, ", "));
    for (const std::string& word : encoded.unknown)
      report(fmt::format("the model does not know the word \"{}\"; taken as <unk>", word));
    for (const std::string& word : encoded.cut) {
      report(fmt::format("prompt \"{}\": \"{}\" is behind the {} words that the model reads", text,
                         word, words_->capacity()));
    }
    row = std::copy(encoded.ids.begin(), encoded.ids.end(), row);
  }
  return tokens;
}

std::unique_ptr<DiffusionModel> DiffusionModel::Open(const fs::path& folder, const Warn& warn) {
  auto model = FromFolder(folder, warn);
  for (const auto& part : model->layers()) {
    model->LoadPart(*part, Weights::kCheck);
    part->ReleaseParameters();
  }
  return model;
}

std::unique_ptr<DiffusionModel> DiffusionModel::Load(const fs::path& folder, const Warn& warn) {
  auto model = FromFolder(folder, warn);
  for (const auto& part : model->layers()) model->LoadPart(*part);
  return model;
}

void DiffusionModel::LoadPart(Layer& part, Weights weights) {
  Check(!folder_.empty(), "model: it was not read from a folder, so no weights can be");
  if (&part == unet_) {
    LoadWeightsOf(*unet_, folder_ / "unet", weights);
  } else if (&part == text_encoder_) {
    LoadWeightsOf(*text_encoder_, folder_ / "text_encoder", weights);
  } else if (&part == caption_encoder_) {
    LoadWeights(*caption_encoder_, folder_ / "caption_encoder" / kWeights, weights);
  } else {
    Check<InternalError>(&part == vae_, "model: {} is no part of it", part.type());
    LoadWeightsOf(*vae_, folder_ / "vae", weights);
  }
}

// A model without weights, from the configurations in a folder.
std::unique_ptr<DiffusionModel> DiffusionModel::FromFolder(const fs::path& folder,
                                                           const Warn& warn) {
  const Index index = ReadIndex(folder / "model_index.json", warn);
  index.Require("unet", "UNet2DConditionModel");
  Check<FileError>(index.Has("scheduler"), "{}: the model has no scheduler", index.path.string());
  DiffusionModelConfig config{.unet = ReadUNetConfig(folder / "unet" / "config.json")};
  const bool clip = index.stable_diffusion || !index.Has("caption_encoder");
  if (clip) {
    index.Require("text_encoder", "CLIPTextModel");
    Check<FileError>(index.Has("tokenizer"), "{}: the model has no tokenizer", index.path.string());
    if (index.parts.at("tokenizer") != "CLIPTokenizerFast")
      index.Require("tokenizer", "CLIPTokenizer");
    config.text_encoder = ReadCLIPTextConfig(folder / "text_encoder" / "config.json");
    config.tokenizer_files = ReadTokenizerFiles(folder / "tokenizer");
    config.tokenizer = std::make_shared<CLIPTokenizer>(
        MakeCLIPTokenizer(config.tokenizer_files, folder / "tokenizer"));
  } else {
    index.Require("caption_encoder", "CaptionEncoder");
    fs::path path = folder / "caption_encoder" / "config.json";
    config.caption_encoder =
        InFile(path, [&] { return CaptionEncoderConfig::FromJson(ReadText(path)); });
  }
  if (index.stable_diffusion || index.Has("vae")) {
    index.Require("vae", "AutoencoderKL");
    config.vae = ReadAutoencoderKLConfig(folder / "vae" / "config.json");
  }
  fs::path scheduler = folder / "scheduler" / "scheduler_config.json";
  config.scheduler_json = ReadText(scheduler);
  config.scheduler = InFile(scheduler, [&] {
    return ParseSchedulerConfig(config.scheduler_json, index.parts.at("scheduler"));
  });

  auto model = InFile(folder, [&] { return std::make_unique<DiffusionModel>(std::move(config)); });
  model->folder_ = folder;
  model->SetTrainingMode(false);
  return model;
}

void DiffusionModel::Save(const fs::path& folder) {
  auto make = [&](const char* part) {
    std::error_code error;
    fs::create_directories(folder / part, error);
    Check<FileError>(!error, "{}: cannot make the folder: {}", (folder / part).string(),
                     error.message());
    return folder / part;
  };
  const char* type = !stable_diffusion() ? kOwnClass
                     : takes_mask()      ? kInpaintClass
                                         : kStableDiffusionClasses[0];
  nlohmann::ordered_json index = {{"_class_name", type},
                                  {"_calotype_version", CALOTYPE_VERSION},
                                  {"unet", {"diffusers", "UNet2DConditionModel"}}};
  SaveUNet(folder / "unet", *unet_);
  if (text_encoder_) {
    SaveCLIPTextModel(folder / "text_encoder", *text_encoder_);
    fs::path part = make("tokenizer");
    for (const auto& [name, content] : tokenizer_files_) WriteFile(part / name, content);
    index["text_encoder"] = {"transformers", "CLIPTextModel"};
    index["tokenizer"] = {"transformers", ClassOfTokenizer(tokenizer_files_)};
  } else {
    fs::path part = make("caption_encoder");
    WriteSafetensors(part / kWeights, {caption_encoder_->SaveParameters(), {}});
    WriteFile(part / "config.json", caption_encoder_->config().ToJson());
    index["caption_encoder"] = {"calotype", "CaptionEncoder"};
  }
  if (vae_) {
    SaveAutoencoderKL(folder / "vae", *vae_);
    index["vae"] = {"diffusers", "AutoencoderKL"};
  }
  WriteFile(make("scheduler") / "scheduler_config.json",
            scheduler_json_.empty() ? ToJson(scheduler_) : scheduler_json_);
  index["scheduler"] = {"diffusers", scheduler_.type};
  if (stable_diffusion()) {
    for (const char* part : {"safety_checker", "feature_extractor"})
      index[part] = nlohmann::ordered_json::array({nullptr, nullptr});
    index["requires_safety_checker"] = false;
  }
  WriteFile(folder / "model_index.json", JsonFile(index));
}

}  // namespace calotype
