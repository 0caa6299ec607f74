#include "pipelines/training_setup.h"

#include <algorithm>
#include <string_view>
#include <system_error>

#include "core/error.h"
#include "io/file.h"
#include "io/image_folder.h"
#include "io/shapes.h"
#include "models/presets.h"
#include "pipelines/class_pictures.h"
#include "pipelines/model_folder.h"
#include "pipelines/trainer.h"

namespace calotype {
namespace {

// <start> and the words of a caption in a row as long as CLIP's. Most of it is padding, on which
// pixels that no word helps can rest (docs/prompts.md has figures for shorter rows).
constexpr int64_t kCaptionRow = 77;

// Pixels of a side that the model is made for.
int64_t SideOf(const TrainOptions& options) {
  std::filesystem::path model = options.model, vae = options.vae;
  UNet2DConditionConfig unet =
      model.empty() ? UNetOf(options.unet) : ReadUNetConfig(model / "unet" / "config.json");
  if (std::filesystem::exists(model / "vae")) vae = model / "vae";
  int64_t factor = vae.empty() ? 1 : ReadAutoencoderKLConfig(vae / "config.json").Factor();
  Check(unet.sample_size.value_or(0) > 0,
        "training: the U-Net {} has no sample_size; give a resolution",
        model.empty() ? options.unet : options.model);
  return *unet.sample_size * factor;
}

void Freeze(Layer* layer) {
  if (!layer) return;
  for (const ParameterPtr& parameter : layer->NamedParameters()) parameter->set_trainable(false);
}

void CheckSide(const Dataset& data, int64_t factor) {
  Check(data.side() % factor == 0,
        "training: the pictures have {} pixels a side, expected a multiple of {}; give another "
        "resolution",
        data.side(), factor);
}

// Errors: what of a model that options.model names does not fit the rest.
void CheckModel(const TrainOptions& options, const Dataset& data, DiffusionModel& model) {
  Check<UnsupportedFileError>(!model.takes_mask(),
                              "{}: a U-Net that takes a mask cannot be trained", options.model);
  model.CheckInputs();
  CheckSide(data, model.factor());
  Check(!options.train_text_encoder || model.text_encoder(),
        "training: train_text_encoder has no effect on {}, whose caption encoder trains anyway",
        options.model);
  for (auto [field, on] : {std::pair{"cache_latents", options.cache_latents},
                           {"cache_latents_to_disk", options.cache_latents_to_disk}}) {
    Check(!on || model.vae(), "training: {} has no effect on {}, which has no autoencoder", field,
          options.model);
  }
}

}  // namespace

void CheckResumes(const TrainingKind& kind, const std::filesystem::path& folder) {
  Check<FileError>(HoldsRun(folder), "{}: there is no run to resume", folder.string());
  const std::filesystem::path path = folder / "train.json";
  const std::string text = ReadFile(path);
  ParseTrainOptions(text, path);  // first: no command continues a run of an earlier version
  const TrainingKind found = ParseTrainingKind(text, path);
  Check(std::string_view(found.command) == kind.command,
        "{} holds a run of `{}`, which continues it: calotype {} --out {} --resume",
        folder.string(), found.command, found.command, folder.string());
}

TrainingParts BeginTraining(const TrainOptions& options, const std::set<std::string>& chosen,
                            const std::filesystem::path& folder, bool resume,
                            std::span<const std::filesystem::path> results,
                            const TrainCallbacks& callbacks,
                            const std::function<void(DiffusionModel&, const Dataset&)>& check) {
  CheckRun(options, folder, resume, /*writes_model=*/results.empty());
  CheckChosen(options, chosen);
  for (const std::filesystem::path& file : results) {
    std::error_code ignored;  // a folder that cannot be looked into is an error where it is written
    Check(resume || !std::filesystem::exists(file, ignored),
          "{} is there, and the run would overwrite it; choose another folder", file.string());
  }
  auto warn = [&](const std::string& text) {
    if (callbacks.message) callbacks.message("warning: " + text);
  };
  TrainingParts parts{.data = OpenDataset(options, warn), .model = nullptr};
  if (options.num_class_images > 0 && !resume) {
    auto model = DiffusionModel::Open(options.model);
    CheckModel(options, *parts.data, *model);
    if (model->text_encoder()) model->LoadPart(*model->text_encoder());
    if (check) check(*model, *parts.data);
    model.reset();
    DrawClassPictures(options, callbacks);
  }
  parts.model = MakeModel(options, *parts.data, warn);
  return parts;
}

UNet2DConditionConfig UNetOf(const std::string& name) {
  auto names = UNetPresetNames();
  if (std::count(names.begin(), names.end(), name)) return UNetPreset(name);
  Check(name.find('.') != std::string::npos || name.find('/') != std::string::npos,
        "the U-Net is `{}`, must be one of {}, or the path of a diffusers config.json", name,
        fmt::join(names, ", "));
  return ReadUNetConfig(name);
}

std::unique_ptr<Dataset> OpenDataset(const TrainOptions& options, const WarningCallback& warn) {
  if (options.data == "shapes") {
    Check(options.resolution == 0 || options.resolution == kShapesSide,
          "training: the data set shapes has {} pixels a side, not {}", kShapesSide,
          options.resolution);
    return std::make_unique<ShapesDataset>();
  }
  int64_t side = options.resolution > 0 ? options.resolution : SideOf(options);
  return std::make_unique<ImageFolder>(options.data,
                                       ImageFolder::Options{.side = static_cast<int>(side),
                                                            .center_crop = options.center_crop,
                                                            .random_flip = options.random_flip,
                                                            .caption = options.instance_prompt},
                                       warn);
}

std::unique_ptr<Dataset> OpenClassDataset(const TrainOptions& options, const Dataset& data,
                                          const WarningCallback& warn) {
  if (options.class_data.empty()) return nullptr;
  TrainOptions of_class = options;
  of_class.data = options.class_data;
  of_class.instance_prompt = options.class_prompt;
  if (options.resolution == 0 && options.class_data != "shapes") of_class.resolution = data.side();
  return OpenDataset(of_class, warn);
}

std::vector<std::string> Captions(const Dataset& data) {
  std::vector<std::string> captions;
  for (int64_t i = 0; i < data.size(); ++i) {
    for (std::string& caption : data.captions(i)) captions.push_back(std::move(caption));
  }
  return captions;
}

std::unique_ptr<DiffusionModel> MakeModel(const TrainOptions& options, const Dataset& data,
                                          const WarningCallback& warn) {
  if (!options.model.empty()) {
    auto model = DiffusionModel::Load(options.model, warn);
    CheckModel(options, data, *model);
    if (!options.train_text_encoder) Freeze(model->text_encoder());
    Freeze(model->vae());
    return model;
  }
  SchedulerConfig scheduler;
  scheduler.num_train_timesteps = options.num_train_timesteps;
  scheduler.prediction_type = options.prediction_type;
  scheduler.beta_schedule = options.beta_schedule;
  if (options.beta_schedule == "scaled_linear")
    scheduler.beta_start = 0.00085, scheduler.beta_end = 0.012;
  scheduler.timestep_spacing = "trailing";

  UNet2DConditionConfig unet = UNetOf(options.unet);
  CheckUNetInputs(unet, options.unet);
  std::optional<AutoencoderKLConfig> vae;
  if (!options.vae.empty()) {
    vae = ReadAutoencoderKLConfig(std::filesystem::path(options.vae) / "config.json");
    CheckSide(data, vae->Factor());
    unet.sample_size = data.side() / vae->Factor();
    unet.in_channels = unet.out_channels = vae->latent_channels;
  } else {
    unet.sample_size = data.side();
    Check(unet.in_channels == 3, "training: pictures have 3 channels, the U-Net {} has {}",
          options.unet, unet.in_channels);
  }
  std::vector<std::string> captions = Captions(data);
  // Only its captions count here: the Trainer opens it again and reports what is wrong with it.
  if (auto class_data = OpenClassDataset(options, data, {})) {
    for (std::string& caption : Captions(*class_data)) captions.push_back(std::move(caption));
  }
  CaptionEncoderConfig encoder;
  encoder.vocabulary = CaptionTokenizer::BuildVocabulary(captions);
  encoder.max_length = options.caption_tokens > 0 ? 1 + options.caption_tokens : kCaptionRow;
  encoder.hidden_size = unet.context_width();
  encoder.num_layers = options.caption_layers;
  auto model = std::make_unique<DiffusionModel>(DiffusionModelConfig{
      .unet = unet, .caption_encoder = encoder, .vae = vae, .scheduler = scheduler});
  model->Initialize(options.seed);
  if (vae) {
    LoadWeightsOf(*model->vae(), options.vae);
    Freeze(model->vae());
  }
  return model;
}

}  // namespace calotype
