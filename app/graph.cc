// calotype graph: the computation graphs as text or for Graphviz, and what the compiler makes of
// them.
#include <fmt/format.h>

#include <memory>

#include "app/commands.h"
#include "graph/passes.h"
#include "graph/text.h"
#include "jit/lower.h"
#include "pipelines/benchmark.h"
#include "pipelines/model_graphs.h"

namespace calotype::app {
namespace {

struct Command {
  std::filesystem::path model;
  std::string unet = "toy16", what = "unet", format = "text";
  int64_t batch = 1;
};

ComputationGraph Build(const Command& command, DiffusionModel& model) {
  if (command.what == "unet") return UNetGraph(model, command.batch);
  if (command.what == "encoder") return EncoderGraph(model, command.batch);
  Check(command.what == "train", "graph: there is no graph `{}`; there are unet, encoder, train",
        command.what);
  Optimizer optimizer(AdamW{}, model.NamedParameters(), /*max_gradient_norm=*/1);
  return TrainingStepGraph(model, NoiseSchedule(model.scheduler()), command.batch, optimizer,
                           nullptr);
}

void Run(const Command& command) {
  auto model =
      command.model.empty() ? RandomModel(command.unet) : DiffusionModel::Load(command.model);
  ComputationGraph graph = Build(command, *model);
  if (command.format == "text") {
    fmt::print("{}", ToText(graph, 16));
  } else if (command.format == "optimized") {
    fmt::print("{}", ToText(Optimize(graph), 16));
  } else if (command.format == "lowered") {
    fmt::print("{}", jit::ToString(jit::Lower(graph)));
  } else {
    Check(command.format == "dot",
          "graph: there is no format `{}`; there are text, optimized, dot, lowered",
          command.format);
    fmt::print("{}", ToDot(graph));
  }
}

}  // namespace

void AddGraph(Options& app, Selected& selected) {
  Options* graph =
      app.add_subcommand("graph", "Print a model's computation graph, or its compiled regions");
  graph->footer(
      "Examples:\n"
      "  calotype graph --unet toy16 --what unet\n"
      "  calotype graph --model run --format dot | dot -Tsvg > unet.svg");
  auto command = std::make_shared<Command>();
  graph->add_option("-m,--model", command->model,
                    "Run folder; without it a preset with random weights");
  graph->add_option("--unet,--preset", command->unet, "Preset or a diffusers U-Net config.json")
      ->capture_default_str();
  graph->add_option("--what", command->what, "unet, encoder, or train: a whole training step")
      ->capture_default_str();
  graph
      ->add_option("--format", command->format,
                   "text, optimized (after the passes), dot, or lowered (regions)")
      ->capture_default_str();
  graph->add_option("--batch,--batch-size", command->batch, "Batch size")
      ->capture_default_str()
      ->check(Range(1, 65536));
  graph->callback([command, &selected] { selected.run = [command] { Run(*command); }; });
}

}  // namespace calotype::app
