// calotype train lora: a LoRA for a model that stays as it is.
#include <fmt/format.h>

#include <memory>
#include <string_view>

#include "app/progress.h"
#include "app/train_flags.h"
#include "pipelines/lora_training.h"

namespace calotype::app {
namespace {

struct Command {
  LoraTrainOptions lora;
  TrainOptions options = LoraTrainDefaults();
  TrainFlags flags;
};

void Run(Command& command, bool quiet) {
  ProgressBar bar("train", quiet);
  TrainCallbacks callbacks = ShowTraining(bar);
  TrainResult result = TrainLora(command.lora, command.options, command.flags.folder,
                                 command.flags.Resume(), command.flags.Chosen(), callbacks);
  std::string validation = result.validation ? ", " + result.validation->ToString() : "";
  callbacks.message(fmt::format("{} steps in {}, loss {:.4f}{}", result.steps,
                                FormatDuration(result.seconds), result.final_loss, validation));
}

}  // namespace

void AddTrainLora(Options& app, Selected& selected) {
  // The program's main function takes `train lora` for this name.
  Options* train = app.add_subcommand("train-lora", "(train lora) Train a LoRA for a model");
  train->footer(
      "Examples:\n"
      "  calotype train lora --model sd --data pictures --rank 4 --out run\n"
      "  calotype train lora --out run --resume\n"
      "  calotype sample --model sd --lora run/pytorch_lora_weights.safetensors:0.8 --prompt ...");
  auto command = std::make_shared<Command>();
  AddRunFolder(*train, command->flags, "the LoRA file, checkpoints, metrics.jsonl, samples");
  LoraTrainOptions::Visit(command->lora, [&](const char* name, auto& field, const char* help) {
    AddField(*train, command->flags, name, field, help);
  });
  TrainOptions::Visit(command->options, [&](const char* name, auto& field, const char* help, bool) {
    if (DecidedByTheModel(name) || command->flags.given.contains(name)) return;
    if (std::string_view(name) == "model")
      help = "Folder of the model, which stays as it is: of a run, or Stable Diffusion";
    AddField(*train, command->flags, name, field, help);
  });
  train->callback([command, &selected] {
    selected.run = [command, &selected] { Run(*command, selected.quiet); };
  });
}

}  // namespace calotype::app
