#include "pipelines/demo.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "core/json.h"
#include "io/atomic_file.h"
#include "io/image.h"
#include "io/png.h"
#include "pipelines/training_setup.h"

namespace calotype {

namespace fs = std::filesystem;

TrainOptions DemoTrainOptions(const DemoOptions& options) {
  TrainOptions train;  // its defaults are the demo's
  train.optimizer = options.optimizer;
  train.backend = options.backend;
  train.seed = options.seed;
  train.validation_fraction = 0;  // all 96 captions are drawn, so all are learned
  if (options.optimizer == "sgd") {
    train.learning_rate = 0.1;
    train.momentum = 0.9;
    train.weight_decay = 0;
    train.train_batch_size = 16;
    train.max_train_steps = 400;
    train.prediction_type = "epsilon";
    train.lr_scheduler = "constant";
    train.lr_warmup_steps = 0;
  } else {
    Check(options.optimizer == "adamw", "demo: the optimizer is `{}`, must be adamw or sgd",
          options.optimizer);
  }
  if (options.steps > 0) train.max_train_steps = options.steps;
  return train;
}

std::string DemoSummary::ToJson() const {
  nlohmann::ordered_json document = {
      {"caption_accuracy", accuracy.caption},
      {"caption_accuracy_shape", accuracy.shape},
      {"caption_accuracy_color", accuracy.color},
      {"caption_accuracy_size", accuracy.size},
      {"caption_accuracy_background", accuracy.background},
      {"samples", accuracy.samples},
      {"train_seconds", training.seconds},
      {"steps", training.steps},
      {"final_loss", training.final_loss},
      {"compile_seconds", compile_seconds},
      {"eager_ms_b1", b1.eager_ms},
      {"jit_ms_b1", b1.jit_ms},
      {"eager_ms_b64", b64.eager_ms},
      {"jit_ms_b64", b64.jit_ms},
      {"max_rel_difference", std::max(b1.max_rel_difference, b64.max_rel_difference)},
  };
  return JsonFile(document);
}

DemoSummary RunDemo(const DemoOptions& options, const DemoCallbacks& callbacks) {
  Check(options.seeds_per_caption >= 1 && options.seeds_per_caption <= 1000,
        "demo: {} pictures a caption, must be in [1, 1000]", options.seeds_per_caption);
  DemoSummary summary;
  {
    TrainOptions train = DemoTrainOptions(options);
    auto data = OpenDataset(train, callbacks.training.message);
    auto model = MakeModel(train, *data);
    summary.training =
        Trainer(*model, *data, train, options.folder, options.resume, callbacks.training).Run();
  }

  // From here on only what lies in the folder counts.
  auto pipeline = TextToImagePipeline::Load(options.folder, Backend::kJit);
  summary.b1 = CompareUNet(pipeline->model(), 1);
  summary.b64 = CompareUNet(pipeline->model(), 64, {.seconds = 2});

  GenerateOptions generate;
  generate.steps = options.sampling_steps;
  std::vector<int64_t> captions;
  for (int64_t caption = 0; caption < kShapeCaptions; ++caption) {
    for (int64_t seed = 0; seed < options.seeds_per_caption; ++seed) {
      captions.push_back(caption);
      generate.prompts.push_back(ShapeCaption(caption));
      generate.seeds.push_back(options.seed + static_cast<uint64_t>(seed));
    }
  }
  Tensor samples = pipeline->Generate(generate, callbacks.sampling);
  summary.accuracy = ShapeClassifier().Evaluate(samples, captions);
  summary.compile_seconds =
      summary.b1.compile_seconds + summary.b64.compile_seconds + pipeline->compile_seconds();

  std::vector<Image> pictures = TensorToImages(samples);
  std::error_code error;
  fs::create_directories(options.folder / "pictures", error);
  Check<FileError>(!error, "{}: cannot make the folder: {}", (options.folder / "pictures").string(),
                   error.message());
  for (size_t i = 0; i < pictures.size(); ++i) {
    std::vector<PngText> texts{
        {"parameters", GenerationParameters(pipeline->model(), generate, i)}};
    WritePng(options.folder / "pictures" /
                 fmt::format("caption-{:02}-seed-{}.png", captions[i], generate.seeds[i]),
             pictures[i], texts);
  }
  WritePng(options.folder / "grid.png",
           ImageGrid(pictures, static_cast<int>(6 * options.seeds_per_caption)));
  WriteFile(options.folder / "summary.json", summary.ToJson());
  return summary;
}

}  // namespace calotype
