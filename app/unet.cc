// calotype unet: a diffusers U-Net folder on given tensors.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

#include "app/commands.h"
#include "core/error.h"
#include "io/safetensors.h"
#include "pipelines/graph_runner.h"
#include "pipelines/unet_folder.h"

namespace calotype::app {
namespace {

struct Command {
  std::filesystem::path model, inputs, output;
  std::string backend = "jit";
  int repeat = 1;
};

double Seconds(const std::function<void()>& work) {
  auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void Run(const Command& command) {
  Backend backend = ParseBackend(command.backend);
  TensorFile file = ReadSafetensors(command.inputs);
  std::vector<GraphInput> declared;
  std::vector<Tensor> inputs;
  for (const char* name :
       {"sample", "timestep", "encoder_hidden_states", "encoder_attention_mask"}) {
    auto at = file.tensors.find(name);
    if (at == file.tensors.end()) {
      Check<FileError>(std::string_view(name) == "encoder_attention_mask",
                       "{}: tensor \"{}\" is missing", command.inputs.string(), name);
      continue;
    }
    declared.push_back({name, at->second.type()});
    inputs.push_back(at->second);
    file.tensors.erase(at);
  }
  for (const auto& [name, tensor] : file.tensors) {
    Fail<FileError>(
        "{}: tensor \"{}\" is unknown; the inputs are sample, timestep, encoder_hidden_states, "
        "encoder_attention_mask",
        command.inputs.string(), name);
  }

  std::unique_ptr<UNet2DConditionModel> unet;
  const double load = Seconds([&] { unet = LoadUNet(command.model); });
  unet->SetTrainingMode(false);
  GraphRunner runner(unet->Export(declared), backend);
  std::vector<Tensor> outputs;
  std::vector<double> calls;
  for (int i = 0; i < command.repeat; ++i)
    calls.push_back(Seconds([&] { outputs = runner.Run(inputs); }));
  std::nth_element(calls.begin(), calls.begin() + command.repeat / 2, calls.end());
  fmt::print("load {:.3f} s, compile {:.3f} s, call {:.3f} ms (median of {}, {})\n", load,
             runner.compile_seconds(), 1e3 * calls[command.repeat / 2], command.repeat,
             NameOf(backend));
  WriteSafetensors(command.output, {{{"out", outputs[0]}}, {}});
}

}  // namespace

void AddUNet(CLI::App& app, Selected& selected) {
  CLI::App* unet = app.add_subcommand("unet", "Run a diffusers U-Net folder on given tensors");
  unet->footer(
      "Example: calotype unet --model run/unet --inputs in.safetensors --output out.safetensors\n"
      "Inputs: sample [B, C, H, W], timestep [B] or [1], encoder_hidden_states [B, S, D], and if "
      "wanted\n"
      "encoder_attention_mask [B, S]. Output: out [B, C, H, W].");
  auto command = std::make_shared<Command>();
  unet->add_option("-m,--model", command->model, "Folder with config.json and the weights")
      ->required();
  unet->add_option("-i,--inputs", command->inputs, "Safetensors file of the inputs")->required();
  unet->add_option("-o,--out,--output", command->output, "Safetensors file to write")->required();
  unet->add_option("--backend", command->backend, "jit or eager")->capture_default_str();
  unet->add_option("--repeat", command->repeat, "Calls to time")
      ->capture_default_str()
      ->check(CLI::Range(1, 1000000));
  unet->callback([command, &selected] { selected.run = [command] { Run(*command); }; });
}

}  // namespace calotype::app
