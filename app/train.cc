// calotype train: a run on a folder of captioned pictures, or its continuation.
#include <fmt/format.h>

#include <memory>
#include <set>

#include "app/progress.h"
#include "app/train_flags.h"
#include "io/file.h"
#include "pipelines/trainer.h"
#include "pipelines/training_setup.h"

namespace calotype::app {
namespace {

struct Command {
  TrainOptions options;
  TrainFlags flags;
};

void Run(Command& command, bool quiet) {
  ProgressBar bar("train", quiet);
  TrainCallbacks callbacks = ShowTraining(bar);
  TrainOptions options = command.options;
  const TrainFlags& flags = command.flags;
  const std::set<std::string> chosen = flags.Chosen();
  if (flags.Resume()) {
    CheckResumes(kTrain, flags.folder);
    std::filesystem::path stored = flags.folder / "train.json";
    options = MergeForResume(ParseTrainOptions(ReadFile(stored), stored), options, chosen);
  }
  auto [data, model] = BeginTraining(options, chosen, flags.folder, flags.Resume(), {}, callbacks);
  callbacks.message(fmt::format("{} captions, {} parameters, {} steps of {}", data->size(),
                                model->ParameterCount(), options.max_train_steps,
                                PicturesOfAStep(options)));
  TrainResult result =
      Trainer(*model, *data, options, flags.folder, flags.Resume(), callbacks).Run();
  callbacks.message(fmt::format("{}; try: calotype sample --model {} --prompt \"{}\"",
                                Summary(result), flags.folder.string(), data->caption(0)));
}

}  // namespace

void AddTrain(Options& app, Selected& selected) {
  Options* train = app.add_subcommand("train", "Train a text-to-image model on captioned pictures");
  train->footer(
      "Examples:\n"
      "  calotype train --data emoji --unet small32 --out run --batch-size 32 --steps 3000\n"
      "  calotype train --out run --resume\n"
      "DATA is `shapes` or a folder of PNG or JPEG pictures with metadata.jsonl, a line a "
      "picture:\n"
      "  {\"file_name\": \"a.png\", \"text\": \"its caption\"}, or a list of captions\n"
      "MODEL, a folder of Stable Diffusion, is fine-tuned on the latents of its autoencoder.");
  auto command = std::make_shared<Command>();
  AddRunFolder(*train, command->flags, "model, checkpoints, metrics.jsonl, samples");
  TrainOptions::Visit(command->options, [&](const char* name, auto& field, const char* help, bool) {
    AddField(*train, command->flags, name, field, help);
  });
  train->callback([command, &selected] {
    selected.run = [command, &selected] { Run(*command, selected.quiet); };
  });
}

}  // namespace calotype::app
