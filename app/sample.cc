// calotype sample: pictures from prompts.
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include "app/commands.h"
#include "app/progress.h"
#include "io/file.h"
#include "io/image.h"
#include "io/jpeg.h"
#include "io/png.h"
#include "pipelines/attention_maps.h"
#include "pipelines/custom_diffusion.h"
#include "pipelines/lora.h"
#include "pipelines/lora_tags.h"
#include "pipelines/prompt_encoding.h"
#include "pipelines/text_to_image.h"

namespace calotype::app {
namespace {

struct Command {
  std::filesystem::path model, out = "output.png", init_image, mask_image, custom_diffusion;
  std::vector<std::string> prompts, loras;
  bool allow_unmatched = false;
  uint64_t seed = 0;
  int64_t count = 1, side = 0;
  bool vae_tiling = false, tune = false;
  std::string backend = "jit", winograd = "auto";
  GenerateOptions options;
  std::string prompt_syntax = "plain";
  std::filesystem::path attention_maps;  // empty: none
  std::filesystem::path lora_dir;        // empty: no tags
};

// The LoRAs of the command, and those of the tags in its prompts, which are taken out.
std::vector<WeightedLora> TakeLoras(const Command& command, std::vector<std::string>& prompts) {
  std::vector<WeightedLora> loras;
  for (const std::string& lora : command.loras) loras.push_back(LoadWeightedLora(lora));
  std::optional<std::vector<LoraTag>> tags;
  for (std::string& prompt : prompts) {
    std::vector<LoraTag> own = TakeLoraTags(prompt);
    Check(own.empty() || !command.lora_dir.empty(),
          "sample: give --lora-dir, the folder of the LoRA {} that a prompt names",
          Quoted(own.empty() ? "" : own[0].name));
    Check(!tags || std::ranges::is_permutation(*tags, own),
          "sample: the prompts name different LoRAs; draw them by one command each");
    if (!tags) tags = std::move(own);
  }
  std::string negative = command.options.negative_prompt;
  Check(TakeLoraTags(negative).empty(),
        "sample: --negative-prompt {} names a LoRA, which only prompts can",
        Quoted(command.options.negative_prompt));
  Check(command.lora_dir.empty() || !tags->empty(),
        "sample: --lora-dir has no effect, as no prompt has a tag <lora:NAME:WEIGHT>");
  for (const LoraTag& tag : *tags)
    loras.push_back({LoadLora(LoraTagFile(command.lora_dir, tag.name)), tag.weight});
  return loras;
}

// out.png for one picture, else out-000.png, out-001.png, ...
std::filesystem::path PathOf(const std::filesystem::path& out, size_t index, size_t count) {
  if (count == 1) return out;
  std::filesystem::path path = out;
  path.replace_filename(
      fmt::format("{}-{:03}{}", out.stem().string(), index, out.extension().string()));
  return path;
}

// Errors: FileError if no picture can be written there, while nothing has been drawn yet.
void MakeMapsFolder(const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  Check<FileError>(!error, "{}: cannot make the folder: {}", folder.string(), error.message());
  CheckPngPath(folder / "000.png");
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
  const size_t count = options.prompts.size();
  for (size_t i = 0; i < count; ++i) CheckPngPath(PathOf(command.out, i, count));
  if (!command.init_image.empty()) options.init_image = ReadPicture(command.init_image);
  if (!command.mask_image.empty()) options.mask_image = ReadPicture(command.mask_image);
  if (options.width == 0) options.width = command.side;
  if (options.height == 0) options.height = command.side;
  const std::vector<std::string> given_prompts = options.prompts;
  const std::vector<WeightedLora> loras = TakeLoras(command, options.prompts);
  CustomDiffusion custom;
  if (!command.custom_diffusion.empty()) custom = ReadCustomDiffusion(command.custom_diffusion);
  const Backend backend = ParseBackend(command.backend);
  Check(!command.tune || backend == Backend::kJit,
        "sample: --tune has no effect with --backend eager");
  Check(!command.allow_unmatched || !loras.empty(),
        "sample: --allow-unmatched has no effect without a LoRA");
  ProgressBar bar("draw", quiet);
  const auto warn = ShowSampling(bar).warn;
  const LoraOptions lora_options{.allow_unmatched = command.allow_unmatched};
  TextToImagePipeline* opened = nullptr;
  auto pipeline = TextToImagePipeline::Open(
      command.model, backend,
      {.winograd = jit::ParseWinograd(command.winograd), .tune = command.tune}, warn,
      [&](Layer& part) {
        if (&part == &opened->model().unet()) MergeCustomDiffusion(custom, part);
        LoraOptions merge = lora_options;
        merge.only = &part, merge.keep_originals = false;
        MergeLora(LoraModelOf(opened->model()), loras, merge);
      });
  opened = pipeline.get();
  CheckCustomDiffusion(custom, pipeline->model().unet());
  AddWords(custom, pipeline->model());
  for (const WeightedLora& lora : loras) {
    const LoraModel model = LoraModelOf(pipeline->model());
    ResolveLora(model, lora.file, lora_options);  // throws if it does not fit
    const LoraReport report = CheckLora(model, lora.file);
    if (!report.complete()) warn(fmt::format("{}: {}", lora.file.source, report.ToString()));
  }
  PromptSyntax syntax = ParsePromptSyntax(command.prompt_syntax);
  if (syntax != PromptSyntax::kPlain) {
    options.context = PromptContexts(*pipeline, options, syntax, ShowSampling(bar).warn);
  }
  HeatMaps maps;
  if (!command.attention_maps.empty()) {
    Check(syntax == PromptSyntax::kPlain,
          "sample: --attention-maps shows the words of plain prompts, not of --prompt-syntax {}",
          command.prompt_syntax);
    MakeMapsFolder(command.attention_maps);
    options.hooks = maps.Hooks(pipeline->model());
  }
  if (command.vae_tiling) {
    AutoencoderKL* vae = pipeline->model().vae();
    Check(vae, "sample: --vae-tiling has no effect on a model without an autoencoder");
    vae->SetTiling(VaeTiling{});
  }
  std::vector<Image> pictures = TensorToImages(pipeline->Generate(options, ShowSampling(bar)));
  // Pictures first: they took longest. They name the prompts as given, with the tags of LoRAs.
  const std::vector<std::string> drawn_prompts = std::exchange(options.prompts, given_prompts);
  for (size_t i = 0; i < pictures.size(); ++i) {
    std::filesystem::path path = PathOf(command.out, i, count);
    std::vector<PngText> texts{{"parameters", GenerationParameters(pipeline->model(), options, i)}};
    WritePng(path, pictures[i], texts);
    fmt::print("{}\n", path.string());
  }
  if (!command.attention_maps.empty()) {
    WriteHeatMaps(command.attention_maps, maps, pipeline->model(), drawn_prompts, pictures);
  }
}

}  // namespace

void AddSample(Options& app, Selected& selected) {
  Options* sample = app.add_subcommand("sample", "Draw pictures from prompts");
  sample->footer(
      "Example:\n"
      "  calotype sample --model run --prompt \"a large blue cross on a gray background\" --steps "
      "25 --seed 7 --out x.png");
  auto command = std::make_shared<Command>();
  GenerateOptions& options = command->options;
  sample
      ->add_option(
          "-m,--model,--pretrained-model-name-or-path", command->model,
          "Run folder of `train` or `demo`, or diffusers' folder of a Stable Diffusion model")
      ->required();
  sample
      ->add_option("--lora", command->loras,
                   "LoRA, FILE or FILE:WEIGHT; may be given several times")
      ->take_all();
  sample->add_option("--lora-dir", command->lora_dir,
                     "Folder of the LoRAs that prompts name by <lora:NAME> or <lora:NAME:WEIGHT>");
  sample->add_flag("--allow-unmatched", command->allow_unmatched,
                   "Leave out what of a LoRA belongs to no layer of the model");
  sample->add_option("--custom-diffusion", command->custom_diffusion,
                     "Folder of `train custom-diffusion` or of diffusers: new words for the "
                     "prompts, and the cross-attention that draws them");
  sample->add_option("-p,--prompt", command->prompts, "What to draw; may be given several times")
      ->take_all()
      ->required();
  sample->add_option("-n,--negative-prompt", options.negative_prompt,
                     "What guidance leads away from");
  sample
      ->add_option("--prompt-syntax", command->prompt_syntax,
                   "plain; a1111: (word:1.3), [from:to:when], AND, BREAK; compel: word++, "
                   "(words)1.3, (\"a\", \"b\").blend(1, 1)")
      ->capture_default_str();
  sample->add_option("--attention-maps", command->attention_maps,
                     "Folder for a heat map of each word over its picture (DAAM)");
  sample->add_option("--steps,--num-inference-steps", options.steps, "Sampling steps")
      ->capture_default_str();
  sample->add_option(
      "--guidance-scale,--cfg-scale", options.guidance_scale,
      "1: the prompt alone; more follows it more closely [7.5 for Stable Diffusion, else "
      "1]");
  sample
      ->add_option("--guidance-rescale", options.guidance_rescale,
                   "Share of rescaling after guidance, 0 to 1")
      ->capture_default_str();
  sample->add_option("--sampler,--scheduler,--sampling-method", options.sampler,
                     "ddim, ddpm, pndm, euler, euler-karras, euler-a, dpm++-2m, dpm++-2m-karras, "
                     "dpm++-2m-sde, dpm++-2m-sde-karras, or a class of diffusers [the model's]");
  sample->add_option("--eta", options.eta, "Noise of DDIM's steps, 0 to 1")->capture_default_str();
  sample
      ->add_option(
          "--clip-skip", options.clip_skip,
          "Last layers of CLIP that the prompt skips; as in diffusers, the negative prompt "
          "does not")
      ->capture_default_str();
  sample->add_option("-i,--init-image,--init-img", command->init_image,
                     "Image to image: PNG or JPEG to start from");
  sample->add_option(
      "--mask-image,--mask", command->mask_image,
      "Inpainting: draw only where this picture, of the size of --init-image, is white");
  sample->add_option("--strength", options.strength,
                     "Share of the steps taken from --init-image on, 0 to 1 [0.8, with a mask 1]");
  sample->add_option("-W,--width", options.width, "Pixels [the model's, or --init-image's]");
  sample->add_option("-H,--height", options.height, "Pixels [the model's, or --init-image's]");
  sample->add_option("--side,--resolution", command->side, "Width and height at once")
      ->excludes("--width")
      ->excludes("--height");
  sample
      ->add_option("-s,--seed", command->seed, "Seed of the first picture; the next ones count up")
      ->capture_default_str()
      ->check(NotNegative());
  sample
      ->add_option(
          "--rng", options.rng,
          "Noise of a seed: philox; torch: the numbers that PyTorch draws; torch-batch: one "
          "generator for all pictures computed together")
      ->capture_default_str();
  sample
      ->add_option("-b,--count,--batch-count,--num-images", command->count,
                   "Pictures for each prompt")
      ->capture_default_str();
  sample->add_option("--batch-size", options.batch_size,
                     "Pictures computed together [64, for latents 1]");
  sample->add_flag("--vae-tiling", command->vae_tiling,
                   "Encode and decode large pictures tile by tile, in less memory");
  sample->add_option("--backend", command->backend, "jit or eager")->capture_default_str();
  sample
      ->add_option("--winograd", command->winograd,
                   "auto: 3x3 convolutions by Winograd's algorithm where it pays; or off")
      ->capture_default_str();
  sample->add_flag("--tune", command->tune,
                   "Measure which way to compute each convolution and product is fastest here; "
                   "minutes the first time, then it is remembered");
  sample
      ->add_option("-o,--out,--output", command->out,
                   "PNG file; several pictures get a number each")
      ->capture_default_str();
  sample->callback([command, &selected] {
    selected.run = [command, &selected] { Run(*command, selected.quiet); };
  });
}

}  // namespace calotype::app
