// calotype train lora, calotype train custom-diffusion: what is trained beside a model that stays
// as it is.
#include <fmt/format.h>

#include <memory>
#include <string_view>

#include "app/progress.h"
#include "app/train_flags.h"
#include "io/file.h"
#include "pipelines/custom_diffusion_training.h"
#include "pipelines/lora_training.h"

namespace calotype::app {
namespace {

namespace fs = std::filesystem;

struct Texts {
  const char *name, *help, *footer;
  const char* content;  // of the run folder
};

// `Own`: the options besides TrainOptions, whose defaults here are `defaults`. `train`: TrainLora
// or TrainCustomDiffusion. `use`: the options of `sample` that draw with the result in a folder.
template <class Own, class Train>
void AddTraining(Options& app, Selected& selected, const Texts& texts, const TrainOptions& defaults,
                 Train* train, std::string (*use)(const fs::path& folder)) {
  struct Command {
    Own own;
    TrainOptions options;
    TrainFlags flags;
  };
  auto command = std::make_shared<Command>();
  command->options = defaults;
  Options* added = app.add_subcommand(texts.name, texts.help);
  added->footer(texts.footer);
  AddRunFolder(*added, command->flags, texts.content);
  Own::Visit(command->own, [&](const char* name, auto& field, const char* help) {
    AddField(*added, command->flags, name, field, help);
  });
  TrainOptions::Visit(command->options, [&](const char* name, auto& field, const char* help, bool) {
    // That one trains the text encoder itself.
    if (DecidedByTheModel(name) || std::string_view(name) == "train_text_encoder") return;
    if (std::string_view(name) == "model")
      help = "Folder of the model, which stays as it is: of a run, or Stable Diffusion";
    AddField(*added, command->flags, name, field, help);
  });
  added->callback([command, train, use, &selected] {
    selected.run = [command, train, use, &selected] {
      const TrainFlags& flags = command->flags;
      ProgressBar bar("train", selected.quiet);
      const TrainCallbacks callbacks = ShowTraining(bar);
      const TrainResult result = train(command->own, command->options, flags.folder, flags.Resume(),
                                       flags.Chosen(), callbacks);
      const fs::path path = flags.folder / "train.json";  // knows a continued run's
      callbacks.message(
          fmt::format("{}; try: calotype sample --model {} {} --prompt ...", Summary(result),
                      ParseTrainOptions(ReadFile(path, 1 << 20), path).model, use(flags.folder)));
    };
  });
}

}  // namespace

// The program's main function takes `train lora` and `train custom-diffusion` for these names.
void AddTrainLora(Options& app, Selected& selected) {
  AddTraining<LoraTrainOptions>(
      app, selected,
      {.name = "train-lora",
       .help = "(train lora) Train a LoRA for a model",
       .footer = "Examples:\n"
                 "  calotype train lora --model sd --data pictures --rank 4 --out run\n"
                 "  calotype train lora --out run --resume\n"
                 "  calotype sample --model sd --lora run/pytorch_lora_weights.safetensors:0.8 "
                 "--prompt ...",
       .content = "the LoRA file, checkpoints, metrics.jsonl, samples"},
      LoraTrainDefaults(), TrainLora, [](const fs::path& folder) {
        const fs::path file = LoraFileOf(folder, "peft");
        return "--lora " + (fs::exists(file) ? file : LoraFileOf(folder, "kohya")).string();
      });
}

void AddTrainCustomDiffusion(Options& app, Selected& selected) {
  AddTraining<CustomDiffusionTrainOptions>(
      app, selected,
      {.name = "train-custom-diffusion",
       .help = "(train custom-diffusion) Train new words and the cross-attention that draws them",
       .footer =
           "Examples:\n"
           "  calotype train custom-diffusion --model sd --data my-cat --instance-prompt \"photo "
           "of a <new1> cat\" --modifier-token \"<new1>\" --class-data cats --class-prompt cat "
           "--num-class-images 200 --steps 250 --out run\n"
           "  calotype train custom-diffusion --out run --resume\n"
           "  calotype sample --model sd --custom-diffusion run --prompt \"a <new1> cat in a "
           "bucket\"",
       .content = "the words, the cross-attention, checkpoints, metrics.jsonl, samples"},
      CustomDiffusionTrainDefaults(), TrainCustomDiffusion,
      [](const fs::path& folder) { return "--custom-diffusion " + folder.string(); });
}

}  // namespace calotype::app
