// calotype info: what a file or folder holds, and what this program can do.
#include <fmt/format.h>

#include <memory>
#include <set>
#include <string>

#include "app/commands.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "io/checkpoint.h"
#include "io/file.h"
#include "io/png.h"
#include "io/safetensors.h"
#include "models/presets.h"
#include "pipelines/diffusion_model.h"
#include "pipelines/op_table.h"
#include "pipelines/train_options.h"
#include "pipelines/trainer.h"

namespace calotype::app {
namespace {

namespace fs = std::filesystem;

void PrintPicture(const fs::path& path) {
  std::vector<PngText> texts;
  Image image = ReadPng(path, &texts);
  fmt::print("{}: picture, {} x {}\n", path.string(), image.width, image.height);
  for (const PngText& text : texts) fmt::print("{}:\n{}\n", text.keyword, text.text);
}

void PrintTensors(const fs::path& path) {
  TensorFileHeader header = ReadSafetensorsHeader(path);
  int64_t elements = 0;
  for (const TensorEntry& entry : header.entries) elements += entry.shape.elements();
  fmt::print("{}: {} tensors, {} elements\n", path.string(), header.entries.size(), elements);
  for (const auto& [key, value] : header.metadata)
    fmt::print("  {} = {}\n", Quoted(key), Quoted(value));
  for (const TensorEntry& entry : header.entries)
    fmt::print("  {:4} {:18} {}\n", entry.dtype, entry.shape.ToString(), Quoted(entry.name));
}

void PrintCheckpoints(const fs::path& folder) {
  for (int64_t step : ListCheckpoints(folder / "checkpoints"))
    fmt::print("  checkpoint of step {}\n", step);
}

void PrintModel(const fs::path& folder) {
  auto model = DiffusionModel::Open(folder);
  const SchedulerConfig& s = model->scheduler();
  fmt::print("{}: text-to-image model, {} x {} pixels\n", folder.string(), model->side(),
             model->side());
  auto size = [](const Layer& part) {
    return fmt::format("{} parameters in {} tensors", part.ParameterCount(),
                       part.ParameterShapes().size());
  };
  fmt::print("  U-Net: {}, context width {}\n", size(model->unet()), model->context_width());
  if (CaptionEncoder* encoder = model->caption_encoder()) {
    fmt::print("  caption encoder: {}, {} words, reads {} of a caption\n", size(*encoder),
               model->vocabulary_size(), model->caption_tokenizer()->capacity());
  } else {
    fmt::print("  text encoder: CLIP, {}, vocabulary of {}, reads {} tokens\n",
               size(*model->text_encoder()), model->vocabulary_size(), model->caption_tokens());
  }
  if (model->vae()) {
    fmt::print("  autoencoder: {}, {} channels, {} pixels a side for each latent\n",
               size(*model->vae()), model->channels(), model->factor());
  }
  fmt::print("  schedule: {}, {} timesteps, predicts {}\n", s.beta_schedule, s.num_train_timesteps,
             s.prediction_type);
  PrintCheckpoints(folder);
}

// A run whose result is no model folder (LoRA, Custom Diffusion), or not yet.
void PrintRun(const fs::path& folder) {
  const fs::path path = folder / "train.json";
  const std::string text = ReadFile(path, 1 << 20);
  const TrainOptions options = ParseTrainOptions(text, path);
  fmt::print("{}: run of `{}`, {} steps on {}{}, no model folder\n", folder.string(),
             ParseTrainingKind(text, path).command, options.max_train_steps, options.data,
             options.model.empty() ? "" : fmt::format(" with {}", options.model));
  std::set<std::string> results;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() == ".safetensors") results.insert(entry.path().filename());
  }
  for (const std::string& name : results) fmt::print("  {}\n", name);
  PrintCheckpoints(folder);
}

void PrintProgram() {
  constexpr const char* kLevels[] = {"x86-64-v2", "x86-64-v3", "x86-64-v4"};
  fmt::print("calotype {}\ninstruction set: {}\nthreads: {}\nU-Net presets: {}\n", CALOTYPE_VERSION,
             kLevels[static_cast<int>(HostIsa())], Threads(), fmt::join(UNetPresetNames(), ", "));
}

}  // namespace

void AddInfo(Options& app, Selected& selected) {
  Options* info = app.add_subcommand(
      "info", "Say what a model, safetensors file or picture holds, or what this program can do");
  info->footer(
      "Examples:\n  calotype info run\n  calotype info x.png\n  calotype info "
      "run/unet/diffusion_pytorch_model.safetensors");
  struct Command {
    fs::path path;
    bool ops = false;
  };
  auto command = std::make_shared<Command>();
  info->add_option("path", command->path, "Model or run folder, .safetensors or .png");
  info->add_flag("--ops", command->ops, "Print the table of operations (docs/ops.md)");
  info->callback([command, &selected] {
    selected.run = [command] {
      if (command->ops) {
        fmt::print("{}", OpTable());
      } else if (command->path.empty()) {
        PrintProgram();
      } else if (command->path.extension() == ".png") {
        PrintPicture(command->path);
      } else if (command->path.extension() == ".safetensors") {
        PrintTensors(command->path);
      } else if (HoldsRun(command->path) && !fs::exists(command->path / "model_index.json")) {
        PrintRun(command->path);
      } else {
        PrintModel(command->path);
      }
    };
  });
}

}  // namespace calotype::app
