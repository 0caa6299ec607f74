// Training of Custom Diffusion: copies of the cross-attention's projections and new words are added
// to a model, the Trainer trains them and nothing else, and the result is files in the run folder.
// Kumari et al. 2022, arXiv:2212.04488; diffusers' script train_custom_diffusion.py.
#pragma once

#include <filesystem>
#include <set>
#include <string>

#include "pipelines/trainer.h"

namespace calotype {

struct CustomDiffusionTrainOptions {
  std::string modifier_token;
  std::string initializer_token;
  std::string freeze_model = "crossattn_kv";
  bool no_augmentation = false;

  // Calls f(name, field, help) for each field; none may change when a run is continued.
  template <class Options, class F>
  static void Visit(Options& o, F&& f) {
    f("modifier_token", o.modifier_token,
      "New words that the captions use, with + between them: \"<new1>+<new2>\"");
    f("initializer_token", o.initializer_token,
      "Words whose first token's embedding the new ones begin with [ktn+pll+ucd]");
    f("freeze_model", o.freeze_model,
      "crossattn_kv: train keys and values of the cross-attention; crossattn: queries and outputs, "
      "too; tokens: the new words alone (Textual Inversion)");
    f("no_augmentation", o.no_augmentation,
      "Train on the pictures as they are, not on smaller and larger ones with captions that say "
      "so");
  }
};

// Defaults: those of diffusers' script (learning rate 1e-5, constant), no averages, no held-out
// captions.
TrainOptions CustomDiffusionTrainDefaults();

// Errors: ValueError naming the field, its value and what is allowed.
void Validate(const CustomDiffusionTrainOptions& options);

// Trains options.model in `folder`, see Trainer; the folder also holds the result:
// kCustomDiffusionFile and WORD.safetensors for each word, written with each checkpoint and at the
// end. scale_lr doubles the rate with class_data. With `resume`, the options of the run count, as
// for TrainLora. Errors: ValueError without a model, for words that the vocabulary has or that no
// caption uses, initializer tokens that are not as many, files that would be overwritten and chosen
// options without effect; those of Trainer, MakeModel, AddCustomDiffusion and
// CustomDiffusionDataset.
TrainResult TrainCustomDiffusion(CustomDiffusionTrainOptions custom, TrainOptions options,
                                 const std::filesystem::path& folder, bool resume = false,
                                 const std::set<std::string>& chosen = {},
                                 TrainCallbacks callbacks = {});

}  // namespace calotype
