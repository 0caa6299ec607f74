#include "pipelines/lora_training.h"

#include <cmath>

#include "pipelines/lora.h"
#include "pipelines/target_options.h"
#include "pipelines/training_setup.h"

namespace calotype {

namespace fs = std::filesystem;

void Validate(const LoraTrainOptions& o) {
  Check(o.rank >= 1 && o.rank <= 65536, "training: rank is {}, must be in [1, 65536]", o.rank);
  Check(std::isfinite(o.alpha) && o.alpha >= 0, "training: alpha is {}, must be 0 or more",
        o.alpha);
  Check(!SplitList(o.targets, ',').empty() || o.train_text_encoder, "training: no targets");
  Check(o.train_text_encoder || o.text_encoder_targets.empty(),
        "training: text_encoder_targets has no effect without train_text_encoder");
  Check(ParseLoraDialect(o.format) != LoraDialect::kProcessor,
        "training: format processor is read only; write peft, diffusers or kohya");
}

TrainOptions LoraTrainDefaults() { return TargetTrainDefaults(/*learning_rate=*/1e-4); }

fs::path LoraFileOf(const fs::path& folder, std::string_view format) {
  return folder /
         (format == "kohya" ? "lora_kohya.safetensors" : "pytorch_lora_weights.safetensors");
}

namespace {

int64_t AddTerms(DiffusionModel& model, const LoraTrainOptions& lora, uint64_t seed) {
  LoraConfig config{.rank = lora.rank, .targets = SplitList(lora.targets, ','), .seed = seed};
  if (lora.alpha > 0) config.alpha = lora.alpha;
  if (lora.train_text_encoder) {
    config.text_encoder_targets = SplitList(lora.text_encoder_targets, ',');
    if (config.text_encoder_targets.empty() && model.text_encoder())
      config.text_encoder_targets = {"q_proj", "k_proj", "v_proj", "out_proj"};
    if (config.text_encoder_targets.empty()) config.text_encoder_targets = config.targets;
  }
  return AddLora(LoraModelOf(model), config);
}

}  // namespace

TrainResult TrainLora(LoraTrainOptions lora, TrainOptions options, const fs::path& folder,
                      bool resume, const std::set<std::string>& chosen, TrainCallbacks callbacks) {
  if (resume) OptionsForResume(folder, kTrainLora, lora, options, chosen);
  Validate(lora);
  auto message = [&](const std::string& text) {
    if (callbacks.message) callbacks.message(text);
  };
  Check(!options.model.empty(), "training: a LoRA needs a model to be trained on");
  Check(!options.train_text_encoder,
        "training: train_text_encoder is an option of the LoRA, not of what it is trained with");
  const std::vector<fs::path> results{LoraFileOf(folder, lora.format)};
  auto [data, model] = BeginTraining(
      options, chosen, folder, resume, results, callbacks,
      [&](DiffusionModel& opened, const Dataset&) { AddTerms(opened, lora, options.seed); });
  const int64_t terms = AddTerms(*model, lora, options.seed);
  const LoraModel target = LoraModelOf(*model);
  TrainTarget trained{.parameters = LoraParameters(target),
                      .save =
                          [&](const fs::path& run) {
                            SaveLora(LoraFileOf(run, lora.format), CollectLora(target),
                                     ParseLoraDialect(lora.format));
                          },
                      .kind = kTrainLora,
                      .own_options = OptionsToJson(lora),
                      .results = results};
  int64_t numbers = 0;
  for (const ParameterPtr& p : trained.parameters) numbers += p->value().elements();
  message(fmt::format("{} captions, {} terms of {} numbers beside {} parameters, {} steps of {}",
                      data->size(), terms, numbers, model->ParameterCount() - numbers,
                      options.max_train_steps, PicturesOfAStep(options)));
  return Trainer(*model, *data, options, folder, resume, callbacks, trained).Run();
}

}  // namespace calotype
