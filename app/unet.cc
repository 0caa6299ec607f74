// calotype unet: a diffusers folder of a U-Net, autoencoder or text encoder on given tensors.
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "app/commands.h"
#include "core/error.h"
#include "core/json.h"
#include "core/parallel.h"
#include "graph/flop.h"
#include "io/atomic_file.h"
#include "io/file.h"
#include "io/safetensors.h"
#include "jit/compile.h"
#include "pipelines/benchmark.h"
#include "pipelines/model_folder.h"

namespace calotype::app {
namespace {

using Json = nlohmann::ordered_json;

struct Command {
  std::filesystem::path model, inputs, output, json;
  std::string backend = "jit", winograd = "auto";
  bool tune = false;
  int repeat = 1;
  bool on_demand = false;
};

struct Inputs {
  std::vector<std::optional<GraphInput>> declared;  // in the order of the model's inputs
  std::vector<Tensor> tensors;                      // of those that are there
};

// The inputs of a model in its order; the last `optional` of them may be absent.
Inputs ReadInputs(const std::filesystem::path& path, const std::vector<const char*>& names,
                  size_t optional) {
  TensorFile file = ReadSafetensors(path);
  Inputs inputs;
  for (size_t i = 0; i < names.size(); ++i) {
    const char* name = names[i];
    auto at = file.tensors.find(name);
    if (at == file.tensors.end()) {
      Check<FileError>(i + optional >= names.size(), "{}: tensor \"{}\" is missing", path.string(),
                       name);
      inputs.declared.emplace_back();
      continue;
    }
    inputs.declared.push_back(GraphInput{name, at->second.type()});
    inputs.tensors.push_back(at->second);
    file.tensors.erase(at);
  }
  for (const auto& [name, tensor] : file.tensors) {
    Fail<FileError>("{}: tensor \"{}\" is unknown; the inputs are {}", path.string(), name,
                    fmt::join(names, ", "));
  }
  return inputs;
}

// The model, ready to run, and what its calls have taken.
struct LoadedModel {
  std::unique_ptr<Layer> model;
  Inputs inputs;
  std::unique_ptr<GraphRunner> runner;
  std::vector<Tensor> outputs;
  double load_seconds = 0, flop = 0;
  std::vector<double> ms, cpu_ms;  // of each call

  void Call() {
    CallTime time = TimeCall([&] { outputs = runner->Run(inputs.tensors); });
    ms.push_back(1e3 * time.wall);
    cpu_ms.push_back(1e3 * time.cpu);
  }
};

jit::CompileOptions CompileOptionsOf(const Command& command, const Layer& model) {
  jit::CompileOptions options;
  options.winograd = jit::ParseWinograd(command.winograd);
  options.tune = command.tune;
  // The model is compiled once; checking reads the weights.
  options.release_weights = !jit::CheckRequested();
  // The memory of the weights that are released may be filled again.
  if (options.release_weights) options.winograd_bytes += 4 * model.ParameterCount();
  return options;
}

// The class that the config.json of a folder names.
std::string ClassOf(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "config.json";
  const nlohmann::json config = ParseJsonObject(ReadFile(path, 1 << 20), path.string());
  for (const char* type : {"AutoencoderKL", "CLIPTextModel"}) {
    if (config.value("_class_name", nlohmann::json()) == type) return type;
    if (config.value("architectures", nlohmann::json()) == nlohmann::json::array({type}))
      return type;
  }
  return "UNet2DConditionModel";
}

LoadedModel Open(const Command& command) {
  LoadedModel loaded;
  const Backend backend = ParseBackend(command.backend);
  const std::string type = ClassOf(command.model);
  ComputationGraph graph;
  auto load = [&](auto loader) {
    decltype(loader(command.model)) model;
    loaded.load_seconds = TimeCall([&] { model = loader(command.model); }).wall;
    model->SetTrainingMode(false);
    auto* result = model.get();
    loaded.model = std::move(model);
    return result;
  };
  auto inputs = [&] {
    std::vector<Value> values;
    for (const auto& input : loaded.inputs.declared)
      values.push_back(input ? graph.Input(input->name, input->type) : Value());
    return values;
  };
  if (type == "AutoencoderKL") {
    loaded.inputs = ReadInputs(command.inputs, {"latents"}, 0);
    graph.Output("out", load(LoadAutoencoderKL)->Decode(inputs()[0]));
  } else if (type == "CLIPTextModel") {
    loaded.inputs = ReadInputs(command.inputs, {"input_ids"}, 0);
    graph.Output("out", load(LoadCLIPTextModel)->Call(inputs()[0]));
  } else {
    loaded.inputs =
        ReadInputs(command.inputs,
                   {"sample", "timestep", "encoder_hidden_states", "encoder_attention_mask",
                    "attention_mask", "class_labels", "timestep_cond"},
                   4);
    graph.Output("out", load(LoadUNet)->ExportComputationGraph(graph, inputs())[0]);
  }
  loaded.flop = CountFlop(graph);
  loaded.runner = std::make_unique<GraphRunner>(std::move(graph), backend,
                                                CompileOptionsOf(command, *loaded.model));
  return loaded;
}

Json Summary(const Command& command, const LoadedModel& loaded) {
  double median = Median(loaded.ms);
  return {{"backend", command.backend},
          {"winograd", command.winograd},
          {"threads", Threads()},
          {"load_seconds", loaded.load_seconds},
          {"compile_seconds", loaded.runner->compile_seconds()},
          {"calls", loaded.ms.size()},
          {"median_ms", median},
          {"fastest_ms", *std::min_element(loaded.ms.begin(), loaded.ms.end())},
          {"median_cpu_ms", Median(loaded.cpu_ms)},
          {"flop", loaded.flop},
          {"gflops", 1e-6 * loaded.flop / median},
          {"peak_memory_bytes", PeakMemoryBytes()}};
}

// Answers the lines of standard input, each with one line: "run S" makes calls for S seconds (one
// at least) and gives their times. Between commands the process sleeps, so that a benchmark can
// keep several programs loaded and run them in turn.
void Serve(const Command& command, LoadedModel& loaded) {
  auto say = [](const Json& json) {
    fmt::print("{}\n", JsonText(json));
    std::fflush(stdout);
  };
  say(Summary(command, loaded));
  for (std::string line; std::getline(std::cin, line);) {
    double seconds = -1;
    if (std::sscanf(line.c_str(), "run %lf", &seconds) != 1 || seconds < 0)
      Fail("unet --on-demand: the command \"{}\" is unknown; there is: run SECONDS", line);
    loaded.ms.clear();
    loaded.cpu_ms.clear();
    for (double spent = 0; loaded.ms.empty() || spent < seconds; spent += 1e-3 * loaded.ms.back())
      loaded.Call();
    say({{"ms", loaded.ms}, {"cpu_ms", loaded.cpu_ms}, {"peak_memory_bytes", PeakMemoryBytes()}});
  }
}

void Run(const Command& command) {
  LoadedModel loaded = Open(command);
  for (int i = 0; i < command.repeat; ++i) loaded.Call();
  WriteSafetensors(command.output, {{{"out", loaded.outputs[0]}}, {}});
  Json summary = Summary(command, loaded);
  if (!command.json.empty()) WriteFile(command.json, JsonFile(summary));
  if (command.on_demand) return Serve(command, loaded);
  fmt::print(
      "load {:.3f} s, compile {:.3f} s, call {:.3f} ms (median of {}, {}; {:.3f} ms of CPU, "
      "{:.1f} GFLOP/s), peak memory {:.0f} MB\n",
      loaded.load_seconds, loaded.runner->compile_seconds(), summary["median_ms"].get<double>(),
      command.repeat, command.backend, summary["median_cpu_ms"].get<double>(),
      summary["gflops"].get<double>(), 1e-6 * static_cast<double>(PeakMemoryBytes()));
}

}  // namespace

void AddUNet(Options& app, Selected& selected) {
  Options* unet = app.add_subcommand("unet", "Run a diffusers model folder on given tensors");
  unet->footer(
      "Example: calotype unet --model run/unet --inputs in.safetensors --output out.safetensors\n"
      "Inputs: sample [B, C, H, W], timestep [B] or [1], encoder_hidden_states [B, S, D]; if "
      "wanted\n"
      "encoder_attention_mask [B, S] and attention_mask [B, pixels that attend]; with "
      "class_embed_type or\n"
      "num_class_embeds class_labels ([B] ids or numbers, or [B, width] vectors); with\n"
      "time_cond_proj_dim, if wanted, timestep_cond [B, time_cond_proj_dim]. Output: out [B, C, H, "
      "W].\n"
      "Also the folder of an AutoencoderKL (input latents, output the decoded picture) or of a\n"
      "CLIPTextModel (input input_ids, output last_hidden_state).");
  auto command = std::make_shared<Command>();
  unet->add_option("-m,--model", command->model, "Folder with config.json and the weights")
      ->required();
  unet->add_option("-i,--inputs", command->inputs, "Safetensors file of the inputs")->required();
  unet->add_option("-o,--out,--output", command->output, "Safetensors file to write")->required();
  unet->add_option("--backend", command->backend, "jit or eager")->capture_default_str();
  unet->add_option("--winograd", command->winograd, "auto (where it pays) or off; for jit")
      ->capture_default_str();
  unet->add_flag("--tune", command->tune,
                 "Measure which algorithms are fastest here instead of estimating it; kept in the "
                 "compile cache; for jit");
  unet->add_option("--repeat", command->repeat, "Calls to time")
      ->capture_default_str()
      ->check(Range(1, 1000000));
  unet->add_option("--json", command->json, "File for the figures");
  unet->add_flag("--on-demand", command->on_demand,
                 "Then time further calls on demand: for each line \"run SECONDS\" of standard "
                 "input, one line of JSON");
  unet->callback([command, &selected] { selected.run = [command] { Run(*command); }; });
}

}  // namespace calotype::app
