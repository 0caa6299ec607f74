// calotype sample: pictures from prompts.
#include <fmt/format.h>

#include <memory>

#include "app/commands.h"
#include "app/progress.h"
#include "io/image.h"
#include "io/png.h"
#include "pipelines/text_to_image.h"

namespace calotype::app {
namespace {

struct Command {
  std::filesystem::path model, out = "output.png";
  std::vector<std::string> prompts;
  uint64_t seed = 0;
  int64_t count = 1;
  std::string backend = "jit";
  GenerateOptions options;
};

// out.png for one picture, else out-000.png, out-001.png, ...
std::filesystem::path PathOf(const std::filesystem::path& out, size_t index, size_t count) {
  if (count == 1) return out;
  std::filesystem::path path = out;
  path.replace_filename(
      fmt::format("{}-{:03}{}", out.stem().string(), index, out.extension().string()));
  return path;
}

void Run(Command& command, bool quiet) {
  Check(command.count >= 1, "sample: {} pictures a prompt, must be at least 1", command.count);
  GenerateOptions& options = command.options;
  for (const std::string& prompt : command.prompts) {
    for (int64_t i = 0; i < command.count; ++i) {
      options.prompts.push_back(prompt);
      options.seeds.push_back(command.seed + static_cast<uint64_t>(i));
    }
  }
  auto pipeline = TextToImagePipeline::Load(command.model, ParseBackend(command.backend));
  ProgressBar bar("draw", quiet);
  std::vector<Image> pictures = TensorToImages(pipeline->Generate(options, ShowSampling(bar)));
  for (size_t i = 0; i < pictures.size(); ++i) {
    std::filesystem::path path = PathOf(command.out, i, pictures.size());
    std::vector<PngText> texts{{"parameters", GenerationParameters(options, i, pictures[i].width)}};
    WritePng(path, pictures[i], texts);
    fmt::print("{}\n", path.string());
  }
}

}  // namespace

void AddSample(CLI::App& app, Selected& selected) {
  CLI::App* sample = app.add_subcommand("sample", "Draw pictures from prompts");
  sample->footer(
      "Example:\n"
      "  calotype sample --model run --prompt \"a large blue cross on a gray background\" --steps "
      "25 --seed 7 --out x.png");
  auto command = std::make_shared<Command>();
  GenerateOptions& options = command->options;
  sample
      ->add_option("-m,--model,--pretrained-model-name-or-path", command->model,
                   "Run folder of `train` or `demo`")
      ->required();
  sample->add_option("-p,--prompt", command->prompts, "What to draw; may be given several times")
      ->take_all()
      ->required();
  sample->add_option("-n,--negative-prompt", options.negative_prompt,
                     "What guidance leads away from");
  sample->add_option("--steps,--num-inference-steps", options.steps, "Sampling steps")
      ->capture_default_str();
  sample
      ->add_option("--guidance-scale,--cfg-scale", options.guidance_scale,
                   "1: the prompt alone; more follows it more closely")
      ->capture_default_str();
  sample
      ->add_option("--guidance-rescale", options.guidance_rescale,
                   "Share of rescaling after guidance, 0 to 1")
      ->capture_default_str();
  sample
      ->add_option("--sampler,--scheduler,--sampling-method", options.sampler,
                   "ddim, ddpm, pndm, euler, euler-karras, euler-a, dpm++-2m, dpm++-2m-karras, "
                   "dpm++-2m-sde, dpm++-2m-sde-karras, or a class of diffusers")
      ->capture_default_str();
  sample->add_option("--eta", options.eta, "Noise of DDIM's steps, 0 to 1")->capture_default_str();
  sample->add_option("--side,--resolution", options.side, "Width and height; 0: the model's")
      ->capture_default_str();
  sample
      ->add_option("-s,--seed", command->seed, "Seed of the first picture; the next ones count up")
      ->capture_default_str()
      ->check(NotNegative());
  sample
      ->add_option("--rng", options.rng,
                   "Noise of a seed: philox, or torch for the numbers that PyTorch draws")
      ->capture_default_str();
  sample
      ->add_option("-b,--count,--batch-count,--num-images", command->count,
                   "Pictures for each prompt")
      ->capture_default_str();
  sample->add_option("--batch-size", options.batch_size, "Pictures computed together")
      ->capture_default_str();
  sample->add_option("--backend", command->backend, "jit or eager")->capture_default_str();
  sample
      ->add_option("-o,--out,--output", command->out,
                   "PNG file; several pictures get a number each")
      ->capture_default_str();
  sample->callback([command, &selected] {
    selected.run = [command, &selected] { Run(*command, selected.quiet); };
  });
}

}  // namespace calotype::app
