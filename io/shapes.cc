#include "io/shapes.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"

namespace calotype {

namespace {

constexpr const char* kShapes[] = {"circle", "square", "triangle", "cross"};
constexpr const char* kColors[kShapeColors] = {"red", "green", "blue", "yellow", "purple", "white"};
constexpr const char* kSizes[] = {"small", "large"};
constexpr const char* kBackgrounds[] = {"black", "gray"};
constexpr float kColorValues[kShapeColors][3] = {{1, .1f, .1f}, {.1f, .8f, .1f}, {.15f, .25f, 1},
                                                 {1, .9f, .1f}, {.6f, .1f, .8f}, {1, 1, 1}};
constexpr double kRadii[] = {.24, .42};
constexpr float kBackgroundValues[] = {0, .45f};

bool Inside(int shape, double u, double v, double r) {
  switch (shape) {
    case 0:
      return u * u + v * v <= r * r;
    case 1:
      return std::max(std::abs(u), std::abs(v)) <= .95 * r;
    case 2:
      return v <= .8 * r && 1.8 * std::abs(u) <= v + r;
    default:
      return std::max(std::abs(u), std::abs(v)) <= r &&
             std::min(std::abs(u), std::abs(v)) <= .32 * r;
  }
}

}  // namespace

ShapeAttributes ShapeAttributesOf(int64_t caption) {
  Check(caption >= 0 && caption < kShapeCaptions, "shapes: caption {} is not in [0, {})", caption,
        kShapeCaptions);
  int i = static_cast<int>(caption);
  return {i / (4 * kShapeColors), i / 4 % kShapeColors, i / 2 % 2, i % 2};
}

int64_t ShapeCaptionIndex(const ShapeAttributes& a) {
  return ((int64_t{a.shape} * kShapeColors + a.color) * 2 + a.size) * 2 + a.background;
}

float ShapeBackground(int64_t caption) {
  return 2 * kBackgroundValues[ShapeAttributesOf(caption).background] - 1;
}

std::string ShapeCaption(int64_t caption) {
  ShapeAttributes a = ShapeAttributesOf(caption);
  return fmt::format("a {} {} {} on a {} background", kSizes[a.size], kColors[a.color],
                     kShapes[a.shape], kBackgrounds[a.background]);
}

Tensor RenderShape(int64_t caption, float dx, float dy, int side) {
  constexpr int kSamples = 4;
  ShapeAttributes a = ShapeAttributesOf(caption);
  Check(side > 0 && side <= 4096, "shapes: side {} is not in [1, 4096]", side);
  Tensor result({3, side, side});
  float* to = result.data();
  int pixels = side * side;
  for (int y = 0; y < side; ++y) {
    for (int x = 0; x < side; ++x) {
      int hits = 0;
      for (int s = 0; s < kSamples * kSamples; ++s) {
        int column = s % kSamples, row = s / kSamples;
        double u = (x + (column + .5) / kSamples) / side - .5 - dx;
        double v = (y + (row + .5) / kSamples) / side - .5 - dy;
        hits += Inside(a.shape, u, v, kRadii[a.size]);
      }
      float cover = static_cast<float>(hits) / (kSamples * kSamples);
      float ground = kBackgroundValues[a.background];
      for (int c = 0; c < 3; ++c) {
        float value = ground + cover * (kColorValues[a.color][c] - ground);
        to[c * pixels + y * side + x] = 2 * value - 1;
      }
    }
  }
  return result;
}

Tensor ShapesDataset::image(int64_t index, Random& random) const {
  float dx = (2 * random.Uniform() - 1) * kShapesJitter;
  float dy = (2 * random.Uniform() - 1) * kShapesJitter;
  return RenderShape(index, dx, dy);
}

ShapeClassifier::ShapeClassifier()
    : renderings_({kShapeCaptions, kGrid * kGrid, 3 * kShapesSide * kShapesSide}) {
  float* to = renderings_.data();
  auto offset = [](int i) { return kShapesJitter * (2.0f * i / (kGrid - 1) - 1); };
  for (int64_t caption = 0; caption < kShapeCaptions; ++caption) {
    for (int place = 0; place < kGrid * kGrid; ++place) {
      Tensor picture = RenderShape(caption, offset(place % kGrid), offset(place / kGrid));
      to = std::copy_n(picture.data(), picture.elements(), to);
    }
  }
}

int64_t ShapeClassifier::Classify(const Tensor& x) const {
  Check<ShapeError>(x.shape() == Shape({3, kShapesSide, kShapesSide}),
                    "shape classifier: picture of shape {}, expected [3, {}, {}]",
                    x.shape().ToString(), kShapesSide, kShapesSide);
  auto values = x.values();
  Check<NumericError>(
      std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); }),
      "shape classifier: the picture has values that are not finite");
  int64_t best = 0;
  double smallest = std::numeric_limits<double>::infinity();
  const float* from = renderings_.data();
  for (int64_t i = 0; i < kShapeCaptions * kGrid * kGrid; ++i) {
    double error = 0;
    for (float value : values) {
      double d = value - *from++;
      error += d * d;
    }
    if (error < smallest) {
      smallest = error;
      best = i / (kGrid * kGrid);
    }
  }
  return best;
}

CaptionAccuracy ShapeClassifier::Evaluate(const Tensor& x,
                                          const std::vector<int64_t>& captions) const {
  Check<ShapeError>(x.shape().rank() == 4 && x.shape()[0] == static_cast<int64_t>(captions.size()),
                    "shape classifier: pictures of shape {} for {} captions", x.shape().ToString(),
                    captions.size());
  CaptionAccuracy result;
  result.samples = x.shape()[0];
  Tensor one({x.shape()[1], x.shape()[2], x.shape()[3]});
  for (int64_t b = 0; b < result.samples; ++b) {
    std::copy_n(x.data() + b * one.elements(), one.elements(), one.data());
    ShapeAttributes seen = ShapeAttributesOf(Classify(one));
    ShapeAttributes asked = ShapeAttributesOf(captions[b]);
    result.caption += seen == asked;
    result.shape += seen.shape == asked.shape;
    result.color += seen.color == asked.color;
    result.size += seen.size == asked.size;
    result.background += seen.background == asked.background;
  }
  for (double* share :
       {&result.caption, &result.shape, &result.color, &result.size, &result.background}) {
    *share /= static_cast<double>(std::max<int64_t>(result.samples, 1));
  }
  return result;
}

}  // namespace calotype
