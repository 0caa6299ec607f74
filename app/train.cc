// calotype train: a run on a folder of captioned pictures, or its continuation.
#include <fmt/format.h>

#include <map>
#include <memory>
#include <set>
#include <type_traits>

#include "app/commands.h"
#include "app/progress.h"
#include "io/file.h"
#include "pipelines/trainer.h"
#include "pipelines/training_setup.h"

namespace calotype::app {
namespace {

// Other spellings of the options, as people know them from other trainers.
const std::map<std::string, std::string> kAliases = {
    {"data", ",--train-data-dir"},
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
};

struct Command {
  TrainOptions options;
  std::filesystem::path folder;
  bool resume = false;
  std::string resume_from;
  std::map<std::string, CLI::Option*> given;
};

// Errors: ValueError for an option that was given although it changes nothing.
void CheckEffect(const Command& command, const TrainOptions& o) {
  const std::string optimizer = "--optimizer " + o.optimizer;
  const bool sgd = o.optimizer == "sgd";
  struct Rule {
    const char* field;
    bool has_effect;
    std::string because;
  };
  for (const Rule& rule :
       {Rule{"momentum", sgd, optimizer}, Rule{"adam_beta1", !sgd, optimizer},
        Rule{"adam_beta2", !sgd, optimizer}, Rule{"adam_epsilon", !sgd, optimizer},
        Rule{"validation_steps", o.validation_fraction > 0, "--validation-fraction 0"},
        Rule{"validation_prompt", o.sample_steps > 0, "--sample-steps 0"}}) {
    Check(rule.has_effect || command.given.at(rule.field)->count() == 0,
          "train: {} has no effect with {}", command.given.at(rule.field)->get_name(),
          rule.because);
  }
}

void Run(Command& command, bool quiet) {
  ProgressBar bar("train", quiet);
  TrainCallbacks callbacks = ShowTraining(bar);
  TrainOptions options = command.options;
  command.resume |= !command.resume_from.empty();
  if (command.resume) {
    std::set<std::string> chosen;
    for (const auto& [name, option] : command.given) {
      if (option->count() > 0) chosen.insert(name);
    }
    std::filesystem::path stored = command.folder / "train.json";
    options = MergeForResume(ParseTrainOptions(ReadFile(stored), stored), options, chosen);
  }
  Validate(options);
  CheckEffect(command, options);
  auto warn = [&](const std::string& text) { callbacks.message("warning: " + text); };
  auto data = OpenDataset(options, warn);
  auto model = MakeModel(options, *data, warn);
  callbacks.message(fmt::format("{} captions, {} parameters, {} steps of {}", data->size(),
                                model->ParameterCount(), options.max_train_steps,
                                PicturesOfAStep(options)));
  TrainResult result =
      Trainer(*model, *data, options, command.folder, command.resume, callbacks).Run();
  std::string validation = result.validation ? ", " + result.validation->ToString() : "";
  callbacks.message(
      fmt::format("{} steps in {}, loss {:.4f}{}; try: calotype sample --model {} --prompt \"{}\"",
                  result.steps, FormatDuration(result.seconds), result.final_loss, validation,
                  command.folder.string(), data->caption(0)));
}

}  // namespace

void AddTrain(CLI::App& app, Selected& selected) {
  CLI::App* train =
      app.add_subcommand("train", "Train a text-to-image model on captioned pictures");
  train->footer(
      "Examples:\n"
      "  calotype train --data emoji --unet small32 --out run --batch-size 32 --steps 3000\n"
      "  calotype train --out run --resume\n"
      "DATA is `shapes` or a folder of PNG or JPEG pictures with metadata.jsonl, a line a "
      "picture:\n"
      "  {\"file_name\": \"a.png\", \"text\": \"its caption\"}, or a list of captions\n"
      "MODEL, a folder of Stable Diffusion, is fine-tuned on the latents of its autoencoder.");
  auto command = std::make_shared<Command>();
  train
      ->add_option("-o,--out,--output,--output-dir", command->folder,
                   "Run folder: model, checkpoints, metrics.jsonl, samples")
      ->required();
  train->add_flag("--resume", command->resume,
                  "Continue the run in the folder from its newest checkpoint");
  train
      ->add_option("--resume-from-checkpoint", command->resume_from,
                   "The same, as diffusers' scripts spell it")
      ->check(CLI::IsMember({"latest"}));
  TrainOptions::Visit(command->options, [&](const char* name, auto& field, const char* help, bool) {
    std::string flag = "--" + std::string(name);
    std::replace(flag.begin(), flag.end(), '_', '-');
    auto alias = kAliases.find(name);
    if (alias != kAliases.end()) flag += alias->second;
    using Field = std::decay_t<decltype(field)>;
    CLI::Option*& option = command->given[name];
    if constexpr (std::is_same_v<Field, bool>) {
      option = train->add_flag(flag, field, help);
    } else {
      option = train->add_option(flag, field, help)->capture_default_str();
      if (std::is_unsigned_v<Field>) option->check(NotNegative());
    }
  });
  train->callback([command, &selected] {
    selected.run = [command, &selected] { Run(*command, selected.quiet); };
  });
}

}  // namespace calotype::app
