// calotype train custom-diffusion: new words and cross-attention for a model that stays as it is.
#include <fmt/format.h>

#include <memory>
#include <string_view>

#include "app/progress.h"
#include "app/train_flags.h"
#include "pipelines/custom_diffusion_training.h"

namespace calotype::app {
namespace {

struct Command {
  CustomDiffusionTrainOptions custom;
  TrainOptions options = CustomDiffusionTrainDefaults();
  TrainFlags flags;
};

void Run(Command& command, bool quiet) {
  ProgressBar bar("train", quiet);
  TrainCallbacks callbacks = ShowTraining(bar);
  TrainResult result =
      TrainCustomDiffusion(command.custom, command.options, command.flags.folder,
                           command.flags.Resume(), command.flags.Chosen(), callbacks);
  std::string validation = result.validation ? ", " + result.validation->ToString() : "";
  callbacks.message(fmt::format(
      "{} steps in {}, loss {:.4f}{}; try: calotype sample --model {} --custom-diffusion {} "
      "--prompt ...",
      result.steps, FormatDuration(result.seconds), result.final_loss, validation,
      command.options.model.empty() ? "MODEL" : command.options.model,
      command.flags.folder.string()));
}

}  // namespace

void AddTrainCustomDiffusion(Options& app, Selected& selected) {
  // The program's main function takes `train custom-diffusion` for this name.
  Options* train = app.add_subcommand(
      "train-custom-diffusion",
      "(train custom-diffusion) Train new words and the cross-attention that draws them");
  train->footer(
      "Examples:\n"
      "  calotype train custom-diffusion --model sd --data my-cat --instance-prompt \"photo of a "
      "<new1> cat\" --modifier-token \"<new1>\" --class-data cats --class-prompt cat "
      "--num-class-images 200 --steps 250 --out run\n"
      "  calotype train custom-diffusion --out run --resume\n"
      "  calotype sample --model sd --custom-diffusion run --prompt \"a <new1> cat in a bucket\"");
  auto command = std::make_shared<Command>();
  AddRunFolder(*train, command->flags,
               "the words, the cross-attention, checkpoints, metrics.jsonl, samples");
  CustomDiffusionTrainOptions::Visit(command->custom,
                                     [&](const char* name, auto& field, const char* help) {
                                       AddField(*train, command->flags, name, field, help);
                                     });
  TrainOptions::Visit(command->options, [&](const char* name, auto& field, const char* help, bool) {
    if (DecidedByTheModel(name) || std::string_view(name) == "train_text_encoder") return;
    if (std::string_view(name) == "model")
      help = "Folder of the model, which stays as it is: of a run, or Stable Diffusion";
    AddField(*train, command->flags, name, field, help);
  });
  train->callback([command, &selected] {
    selected.run = [command, &selected] { Run(*command, selected.quiet); };
  });
}

}  // namespace calotype::app
