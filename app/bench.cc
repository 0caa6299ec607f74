// calotype bench: a U-Net on this machine, eager beside compiled.
#include <fmt/format.h>

#include <memory>

#include "app/commands.h"
#include "core/parallel.h"
#include "pipelines/benchmark.h"

namespace calotype::app {
namespace {

struct Command {
  std::filesystem::path model;
  std::string unet = "toy16";
  std::vector<int64_t> batches{1, 64};
  double seconds = 2;
  bool train = false;
};

void Run(const Command& command) {
  auto model =
      command.model.empty() ? RandomModel(command.unet) : DiffusionModel::Load(command.model);
  fmt::print("{} threads, {} parameters, fastest of alternating calls\n", Threads(),
             model->ParameterCount());
  fmt::print("{:>6} {:>6} {:>12} {:>12} {:>8} {:>12} {:>11}\n", "what", "batch", "eager ms",
             "jit ms", "ratio", "difference", "compile s");
  auto row = [](const char* what, int64_t batch, const Comparison& c) {
    fmt::print("{:>6} {:>6} {:>12.3f} {:>12.3f} {:>8.2f} {:>12.1e} {:>11.2f}\n", what, batch,
               c.eager_ms, c.jit_ms, c.eager_ms / c.jit_ms, c.max_rel_difference,
               c.compile_seconds);
  };
  for (int64_t batch : command.batches) {
    row("unet", batch, CompareUNet(*model, batch, command.seconds));
    if (command.train) row("train", batch, CompareTrainingStep(*model, batch, command.seconds));
  }
}

}  // namespace

void AddBench(CLI::App& app, Selected& selected) {
  CLI::App* bench =
      app.add_subcommand("bench", "Time a U-Net and its training step, eager beside compiled");
  bench->footer("Example: calotype bench --unet toy16 --batch 1,64 --train");
  auto command = std::make_shared<Command>();
  bench->add_option("-m,--model", command->model,
                    "Run folder; without it a preset with random weights");
  bench
      ->add_option("--unet,--preset", command->unet,
                   "Preset (toy16, small32) or a diffusers U-Net config.json")
      ->capture_default_str();
  bench->add_option("--batch,--batch-size", command->batches, "Batch sizes")
      ->delimiter(',')
      ->take_all()
      ->capture_default_str();
  bench->add_option("--seconds", command->seconds, "Time for each measurement")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 3600.0));
  bench->add_flag("--train", command->train, "Also the training step (AdamW)");
  bench->callback([command, &selected] { selected.run = [command] { Run(*command); }; });
}

}  // namespace calotype::app
