// calotype train lora: a LoRA for a model that stays as it is.
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <set>
#include <type_traits>

#include "app/commands.h"
#include "app/progress.h"
#include "pipelines/lora_training.h"

namespace calotype::app {
namespace {

// Other spellings of the options, as people know them from other trainers.
const std::map<std::string, std::string> kAliases = {
    {"model", ",-m,--pretrained-model-name-or-path"},
    {"rank", ",--network-dim"},
    {"alpha", ",--network-alpha"},
    {"data", ",--train-data-dir"},
    {"train_batch_size", ",--batch-size"},
    {"max_train_steps", ",--steps"},
    {"learning_rate", ",--lr"},
    {"weight_decay", ",--adam-weight-decay"},
    {"seed", ",-s"},
};
// What the model decides, not the command line.
const std::set<std::string> kOfTheModel = {"unet",
                                           "vae",
                                           "caption_tokens",
                                           "caption_layers",
                                           "prediction_type",
                                           "beta_schedule",
                                           "num_train_timesteps"};

struct Command {
  LoraTrainOptions lora;
  TrainOptions options = LoraTrainDefaults();
  std::filesystem::path folder;
  bool resume = false;
  std::map<std::string, CLI::Option*> given;
};

void Run(Command& command, bool quiet) {
  std::set<std::string> chosen;
  for (const auto& [name, option] : command.given) {
    if (option->count() > 0) chosen.insert(name);
  }
  ProgressBar bar("train", quiet);
  TrainCallbacks callbacks = ShowTraining(bar);
  TrainResult result =
      TrainLora(command.lora, command.options, command.folder, command.resume, chosen, callbacks);
  std::string validation = result.validation ? ", " + result.validation->ToString() : "";
  callbacks.message(fmt::format("{} steps in {}, loss {:.4f}{}", result.steps,
                                FormatDuration(result.seconds), result.final_loss, validation));
}

}  // namespace

void AddTrainLora(CLI::App& app, Selected& selected) {
  // The program's main function takes `train lora` for this name.
  CLI::App* train = app.add_subcommand("train-lora", "(train lora) Train a LoRA for a model");
  train->footer(
      "Examples:\n"
      "  calotype train lora --model sd --data pictures --rank 4 --out run\n"
      "  calotype train lora --out run --resume\n"
      "  calotype sample --model sd --lora run/pytorch_lora_weights.safetensors:0.8 --prompt ...");
  auto command = std::make_shared<Command>();
  train
      ->add_option("-o,--out,--output-dir", command->folder,
                   "Run folder: the LoRA file, checkpoints, metrics.jsonl, samples")
      ->required();
  train->add_flag("--resume", command->resume,
                  "Continue the run in the folder from its newest checkpoint");
  auto add = [&](const char* name, auto& field, const char* help) {
    if (kOfTheModel.count(name)) return;
    if (std::string_view(name) == "model")
      help = "Folder of the model, which stays as it is: of a run, or Stable Diffusion";
    std::string flag = "--" + std::string(name);
    std::replace(flag.begin(), flag.end(), '_', '-');
    if (auto alias = kAliases.find(name); alias != kAliases.end()) flag += alias->second;
    using Field = std::decay_t<decltype(field)>;
    CLI::Option*& option = command->given[name];
    if constexpr (std::is_same_v<Field, bool>) {
      option = train->add_flag(flag, field, help);
    } else {
      option = train->add_option(flag, field, help)->capture_default_str();
      if (std::is_unsigned_v<Field>) option->check(NotNegative());
    }
  };
  LoraTrainOptions::Visit(command->lora, add);
  TrainOptions::Visit(command->options, [&](const char* name, auto& field, const char* help, bool) {
    add(name, field, help);
  });
  train->callback([command, &selected] {
    selected.run = [command, &selected] { Run(*command, selected.quiet); };
  });
}

}  // namespace calotype::app
