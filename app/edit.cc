// calotype edit: a picture, and the same picture for other prompts (Prompt-to-Prompt).
#include <fmt/format.h>

#include <memory>

#include "app/commands.h"
#include "app/progress.h"
#include "io/file.h"
#include "io/png.h"
#include "pipelines/attention_editing.h"
#include "pipelines/lora_tags.h"

namespace calotype::app {
namespace {

struct Command {
  std::filesystem::path model, out = "edit.png";
  std::string prompt, backend = "jit";
  std::vector<std::string> edit_prompts, n_cross_replace;
  std::string n_self_replace = "0.4";
  uint64_t seed = 0;
  GenerateOptions options;
  AttentionEditOptions edit;
};

// "0.4": steps 0 to 40 %; "0.1:0.4".
StepRange ParseRange(const std::string& text, const char* option) {
  StepRange range;
  size_t colon = text.find(':');
  auto number = [&](const std::string& part) {
    size_t end = 0;
    double value = 0;
    try {
      value = std::stod(part, &end);
    } catch (const std::exception&) {
    }
    Check(!part.empty() && end == part.size(),
          "edit: {} is `{}`, must be a share of the steps such as 0.4, or 0.1:0.4", option, text);
    return value;
  };
  if (colon != text.npos) range.begin = number(text.substr(0, colon));
  range.end = number(colon == text.npos ? text : text.substr(colon + 1));
  return range;
}

// OUT-000.png, OUT-001.png, ...
std::filesystem::path PathOf(const std::filesystem::path& out, size_t index) {
  std::filesystem::path path = out;
  path.replace_filename(
      fmt::format("{}-{:03}{}", out.stem().string(), index, out.extension().string()));
  return path;
}

void CheckNoTags(std::string prompt) {
  const std::string given = prompt;
  Check(TakeLoraTags(prompt).empty(),
        "edit: the prompt {} names a LoRA; put it into the model first, with `calotype lora merge`",
        Quoted(given));
}

void Run(Command& command, bool quiet) {
  AttentionEditOptions& edit = command.edit;
  for (const std::string& text : command.n_cross_replace) {
    size_t equals = text.rfind('=');
    std::string word = equals == text.npos ? "default_" : text.substr(0, equals);
    std::string range = equals == text.npos ? text : text.substr(equals + 1);
    edit.n_cross_replace[word] = ParseRange(range, "--n-cross-replace");
  }
  edit.n_self_replace = ParseRange(command.n_self_replace, "--n-self-replace");
  std::vector<std::string> prompts = {command.prompt};
  prompts.insert(prompts.end(), command.edit_prompts.begin(), command.edit_prompts.end());
  if (edit.edit_type == "reweight" && prompts.size() == 1) prompts.push_back(command.prompt);
  Check(prompts.size() > 1, "edit: give one or more --edit-prompt");
  for (const std::string& prompt : prompts) CheckNoTags(prompt);
  CheckNoTags(command.options.negative_prompt);
  for (size_t i = 0; i < prompts.size(); ++i) CheckPngPath(PathOf(command.out, i));
  command.options.seeds = {command.seed};

  ProgressBar bar("draw", quiet);
  GenerateCallbacks callbacks = ShowSampling(bar);
  auto pipeline =
      TextToImagePipeline::Open(command.model, ParseBackend(command.backend), {}, callbacks.warn);
  std::vector<Image> pictures =
      TensorToImages(EditPictures(*pipeline, prompts, command.options, edit, callbacks));
  GenerateOptions drawn = command.options;
  drawn.prompts = prompts;
  drawn.seeds.assign(prompts.size(), command.seed);
  for (size_t i = 0; i < pictures.size(); ++i) {
    const std::filesystem::path path = PathOf(command.out, i);
    std::vector<PngText> texts{{"parameters", GenerationParameters(pipeline->model(), drawn, i)}};
    WritePng(path, pictures[i], texts);
    fmt::print("{}\n", path.string());
  }
}

}  // namespace

void AddEdit(Options& app, Selected& selected) {
  Options* edit = app.add_subcommand(
      "edit", "Draw a picture, and the same picture for other prompts (Prompt-to-Prompt)");
  edit->footer(
      "Writes OUT-000.png for the prompt and OUT-001.png, ... for the edit prompts. Example:\n"
      "  calotype edit --model demo --prompt \"a large red cross on a gray background\" "
      "--edit-prompt \"a large blue cross on a gray background\" --out x.png");
  auto command = std::make_shared<Command>();
  GenerateOptions& options = command->options;
  AttentionEditOptions& o = command->edit;
  edit->add_option("-m,--model,--pretrained-model-name-or-path", command->model,
                   "Run folder of `train` or `demo`, or diffusers' folder of a Stable Diffusion "
                   "model")
      ->required();
  edit->add_option("-p,--prompt", command->prompt, "What the source picture shows")->required();
  edit->add_option("-e,--edit-prompt", command->edit_prompts,
                   "What an edited picture shows; may be given several times")
      ->take_all();
  edit->add_option("--edit-type", o.edit_type,
                   "replace: word by word; refine: words are added; reweight: --equalizer-words "
                   "alone")
      ->capture_default_str();
  edit->add_option("--n-cross-replace", command->n_cross_replace,
                   "Share of the steps, or range 0.1:0.4, whose cross-attention is the source's; "
                   "WORD=SHARE for a word of the edit prompt [0.4]")
      ->take_all();
  edit->add_option("--n-self-replace", command->n_self_replace,
                   "Share or range of the steps whose self-attention is the source's")
      ->capture_default_str();
  edit->add_option("--equalizer-words", o.equalizer_words,
                   "Words of the edit prompts that count more or less")
      ->take_all();
  edit->add_option("--equalizer-strengths", o.equalizer_strengths,
                   "A factor for each of --equalizer-words")
      ->take_all();
  edit->add_option("--local-blend-words", o.local_blend_words,
                   "Words outside of which the picture stays; one text for each prompt, the "
                   "source's first")
      ->take_all();
  edit->add_option("--substruct-words", o.substruct_words,
                   "Words whose places stay too; one text for each prompt")
      ->take_all();
  edit->add_option("-n,--negative-prompt", options.negative_prompt,
                   "What guidance leads away from");
  edit->add_option("--steps,--num-inference-steps", options.steps, "Sampling steps")
      ->capture_default_str();
  edit->add_option("--guidance-scale,--cfg-scale", options.guidance_scale,
                   "1: the prompt alone; more follows it more closely [7.5 for Stable Diffusion, "
                   "else 1]");
  edit->add_option("--sampler,--scheduler,--sampling-method", options.sampler,
                   "As for `sample` [the model's]");
  edit->add_option("-W,--width", options.width, "Pixels [the model's]");
  edit->add_option("-H,--height", options.height, "Pixels [the model's]");
  edit->add_option("-s,--seed", command->seed, "Seed of all pictures")
      ->capture_default_str()
      ->check(NotNegative());
  edit->add_option("--rng", options.rng, "Noise of the seed: philox or torch, as for `sample`")
      ->capture_default_str();
  edit->add_option("--backend", command->backend, "jit or eager")->capture_default_str();
  edit->add_option("-o,--out,--output", command->out, "PNG files: a number is added to the name")
      ->capture_default_str();
  edit->callback([command, &selected] {
    selected.run = [command, &selected] { Run(*command, selected.quiet); };
  });
}

}  // namespace calotype::app
