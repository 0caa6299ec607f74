// The options of what a run trains besides TrainOptions (LoRA, Custom Diffusion), an object of its
// train.json: a struct with a Visit(options, f) that calls f(name, field, help) for each field.
#pragma once

#include <filesystem>
#include <set>
#include <string>

#include "core/error.h"
#include "io/file.h"
#include "pipelines/options_json.h"
#include "pipelines/train_options.h"
#include "pipelines/training_setup.h"

namespace calotype {

// Of the training of a few numbers beside a model that stays as it is, as in diffusers' scripts.
inline TrainOptions TargetTrainDefaults(double learning_rate) {
  TrainOptions options;
  options.train_batch_size = 4;
  options.learning_rate = learning_rate;
  options.lr_scheduler = "constant";
  options.lr_warmup_steps = 0;
  options.ema_decay = 0;
  options.caption_dropout = 0;
  options.validation_fraction = 0;
  return options;
}

// For a continued run of that kind: both kinds of options as its train.json has them, with
// TrainOptions' resumable fields as given. Errors: ValueError naming a chosen field that differs
// and may not, and as CheckResumes; FileError.
template <class Options>
void OptionsForResume(const std::filesystem::path& folder, const TrainingKind& kind, Options& own,
                      TrainOptions& options, const std::set<std::string>& chosen) {
  CheckResumes(kind, folder);
  const std::filesystem::path path = folder / "train.json";
  const std::string text = ReadFile(path, 1 << 20);
  const auto stored = ParseOptions<Options>(text, path, kind.section);
  const auto given = OptionsDocument(own), kept = OptionsDocument(stored);
  for (const auto& [name, value] : kept.items()) {
    Check(chosen.count(name) == 0 || given.at(name) == value,
          "resume: {} is {} here and {} in the run; a continued run keeps it", name,
          JsonText(given.at(name)), JsonText(value));
  }
  own = stored;
  options = MergeForResume(ParseTrainOptions(text, path), options, chosen);
}

}  // namespace calotype
