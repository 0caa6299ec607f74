// Training of a LoRA: low-rank terms are added to a model of any kind (pictures or latents), the
// Trainer trains them and nothing else, and the result is a LoRA file in the run folder.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <string_view>

#include "pipelines/trainer.h"

namespace calotype {

struct LoraTrainOptions {
  int64_t rank = 4;
  double alpha = 0;  // 0: rank
  std::string targets = "to_q,to_k,to_v,to_out.0";
  bool train_text_encoder = false;
  std::string text_encoder_targets;
  std::string format = "peft";

  // Calls f(name, field, help) for each field; none may change when a run is continued.
  template <class Options, class F>
  static void Visit(Options& o, F&& f) {
    f("rank", o.rank, "Rank of the terms");
    f("alpha", o.alpha, "The terms are multiplied by alpha / rank; 0: by 1");
    f("targets", o.targets, "Layers of the U-Net that get terms: ends of their paths");
    f("train_text_encoder", o.train_text_encoder, "Terms for the text encoder, too");
    f("text_encoder_targets", o.text_encoder_targets,
      "Its layers [q_proj,k_proj,v_proj,out_proj; of a run's caption encoder the targets]");
    f("format", o.format, "Spelling of the file: peft, diffusers or kohya");
  }
};

// Errors: ValueError naming the field, its value and what is allowed.
void Validate(const LoraTrainOptions& options);

// Defaults for training a LoRA: those of diffusers' script train_text_to_image_lora.py (learning
// rate 1e-4, constant; no averages, no held-out captions).
TrainOptions LoraTrainDefaults();

// The file that a run writes: pytorch_lora_weights.safetensors, in kohya's spelling
// lora_kohya.safetensors.
std::filesystem::path LoraFileOf(const std::filesystem::path& folder, std::string_view format);

// Trains terms for options.model in `folder`, see Trainer; the folder also holds the LoRA file,
// written with each checkpoint and at the end. With `resume`, the options of the run count; those
// given must be the same where `chosen` (names of LoraTrainOptions' and TrainOptions' fields) has
// them, except for TrainOptions' resumable fields. Errors: ValueError without a model, for a LoRA
// file that would be overwritten and for chosen options without effect; those of Trainer, MakeModel
// and AddLora.
TrainResult TrainLora(LoraTrainOptions lora, TrainOptions options,
                      const std::filesystem::path& folder, bool resume = false,
                      const std::set<std::string>& chosen = {}, TrainCallbacks callbacks = {});

}  // namespace calotype
