// calotype convert: Stable Diffusion models between diffusers' folder and the original single file.
#include "pipelines/convert.h"

#include <fmt/format.h>

#include <memory>

#include "app/commands.h"

namespace calotype::app {

void AddConvert(Options& app, Selected& selected) {
  Options* convert = app.add_subcommand(
      "convert", "Convert a Stable Diffusion 1.x or 2.x model: single file to folder and back");
  convert->footer(
      "Examples:\n"
      "  calotype convert v1-5.safetensors --out sd15 --tokenizer clip-tokenizer\n"
      "  calotype convert sd15 --out sd15-half.safetensors --dtype float16");
  struct Command {
    ConvertOptions options;
    std::string dtype;
  };
  auto command = std::make_shared<Command>();
  ConvertOptions& o = command->options;
  convert->add_option("in", o.in, "A .safetensors file in the original layout, or a model folder")
      ->required();
  convert->add_option("-o,--out", o.out, "Folder or .safetensors file to make; must not exist")
      ->required();
  convert->add_option("--dtype,--save-precision", command->dtype,
                      "float32, float16 or bfloat16 [each tensor as it is in the input]");
  convert->add_option("--config", o.config,
                      "Model folder whose configurations, scheduler and tokenizer to use");
  convert->add_option("--tokenizer", o.tokenizer, "Folder with vocab.json and merges.txt to copy");
  convert->add_option("--prediction-type", o.prediction_type,
                      "epsilon or v_prediction, for Stable Diffusion 2.x");
  convert->add_flag("--allow-unmatched", o.allow_unmatched,
                    "Leave out tensors that no model has, instead of failing");
  convert->callback([command, &selected] {
    selected.run = [command] {
      ConvertOptions& options = command->options;
      if (!command->dtype.empty()) options.dtype = ParseFloatFormat(command->dtype);
      for (const std::string& line : ConvertModel(options)) fmt::print("{}\n", line);
      fmt::print("wrote {}\n", options.out.string());
    };
  });
}

}  // namespace calotype::app
