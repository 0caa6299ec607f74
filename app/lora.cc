// calotype lora: what is in LoRA files, other spellings of them, and models with them merged in.
#include <fmt/format.h>

#include <map>
#include <memory>
#include <set>

#include "app/commands.h"
#include "core/error.h"
#include "io/file.h"
#include "pipelines/diffusion_model.h"
#include "pipelines/lora.h"
#include "pipelines/lora_names.h"

namespace calotype::app {
namespace {

struct Command {
  std::filesystem::path file, model, out;
  std::vector<std::string> loras;
  std::string format = "peft";
  bool allow_unmatched = false;
};

std::unique_ptr<DiffusionModel> LoadModel(const Command& command, bool quiet) {
  return DiffusionModel::Load(command.model, [quiet](const std::string& text) {
    if (!quiet) fmt::print(stderr, "warning: {}\n", text);
  });
}

void Info(const Command& command, bool quiet) {
  LoraFile lora = LoadLora(command.file);
  std::map<std::string, int64_t> groups;
  std::set<int64_t> ranks;
  std::set<double> alphas;
  int64_t numbers = 0;
  for (const auto& [name, m] : lora.modules) {
    ++groups[LoraNameGroup(name)];
    ranks.insert(m.rank());
    if (m.alpha) alphas.insert(*m.alpha);
    numbers += m.down.elements() + m.up.elements();
  }
  fmt::print("{}: {} modules, {} numbers, written as {}\n", lora.source, lora.modules.size(),
             numbers, NameOf(lora.dialect));
  fmt::print("ranks {}; alphas {}\n", fmt::join(ranks, ", "),
             alphas.empty() ? "= rank" : fmt::format("{}", fmt::join(alphas, ", ")));
  for (const auto& [name, count] : groups) fmt::print("{:5} {}\n", count, Quoted(name));
  for (const std::string& name : lora.unknown) fmt::print("  no LoRA: {}\n", Quoted(name));
  for (const auto& [key, value] : lora.metadata) fmt::print("{}: {}\n", Quoted(key), Quoted(value));
  if (command.model.empty()) return;
  auto model = LoadModel(command, quiet);
  ResolveLora(LoraModelOf(*model), lora, {.allow_unmatched = command.allow_unmatched});
  fmt::print("fits {}: {}\n", command.model.string(),
             CheckLora(LoraModelOf(*model), lora).ToString());
}

void Convert(const Command& command, bool quiet) {
  LoraDialect dialect = ParseLoraDialect(command.format);
  LoraFile lora = LoadLora(command.file);
  if (command.model.empty()) {
    lora = ResolveLora(lora);
  } else {
    auto model = LoadModel(command, quiet);
    lora = ResolveLora(LoraModelOf(*model), lora);
  }
  SaveLora(command.out, lora, dialect);
  fmt::print("{}: {} modules as {}\n", command.out.string(), lora.modules.size(), NameOf(dialect));
}

void Merge(const Command& command, bool quiet) {
  // The parts would replace those of another model one by one.
  std::error_code ignored;
  Check<FileError>(!std::filesystem::exists(command.out / "model_index.json", ignored),
                   "{}: holds a model already; name another folder", command.out.string());
  std::vector<WeightedLora> loras;
  for (const std::string& lora : command.loras) loras.push_back(LoadWeightedLora(lora));
  auto model = LoadModel(command, quiet);
  MergedLora merged =
      MergeLora(LoraModelOf(*model), loras, {.allow_unmatched = command.allow_unmatched});
  for (size_t i = 0; i < loras.size() && !quiet; ++i) {
    fmt::print(stderr, "{} at {}: {}\n", loras[i].file.source, loras[i].weight,
               merged.reports()[i].ToString());
  }
  model->Save(command.out);
  fmt::print("{}\n", command.out.string());
}

Option* AddAllowUnmatched(Options* app, Command& command) {
  return app->add_flag("--allow-unmatched", command.allow_unmatched,
                       "Leave out modules that the model does not have, instead of stopping");
}

}  // namespace

void AddLora(Options& app, Selected& selected) {
  Options* lora = app.add_subcommand("lora", "Look at, convert and merge LoRA files");
  lora->require_subcommand(1);
  auto command = std::make_shared<Command>();

  Options* info = lora->add_subcommand("info", "What a file holds");
  info->add_option("file", command->file, "LoRA file")->required();
  info->add_option("-m,--model", command->model, "Model folder: also check that the file fits it");
  AddAllowUnmatched(info, *command)->needs("--model");
  info->callback([command, &selected] {
    selected.run = [command, &selected] { Info(*command, selected.quiet); };
  });

  Options* convert = lora->add_subcommand("convert", "Write a file in another spelling");
  convert->footer(
      "Example:\n  calotype lora convert a.safetensors --format kohya --out b.safetensors");
  convert->add_option("file", command->file, "LoRA file")->required();
  convert->add_option("--format,--to", command->format, "kohya, peft or diffusers")
      ->capture_default_str();
  convert->add_option("-m,--model", command->model,
                      "Model folder whose layers are meant [Stable Diffusion 1.x and 2.x]");
  convert->add_option("-o,--out", command->out, "File to write")->required();
  convert->callback([command, &selected] {
    selected.run = [command, &selected] { Convert(*command, selected.quiet); };
  });

  Options* merge = lora->add_subcommand("merge", "Write a model folder with LoRAs merged in");
  merge->footer("Example:\n  calotype lora merge --model sd --lora a.safetensors:0.8 --out merged");
  merge->add_option("-m,--model", command->model, "Model folder")->required();
  merge->add_option("--lora", command->loras, "FILE or FILE:WEIGHT; may be given several times")
      ->take_all()
      ->required();
  AddAllowUnmatched(merge, *command);
  merge->add_option("-o,--out", command->out, "Folder to write; must not hold a model")->required();
  merge->callback([command, &selected] {
    selected.run = [command, &selected] { Merge(*command, selected.quiet); };
  });
}

}  // namespace calotype::app
