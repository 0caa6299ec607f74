// TrainOptions: everything that decides a training run. Each field is declared once with its name
// and meaning in Visit; the command line, the run folder's train.json and the comparison on resume
// are made from that.
#pragma once

#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace calotype {

struct TrainOptions {
  // What to train on and what to train.
  std::string data = "shapes";
  std::string unet = "toy16";
  int64_t resolution = 0;
  int64_t caption_tokens = 0;
  int64_t caption_layers = 0;

  // The forward process.
  std::string prediction_type = "v_prediction";
  std::string beta_schedule = "squaredcos_cap_v2";
  int64_t num_train_timesteps = 1000;

  // The optimizer and its schedule.
  int64_t train_batch_size = 64;
  int64_t max_train_steps = 1000;
  std::string optimizer = "adamw";
  double learning_rate = 2e-3;
  std::string lr_scheduler = "cosine";
  int64_t lr_warmup_steps = -1;
  double adam_beta1 = 0.9, adam_beta2 = 0.999, adam_epsilon = 1e-8;
  double weight_decay = 0.01;
  double momentum = 0.9;
  double max_grad_norm = 1;
  double ema_decay = 0.995;
  double caption_dropout = 0.1;
  double validation_fraction = 0.05;
  uint64_t seed = 0;

  // What happens on the way; may differ between a run and its continuation.
  std::string backend = "eager";
  int64_t checkpointing_steps = 200;
  int64_t checkpoints_total_limit = 2;
  int64_t validation_steps = 100;
  int64_t sample_steps = 250;
  std::string validation_prompt;

  // Calls f(name, field, help, resumable) for each field; `resumable` fields may change on resume.
  template <class Options, class F>
  static void Visit(Options& o, F&& f) {
    f("data", o.data, "`shapes`, or a folder of pictures with metadata.jsonl (file_name, text)",
      false);
    f("unet", o.unet, "Preset (toy16, small32) or a diffusers U-Net config.json", false);
    f("resolution", o.resolution, "Side of the pictures; 0: sample_size of the U-Net", false);
    f("caption_tokens", o.caption_tokens,
      "Words of a caption that are read; 0: of the longest caption, at most 77", false);
    f("caption_layers", o.caption_layers, "Transformer blocks of the caption encoder", false);
    f("prediction_type", o.prediction_type,
      "What the U-Net predicts: epsilon, v_prediction, sample", false);
    f("beta_schedule", o.beta_schedule, "linear, scaled_linear or squaredcos_cap_v2", false);
    f("num_train_timesteps", o.num_train_timesteps, "Timesteps of the noise schedule", false);
    f("train_batch_size", o.train_batch_size, "Pictures in a step", false);
    f("max_train_steps", o.max_train_steps, "Optimizer steps", false);
    f("optimizer", o.optimizer, "adamw, adam or sgd", false);
    f("learning_rate", o.learning_rate, "Peak learning rate", false);
    f("lr_scheduler", o.lr_scheduler, "constant, linear or cosine, after the warm-up", false);
    f("lr_warmup_steps", o.lr_warmup_steps,
      "Steps in which the rate rises from 0; -1: a tenth of all steps, at most 100", false);
    f("adam_beta1", o.adam_beta1, "Decay of the first moment", false);
    f("adam_beta2", o.adam_beta2, "Decay of the second moment", false);
    f("adam_epsilon", o.adam_epsilon, "Added to the root of the second moment", false);
    f("weight_decay", o.weight_decay, "Decoupled for adamw, added to the gradient for sgd and adam",
      false);
    f("momentum", o.momentum, "Momentum of sgd", false);
    f("max_grad_norm", o.max_grad_norm, "Clip the gradients' total norm to this; 0: no clipping",
      false);
    f("ema_decay", o.ema_decay, "Decay of the averaged weights, which are what is saved; 0: none",
      false);
    f("caption_dropout", o.caption_dropout,
      "Share of captions replaced by the empty one, for guidance", false);
    f("validation_fraction", o.validation_fraction,
      "Share of captions held out for the validation loss", false);
    f("seed", o.seed, "Seed of everything random", false);
    f("backend", o.backend, "eager, or jit: the whole step compiled", true);
    f("checkpointing_steps", o.checkpointing_steps, "Steps between checkpoints; 0: only at the end",
      true);
    f("checkpoints_total_limit", o.checkpoints_total_limit, "Checkpoints to keep; 0: all", true);
    f("validation_steps", o.validation_steps, "Steps between validation losses; 0: only at the end",
      true);
    f("sample_steps", o.sample_steps, "Steps between sample pictures; 0: none", true);
    f("validation_prompt", o.validation_prompt,
      "Prompt of the sample pictures; empty: captions of the data", true);
  }
};

// The options of a continued run: those of `stored`, replaced by those fields of `given` that are
// named in `chosen`. Errors: ValueError naming a chosen field that differs from the run's and may
// not.
TrainOptions MergeForResume(const TrainOptions& stored, const TrainOptions& given,
                            const std::set<std::string>& chosen);

// Errors: ValueError naming the field, its value and what is allowed.
void Validate(const TrainOptions& options);
// The text of a train.json, and back. Errors: FileError naming the file and an unknown, missing or
// wrong field.
std::string ToJson(const TrainOptions& options);
TrainOptions ParseTrainOptions(std::string_view json, const std::filesystem::path& path);

}  // namespace calotype
