#include "app/train_flags.h"

#include <algorithm>

namespace calotype::app {
namespace {

// Other spellings of the options, as people know them from other trainers.
const std::map<std::string, std::string> kAliases = {
    {"data", ",--train-data-dir,--instance-data-dir"},
    {"class_data", ",--class-data-dir"},
    {"no_augmentation", ",--noaug"},
    {"model", ",-m,--pretrained-model-name-or-path"},
    {"unet", ",--preset,--unet-config"},
    {"resolution", ",--size"},
    {"train_batch_size", ",--batch-size"},
    {"max_train_steps", ",--steps"},
    {"optimizer", ",--optimizer-type"},
    {"learning_rate", ",--lr"},
    {"weight_decay", ",--adam-weight-decay"},
    {"validation_fraction", ",--holdout"},
    {"checkpointing_steps", ",--save-every-n-steps"},
    {"sample_steps", ",--sample-every-n-steps"},
    {"seed", ",-s"},
    {"gradient_accumulation_steps", ",--accumulation-steps"},
    {"snr_gamma", ",--min-snr-gamma"},
    {"input_perturbation", ",--ip-noise-gamma"},
    {"caption_dropout", ",--proportion-empty-prompts"},
    {"lr_num_cycles", ",--lr-scheduler-num-cycles"},
    {"lr_power", ",--lr-scheduler-power"},
    {"random_flip", ",--flip-aug"},
    {"rank", ",--network-dim"},
    {"alpha", ",--network-alpha"},
};

}  // namespace

std::set<std::string> TrainFlags::Chosen() const {
  std::set<std::string> chosen;
  for (const auto& [name, option] : given) {
    if (option->count() > 0) chosen.insert(name);
  }
  return chosen;
}

void AddRunFolder(Options& app, TrainFlags& flags, const std::string& content) {
  app.add_option("-o,--out,--output,--output-dir", flags.folder, "Run folder: " + content)
      ->required();
  app.add_flag("--resume", flags.resume,
               "Continue the run in the folder from its newest checkpoint");
  app.add_option("--resume-from-checkpoint", flags.resume_from,
                 "The same, as diffusers' scripts spell it")
      ->check(IsMember({"latest"}));
}

std::string SpellingsOf(const std::string& field) {
  std::string flag = "--" + field;
  std::replace(flag.begin(), flag.end(), '_', '-');
  auto alias = kAliases.find(field);
  return alias == kAliases.end() ? flag : flag + alias->second;
}

}  // namespace calotype::app
