#include "pipelines/train_options.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <set>
#include <variant>

#include "core/error.h"
#include "core/json.h"
#include "pipelines/options_json.h"

namespace calotype {
namespace {

using nlohmann::ordered_json;

void OneOf(std::string_view field, const std::string& value,
           std::initializer_list<const char*> allowed) {
  std::string list;
  for (const char* a : allowed) {
    if (value == a) return;
    list += std::string(list.empty() ? "" : ", ") + a;
  }
  Fail("training: {} is `{}`, must be one of {}", field, value, list);
}

constexpr std::array<std::string_view, 7> kOfTheModel{"unet",
                                                      "vae",
                                                      "caption_tokens",
                                                      "caption_layers",
                                                      "prediction_type",
                                                      "beta_schedule",
                                                      "num_train_timesteps"};

// Errors: ValueError for a field that is `chosen` or not as by default although nothing reads it.
void CheckEffect(const TrainOptions& o, const std::set<std::string>& chosen) {
  const ordered_json values = OptionsDocument(o), defaults = OptionsDocument(TrainOptions());
  auto set = [&](const std::string& field) {
    return chosen.count(field) > 0 || values.at(field) != defaults.at(field);
  };
  auto check = [&](const char* field, bool has_effect, const char* with) {
    Check(has_effect || !set(field), "training: {} has no effect without {}", field, with);
  };
  for (std::string_view field : kOfTheModel) {
    Check(o.model.empty() || !set(std::string(field)),
          "training: {} has no effect on the model in {}", field, o.model);
  }
  check("cache_latents", !o.model.empty() || !o.vae.empty(), "model or vae");
  check("cache_latents_to_disk", !o.model.empty() || !o.vae.empty(), "model or vae");
  check("lr_num_cycles", o.lr_scheduler == "cosine_with_restarts",
        "lr_scheduler cosine_with_restarts");
  check("lr_power", o.lr_scheduler == "polynomial", "lr_scheduler polynomial");
  check("lr_step_rules", o.lr_scheduler == "piecewise_constant", "lr_scheduler piecewise_constant");
  check("ema_update_after_step", o.ema_decay > 0, "ema_decay");
  check("use_ema_warmup", o.ema_decay > 0, "ema_decay");
  check("ema_inv_gamma", o.use_ema_warmup, "use_ema_warmup");
  check("ema_power", o.use_ema_warmup, "use_ema_warmup");
  check("prior_loss_weight", !o.class_data.empty(), "class_data");
  check("class_prompt", !o.class_data.empty() && o.class_data != "shapes",
        "a folder of class_data");
  check("num_class_images", !o.model.empty(), "model");
  check("num_class_images", !o.class_prompt.empty(), "class_prompt");
  check("instance_prompt", o.data != "shapes", "a folder of data");
  check("train_text_encoder", !o.model.empty(), "model");
  const bool folder = o.data != "shapes" || (!o.class_data.empty() && o.class_data != "shapes");
  check("cache_latents_to_disk", folder, "a folder of pictures");
  check("center_crop", folder, "a folder of pictures");
  check("random_flip", folder, "a folder of pictures");
}

}  // namespace

void Validate(const TrainOptions& o) {
  OneOf("prediction_type", o.prediction_type, {"epsilon", "v_prediction", "sample"});
  OneOf("beta_schedule", o.beta_schedule, {"linear", "scaled_linear", "squaredcos_cap_v2"});
  OneOf("optimizer", o.optimizer, {"adamw", "adam", "sgd"});
  OneOf("lr_scheduler", o.lr_scheduler,
        {"constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts",
         "polynomial", "piecewise_constant"});
  OneOf("backend", o.backend, {"eager", "jit"});
  auto in_range = [](const char* field, double value, double low, double high) {
    Check(value >= low && value <= high, "training: {} is {}, must be in [{}, {}]", field, value,
          low, high);
  };
  in_range("resolution", static_cast<double>(o.resolution), 0, 4096);
  in_range("caption_tokens", static_cast<double>(o.caption_tokens), 0, 1024);
  in_range("caption_layers", static_cast<double>(o.caption_layers), 0, 64);
  in_range("num_train_timesteps", static_cast<double>(o.num_train_timesteps), 1, 1e6);
  in_range("num_class_images", static_cast<double>(o.num_class_images), 0, 1e5);
  in_range("prior_loss_weight", o.prior_loss_weight, 0, 1e6);
  in_range("train_batch_size", static_cast<double>(o.train_batch_size), 1, 65536);
  in_range("gradient_accumulation_steps", static_cast<double>(o.gradient_accumulation_steps), 1,
           65536);
  in_range("snr_gamma", o.snr_gamma, 0, 1e6);
  in_range("noise_offset", o.noise_offset, 0, 10);
  in_range("input_perturbation", o.input_perturbation, 0, 10);
  in_range("max_train_steps", static_cast<double>(o.max_train_steps), 1, 1e9);
  if (o.learning_rate != -1) in_range("learning_rate", o.learning_rate, 0, 1000);
  in_range("lr_warmup_steps", static_cast<double>(o.lr_warmup_steps), -1, 1e9);
  in_range("lr_num_cycles", static_cast<double>(o.lr_num_cycles), 1, 1e6);
  in_range("lr_power", o.lr_power, 1e-6, 1e6);
  in_range("adam_beta1", o.adam_beta1, 0, 1);
  in_range("adam_beta2", o.adam_beta2, 0, 1);
  in_range("adam_epsilon", o.adam_epsilon, 0, 1);
  in_range("weight_decay", o.weight_decay, 0, 1000);
  in_range("momentum", o.momentum, 0, 1);
  in_range("max_grad_norm", o.max_grad_norm, 0, 1e30);
  in_range("ema_decay", o.ema_decay, 0, 1);
  in_range("ema_min_decay", o.ema_min_decay, 0, o.ema_decay);
  in_range("ema_update_after_step", static_cast<double>(o.ema_update_after_step), 0, 1e9);
  in_range("ema_inv_gamma", o.ema_inv_gamma, 1e-30, 1e30);
  in_range("ema_power", o.ema_power, 1e-30, 1e30);
  in_range("caption_dropout", o.caption_dropout, 0, 1);
  in_range("validation_fraction", o.validation_fraction, 0, 0.9);
  in_range("checkpointing_steps", static_cast<double>(o.checkpointing_steps), 0, 1e9);
  in_range("checkpoints_total_limit", static_cast<double>(o.checkpoints_total_limit), 0, 1e6);
  in_range("validation_steps", static_cast<double>(o.validation_steps), 0, 1e9);
  in_range("sample_steps", static_cast<double>(o.sample_steps), 0, 1e9);
  Check(o.snr_gamma == 0 || o.prediction_type != "sample",
        "training: snr_gamma is for prediction_type epsilon and v_prediction, not sample");
  CheckEffect(o, {});
}

void CheckChosen(const TrainOptions& o, const std::set<std::string>& chosen) {
  CheckEffect(o, chosen);
  // What may stay as it is in options that were made by a program has no effect if a person asks.
  const std::string optimizer = "optimizer " + o.optimizer;
  const bool sgd = o.optimizer == "sgd";
  auto check = [&](const char* field, bool has_effect, const std::string& because) {
    Check(has_effect || chosen.count(field) == 0, "training: {} has no effect with {}", field,
          because);
  };
  check("momentum", sgd, optimizer);
  for (const char* field : {"adam_beta1", "adam_beta2", "adam_epsilon"})
    check(field, !sgd, optimizer);
  check("validation_steps", o.validation_fraction > 0, "validation_fraction 0");
  check("validation_prompt", o.sample_steps > 0, "sample_steps 0");
}

bool DecidedByTheModel(std::string_view field) {
  return std::ranges::find(kOfTheModel, field) != kOfTheModel.end();
}

int64_t PicturesOfAStep(const TrainOptions& o) {
  return o.train_batch_size * o.gradient_accumulation_steps;
}

double PeakLearningRate(const TrainOptions& o) {
  double rate = o.learning_rate != -1 ? o.learning_rate : o.model.empty() ? 2e-3 : 1e-5;
  return o.scale_lr ? rate * static_cast<double>(PicturesOfAStep(o)) : rate;
}

TrainOptions MergeForResume(const TrainOptions& stored, const TrainOptions& given,
                            const std::set<std::string>& chosen) {
  using Field =
      std::variant<const std::string*, const int64_t*, const double*, const uint64_t*, const bool*>;
  std::vector<Field> fields;
  TrainOptions::Visit(given, [&](const char*, const auto& field, const char*, bool) {
    fields.emplace_back(&field);
  });
  TrainOptions merged = stored;
  size_t next = 0;
  TrainOptions::Visit(merged, [&](const char* name, auto& field, const char*, bool resumable) {
    const auto& wanted = *std::get<const std::decay_t<decltype(field)>*>(fields[next++]);
    if (chosen.count(name) == 0 || wanted == field) return;
    Check(resumable, "resume: {} is {} here and {} in the run; a continued run keeps it", name,
          wanted, field);
    field = wanted;
  });
  return merged;
}

std::string ToJson(const TrainOptions& options, const TrainingKind& kind, std::string_view own) {
  ordered_json document = OptionsDocument(options);
  if (kind.section) document[kind.section] = ParseJson<ordered_json>(own);
  return JsonFile(document);
}

TrainOptions ParseTrainOptions(std::string_view text, const std::filesystem::path& path) {
  return ParseOptions<TrainOptions>(text, path, "",
                                    {kTrainLora.section, kTrainCustomDiffusion.section});
}

TrainingKind ParseTrainingKind(std::string_view text, const std::filesystem::path& path) {
  const auto document = ParseJsonObject(text, path.string() + ": not a training options file");
  const bool lora = document.contains(kTrainLora.section),
             custom = document.contains(kTrainCustomDiffusion.section);
  Check<FileError>(!lora || !custom, "{}: has both `{}` and `{}`, a run is one of them",
                   path.string(), kTrainLora.section, kTrainCustomDiffusion.section);
  return lora ? kTrainLora : custom ? kTrainCustomDiffusion : kTrain;
}

std::vector<std::string> SplitList(const std::string& text, char separator) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= text.size();) {
    size_t end = std::min(text.find(separator, begin), text.size());
    if (end > begin) parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

}  // namespace calotype
