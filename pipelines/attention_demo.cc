#include "pipelines/attention_demo.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/json.h"
#include "io/atomic_file.h"
#include "io/png.h"
#include "pipelines/rows.h"

namespace calotype {
namespace {

double Overlap(const Tensor& a, const Tensor& b) {
  double both = 0, either = 0;
  for (int64_t i = 0; i < a.elements(); ++i) {
    both += a.data()[i] * b.data()[i];
    either += std::max(a.data()[i], b.data()[i]);
  }
  return either > 0 ? both / either : 1;
}

// Adds edited pictures (source first) to the counts.
void Count(const ShapeClassifier& classifier, const Tensor& pictures,
           const std::vector<int64_t>& captions, EditAccuracy& to) {
  Tensor source = Row(pictures, 0);
  ShapeAttributes before = ShapeAttributesOf(classifier.Classify(source));
  Tensor mask = ForegroundMask(source, captions[0]);
  for (size_t i = 1; i < captions.size(); ++i) {
    Tensor picture = Row(pictures, static_cast<int64_t>(i));
    ShapeAttributes after = ShapeAttributesOf(classifier.Classify(picture));
    to.color += after.color == ShapeAttributesOf(captions[i]).color;
    to.kept += after.shape == before.shape && after.size == before.size &&
               after.background == before.background;
    to.overlap += Overlap(mask, ForegroundMask(picture, captions[i]));
    ++to.pictures;
  }
}

void Finish(EditAccuracy& accuracy) {
  auto n = static_cast<double>(accuracy.pictures);
  accuracy.color /= n;
  accuracy.kept /= n;
  accuracy.overlap /= n;
}

nlohmann::ordered_json ToJsonOf(const EditAccuracy& a) {
  return {{"color", a.color}, {"kept", a.kept}, {"overlap", a.overlap}, {"pictures", a.pictures}};
}

nlohmann::ordered_json ToJsonOf(const HeatShare& share) {
  return {{"median", share.median}, {"least", share.least}};
}

// Words of "a small red circle on a black background" whose maps are measured together.
const std::array<std::vector<size_t>, 4> kHeatWords = {{{3}, {2}, {2, 3}, {6}}};

double ShareInside(const Tensor& map, const Tensor& mask) {
  double inside = 0, sum = 0, area = 0;
  for (int64_t p = 0; p < map.elements(); ++p) {
    inside += map.data()[p] * mask.data()[p];
    sum += map.data()[p];
    area += mask.data()[p];
  }
  return area > 0 && sum > 0 ? inside / sum / (area / static_cast<double>(map.elements())) : 0;
}

// Each picture `factor` times as large.
Image Enlarged(const Image& image, int factor) {
  Image large{image.width * factor, image.height * factor, {}};
  for (int y = 0; y < large.height; ++y) {
    for (int x = 0; x < large.width; ++x) {
      auto at = static_cast<size_t>((y / factor) * image.width + x / factor) * 3;
      large.rgb.insert(large.rgb.end(), image.rgb.begin() + static_cast<int64_t>(at),
                       image.rgb.begin() + static_cast<int64_t>(at) + 3);
    }
  }
  return large;
}

}  // namespace

Tensor ForegroundMask(const Tensor& picture, int64_t caption) {
  const float background = ShapeBackground(caption);
  int64_t height = picture.shape()[1], width = picture.shape()[2], pixels = height * width;
  Tensor mask({height, width});
  for (int64_t p = 0; p < pixels; ++p) {
    float distance = 0;
    for (int64_t c = 0; c < 3; ++c) {
      float d = picture.data()[c * pixels + p] - background;
      distance += d * d;
    }
    mask.data()[p] = distance > 0.25f ? 1.0f : 0.0f;
  }
  return mask;
}

std::string AttentionDemoSummary::ToJson() const {
  nlohmann::ordered_json document = {{"edited", ToJsonOf(edited)},
                                     {"redrawn", ToJsonOf(redrawn)},
                                     {"heat_shape", ToJsonOf(shape)},
                                     {"heat_color", ToJsonOf(color)},
                                     {"heat_color_and_shape", ToJsonOf(color_and_shape)},
                                     {"heat_background", ToJsonOf(background)}};
  return JsonFile(document);
}

AttentionDemoSummary RunAttentionDemo(const AttentionDemoOptions& options,
                                      const GenerateCallbacks& callbacks) {
  auto pipeline = TextToImagePipeline::Load(options.folder, Backend::kJit);
  ShapeClassifier classifier;
  AttentionDemoSummary summary;
  GenerateOptions generate;
  generate.steps = options.sampling_steps;
  GenerateCallbacks quiet{.cancelled = callbacks.cancelled, .warn = callbacks.warn};
  std::vector<Image> edit_grid, heat_grid;
  std::array<std::vector<double>, 4> heat;
  Check(options.captions >= 1 && options.captions <= kShapeCaptions,
        "demo: {} captions, must be in [1, {}]", options.captions, kShapeCaptions);
  for (int64_t i = 0; i < options.captions; ++i) {
    int64_t caption = i * kShapeCaptions / options.captions;
    ShapeAttributes attributes = ShapeAttributesOf(caption);
    std::vector<int64_t> captions = {caption};
    ShapeAttributes other = attributes;
    for (other.color = 0; other.color < kShapeColors; ++other.color) {
      if (other.color != attributes.color) captions.push_back(ShapeCaptionIndex(other));
    }
    std::vector<std::string> prompts;
    for (int64_t c : captions) prompts.push_back(ShapeCaption(c));
    AttentionEditOptions edit{.n_cross_replace = {{"default_", options.n_cross_replace}},
                              .n_self_replace = options.n_self_replace};
    std::vector<std::string> words = SplitWords(prompts[0]);
    if (options.local_blend) edit.local_blend_words.assign(prompts.size(), words[3]);
    generate.seeds = {options.seed + static_cast<uint64_t>(caption)};
    Tensor pictures = EditPictures(*pipeline, prompts, generate, edit, quiet);
    Count(classifier, pictures, captions, summary.edited);

    HeatMaps maps;
    GenerateOptions plain = generate;
    plain.prompts = prompts;
    plain.seeds.assign(prompts.size(), generate.seeds[0]);
    plain.hooks = maps.Hooks(pipeline->model());
    Tensor redrawn = pipeline->Generate(plain, quiet);
    Count(classifier, redrawn, captions, summary.redrawn);

    PromptTokens tokens = TokenizePrompt(pipeline->model(), prompts[0]);
    std::vector<int64_t> all;
    for (const auto& positions : tokens.positions) {
      all.insert(all.end(), positions.begin(), positions.end());
    }
    Tensor mask = ForegroundMask(Row(redrawn, 0), caption);
    for (size_t k = 0; k < kHeatWords.size(); ++k) {
      std::vector<int64_t> positions;
      for (size_t word : kHeatWords[k]) {
        std::vector<int64_t> of = tokens.Of(words[word]);
        positions.insert(positions.end(), of.begin(), of.end());
      }
      heat[k].push_back(ShareInside(maps.Word(0, positions, all), mask));
    }

    // A caption of each shape, size and background, in different colours.
    if (attributes.color ==
        (attributes.shape + 2 * attributes.size + 3 * attributes.background) % kShapeColors) {
      for (const Image& image : TensorToImages(pictures)) edit_grid.push_back(Enlarged(image, 2));
      Image picture = TensorToImages(redrawn)[0];
      heat_grid.push_back(Resize(Enlarged(picture, 4), 64, 64));
      for (const std::string& word : {words[3], words[2], words[6]}) {
        heat_grid.push_back(
            Resize(HeatMapOverlay(picture, maps.Word(0, tokens.Of(word), all)), 64, 64));
      }
    }
    if (callbacks.progress) callbacks.progress(i + 1, options.captions);
  }
  Finish(summary.edited);
  Finish(summary.redrawn);
  HeatShare* shares[] = {&summary.shape, &summary.color, &summary.color_and_shape,
                         &summary.background};
  for (size_t i = 0; i < heat.size(); ++i) {
    std::sort(heat[i].begin(), heat[i].end());
    size_t middle = heat[i].size() / 2;
    *shares[i] = {(heat[i][(heat[i].size() - 1) / 2] + heat[i][middle]) / 2, heat[i][0]};
  }
  if (!edit_grid.empty()) {
    WritePng(options.folder / "edit.png", ImageGrid(edit_grid, 12));
    WritePng(options.folder / "heat.png", ImageGrid(heat_grid, 8));
  }
  WriteFile(options.folder / "edit.json", summary.ToJson());
  return summary;
}

}  // namespace calotype
