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
  std::string model;
  std::string unet = "toy16";
  std::string vae;
  std::string instance_prompt;
  bool train_text_encoder = false;
  int64_t resolution = 0;
  int64_t caption_tokens = 0;
  int64_t caption_layers = 0;
  bool center_crop = false;
  bool random_flip = false;
  bool cache_latents = false;
  bool cache_latents_to_disk = false;

  // The forward process.
  std::string prediction_type = "v_prediction";
  std::string beta_schedule = "squaredcos_cap_v2";
  int64_t num_train_timesteps = 1000;
  double snr_gamma = 0;
  double noise_offset = 0;
  double input_perturbation = 0;
  std::string class_data;
  std::string class_prompt;
  int64_t num_class_images = 0;
  double prior_loss_weight = 1;

  // The optimizer and its schedule.
  int64_t train_batch_size = 64;
  int64_t gradient_accumulation_steps = 1;
  int64_t max_train_steps = 1000;
  std::string optimizer = "adamw";
  double learning_rate = -1;
  bool scale_lr = false;
  std::string lr_scheduler = "cosine";
  int64_t lr_warmup_steps = -1;
  int64_t lr_num_cycles = 1;
  double lr_power = 1;
  std::string lr_step_rules;
  double adam_beta1 = 0.9, adam_beta2 = 0.999, adam_epsilon = 1e-8;
  double weight_decay = 0.01;
  double momentum = 0.9;
  double max_grad_norm = 1;
  double ema_decay = 0.995;
  double ema_min_decay = 0;
  int64_t ema_update_after_step = 0;
  bool use_ema_warmup = false;
  double ema_inv_gamma = 1, ema_power = 2.0 / 3;
  double caption_dropout = 0.1;
  double validation_fraction = 0.05;
  uint64_t seed = 0;

  // What happens on the way; may differ between a run and its continuation.
  std::string backend = "eager";
  bool gradient_checkpointing = false;
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
    f("model", o.model,
      "Folder of a model to train on: of a run, or Stable Diffusion as diffusers keeps it (then "
      "the "
      "U-Net trains); empty: a new one",
      false);
    f("unet", o.unet, "Preset (toy16, small32) or a diffusers U-Net config.json", false);
    f("vae", o.vae, "Folder of a diffusers AutoencoderKL on whose latents a new U-Net works",
      false);
    f("instance_prompt", o.instance_prompt,
      "Caption of all pictures in the folder of data, which then needs no metadata.jsonl", false);
    f("train_text_encoder", o.train_text_encoder, "Train CLIP, too, not the U-Net alone", false);
    f("resolution", o.resolution, "Side of the pictures; 0: that of the model", false);
    f("caption_tokens", o.caption_tokens,
      "Words of a caption that are read, in a row behind <start>; 0: 76, a row of 77 as CLIP's",
      false);
    f("caption_layers", o.caption_layers, "Transformer blocks of the caption encoder", false);
    f("center_crop", o.center_crop,
      "Cut the centre out of pictures that are not square, not a random part", false);
    f("random_flip", o.random_flip, "Mirror every other picture, at random", false);
    f("cache_latents", o.cache_latents,
      "Keep what the autoencoder makes of each picture instead of computing it at each draw", true);
    f("cache_latents_to_disk", o.cache_latents_to_disk,
      "The same, and for later runs, too: in the folder .latents beside the pictures", true);
    f("prediction_type", o.prediction_type,
      "What the U-Net predicts: epsilon, v_prediction, sample", false);
    f("beta_schedule", o.beta_schedule, "linear, scaled_linear or squaredcos_cap_v2", false);
    f("num_train_timesteps", o.num_train_timesteps, "Timesteps of the noise schedule", false);
    f("snr_gamma", o.snr_gamma,
      "Min-SNR weights of the loss (epsilon, v_prediction): 5 is usual; 0: none", false);
    f("noise_offset", o.noise_offset,
      "Scale of a noise that is the same in all pixels of a channel", false);
    f("input_perturbation", o.input_perturbation,
      "Scale of a noise that is added to the input but not to the target: 0.1 is usual", false);
    f("class_data", o.class_data,
      "Dreambooth: `shapes` or a folder of captioned pictures of the class that shall be kept; "
      "each "
      "batch has as many of them as of the data",
      false);
    f("class_prompt", o.class_prompt, "As instance_prompt, for the folder of class_data", false);
    f("num_class_images", o.num_class_images,
      "Draw pictures of class_prompt with the model first, until class_data holds as many", false);
    f("prior_loss_weight", o.prior_loss_weight, "Weight of their loss", false);
    f("train_batch_size", o.train_batch_size, "Pictures in a batch", false);
    f("gradient_accumulation_steps", o.gradient_accumulation_steps,
      "Batches whose mean gradient makes one step", false);
    f("max_train_steps", o.max_train_steps, "Optimizer steps", false);
    f("optimizer", o.optimizer, "adamw, adam or sgd", false);
    f("learning_rate", o.learning_rate,
      "Peak learning rate; -1: 2e-3 for a new model, 1e-5 to go on with one", false);
    f("scale_lr", o.scale_lr, "Multiply the learning rate by the pictures of a step", false);
    f("lr_scheduler", o.lr_scheduler,
      "constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial or "
      "piecewise_constant",
      false);
    f("lr_warmup_steps", o.lr_warmup_steps,
      "Steps in which the rate rises from 0; -1: a tenth of all steps, at most 100 (none for "
      "constant and piecewise_constant)",
      false);
    f("lr_num_cycles", o.lr_num_cycles, "Cosines of cosine_with_restarts", false);
    f("lr_power", o.lr_power, "Power of polynomial", false);
    f("lr_step_rules", o.lr_step_rules,
      "piecewise_constant: 1:10,0.1:20,0.01 is a factor 1 before step 10, 0.1 before 20, then 0.01",
      false);
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
    f("ema_min_decay", o.ema_min_decay, "Smallest decay", false);
    f("ema_update_after_step", o.ema_update_after_step,
      "Steps in which the averages are the weights themselves", false);
    f("use_ema_warmup", o.use_ema_warmup,
      "Decay of step s: 1 - (1 + s / ema_inv_gamma)^-ema_power instead of (1 + s) / (10 + s)",
      false);
    f("ema_inv_gamma", o.ema_inv_gamma, "See use_ema_warmup", false);
    f("ema_power", o.ema_power, "See use_ema_warmup", false);
    f("caption_dropout", o.caption_dropout,
      "Share of captions replaced by the empty one, for guidance", false);
    f("validation_fraction", o.validation_fraction,
      "Share of captions held out for the validation loss", false);
    f("seed", o.seed, "Seed of everything random", false);
    f("backend", o.backend, "eager, or jit: the whole step compiled", true);
    f("gradient_checkpointing", o.gradient_checkpointing,
      "Compute inner values again for the gradients instead of keeping them: less memory, more "
      "time",
      true);
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

// Pictures that make one optimizer step.
int64_t PicturesOfAStep(const TrainOptions& options);
// With the default and scale_lr.
double PeakLearningRate(const TrainOptions& options);
// Errors: ValueError naming the field, its value and what is allowed; also for a field that differs
// from its default although the others leave it without effect.
void Validate(const TrainOptions& options);
// The same for fields that a person named, whatever their value: `chosen` names them. Errors:
// ValueError naming a field without effect.
void CheckChosen(const TrainOptions& options, const std::set<std::string>& chosen);
// True if a given model decides the field of that name, so that it can only be set for a new one.
bool DecidedByTheModel(std::string_view field);

// A training command, and the object of train.json that holds what it has besides TrainOptions.
struct TrainingKind {
  const char* command;
  const char* section = nullptr;  // none: nothing
};
constexpr TrainingKind kTrain{"train"};
constexpr TrainingKind kTrainLora{"train lora", "lora"};
constexpr TrainingKind kTrainCustomDiffusion{"train custom-diffusion", "custom_diffusion"};

// The text of a train.json, written at once, so that a folder holds a whole run or none; `own` is
// the JSON of the kind's object. And back. Errors: FileError naming the file and an unknown,
// missing or wrong field.
std::string ToJson(const TrainOptions& options, const TrainingKind& kind = kTrain,
                   std::string_view own = {});
TrainOptions ParseTrainOptions(std::string_view json, const std::filesystem::path& path);
TrainingKind ParseTrainingKind(std::string_view json, const std::filesystem::path& path);

// The parts of "a,b" with the separator ','. Empty ones are left out.
std::vector<std::string> SplitList(const std::string& text, char separator);

}  // namespace calotype
