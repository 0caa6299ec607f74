// calotype demo: the whole way from a data set to pictures, with figures.
#include <fmt/format.h>

#include <memory>

#include "app/commands.h"
#include "app/progress.h"
#include "pipelines/attention_demo.h"
#include "pipelines/demo.h"

namespace calotype::app {

void AddDemo(Options& app, Selected& selected) {
  Options* command = app.add_subcommand(
      "demo", "Train, compile and sample a small text-to-image model, with figures");
  command->footer("Example: calotype demo --out demo --seed 1");
  auto options = std::make_shared<DemoOptions>();
  auto edit = std::make_shared<bool>(false);
  Option* edit_flag =
      command->add_flag("--edit", *edit,
                        "Edit the pictures of the trained demo in the folder, and map their words: "
                        "edit.json, edit.png, heat.png");
  command
      ->add_option("-o,--out,--output,--output-dir", options->folder,
                   "Folder for the model, pictures and summary.json")
      ->capture_default_str();
  command->add_option("--optimizer", options->optimizer, "adamw, or sgd with plain settings")
      ->capture_default_str();
  command
      ->add_option("--backend", options->backend,
                   "Of training: eager, or jit; pictures are drawn by compiled code")
      ->capture_default_str();
  command->add_option("-s,--seed", options->seed, "Seed of everything random")
      ->capture_default_str()
      ->check(NotNegative());
  command
      ->add_option("--steps,--max-train-steps", options->steps,
                   "Training steps; 0: 1000, with sgd 400")
      ->capture_default_str();
  command->add_flag("--resume", options->resume,
                    "Continue an interrupted demo; train_seconds then counts this part only");
  command
      ->add_option("--sampling-steps,--num-inference-steps", options->sampling_steps,
                   "Sampling steps")
      ->capture_default_str();
  command
      ->add_option("--seeds-per-caption", options->seeds_per_caption,
                   "Pictures of each of the 96 captions")
      ->capture_default_str();
  for (const char* trains :
       {"--optimizer", "--backend", "--steps", "--resume", "--seeds-per-caption"}) {
    edit_flag->excludes(trains);
  }
  command->callback([options, edit, &selected] {
    selected.run = [options, edit, &selected] {
      if (*edit) {
        ProgressBar draw("edit", selected.quiet);
        AttentionDemoSummary summary = RunAttentionDemo({.folder = options->folder,
                                                         .seed = options->seed,
                                                         .sampling_steps = options->sampling_steps},
                                                        ShowSampling(draw));
        fmt::print("{}", summary.ToJson());
        return;
      }
      DemoCallbacks callbacks;
      {
        ProgressBar train("train", selected.quiet), draw("draw", selected.quiet);
        callbacks.training = ShowTraining(train);
        callbacks.sampling = ShowSampling(draw);
        DemoSummary summary = RunDemo(*options, callbacks);
        fmt::print("{}", summary.ToJson());
      }
      fmt::print(stderr, "pictures and summary.json are in {}\n", options->folder.string());
    };
  });
}

}  // namespace calotype::app
