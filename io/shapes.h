// The built-in data set `shapes`: 96 captions such as "a small red circle on a black background",
// each drawn at a random place, and the classifier that reads a caption back from a picture. It is
// small enough to train on in minutes and its accuracy can be measured without a person.
//
// Geometry, in units of the side with y downward, r = .24 (small) or .42 (large), (u, v) = point
// minus centre:
//   circle    u^2 + v^2 <= r^2
//   square    max(|u|, |v|) <= .95 r
//   triangle  apex (0, -r), base corners (+-r, .8 r)
//   cross     max(|u|, |v|) <= r and min(|u|, |v|) <= .32 r (a plus)
// The centre is (.5, .5) plus a jitter uniform in +-.08 on each axis. A pixel is the mean of 4 x 4
// samples.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "core/random.h"
#include "core/tensor.h"
#include "io/dataset.h"

namespace calotype {

constexpr int kShapeCaptions = 96;
constexpr int kShapeColors = 6;
constexpr int kShapesSide = 16;
constexpr float kShapesJitter = 0.08f;

// index = ((shape * 6 + color) * 2 + size) * 2 + background.
struct ShapeAttributes {
  int shape = 0;       // circle, square, triangle, cross
  int color = 0;       // red, green, blue, yellow, purple, white
  int size = 0;        // small, large
  int background = 0;  // black, gray
  bool operator==(const ShapeAttributes&) const = default;
};

// Errors: ValueError unless 0 <= caption < 96.
ShapeAttributes ShapeAttributesOf(int64_t caption);
// The number of the caption with these attributes.
int64_t ShapeCaptionIndex(const ShapeAttributes& attributes);
std::string ShapeCaption(int64_t caption);
// The gray of the background of a caption, in [-1, 1].
float ShapeBackground(int64_t caption);

// The picture [3, side, side] in [-1, 1] of a caption with the centre at (.5 + dx, .5 + dy).
Tensor RenderShape(int64_t caption, float dx, float dy, int side = kShapesSide);

class ShapesDataset : public Dataset {
 public:
  int64_t size() const override { return kShapeCaptions; }
  int side() const override { return kShapesSide; }
  std::string caption(int64_t index) const override { return ShapeCaption(index); }
  Tensor image(int64_t index, Random& random) const override;  // draws two numbers
};

// Shares of right answers in [0, 1].
struct CaptionAccuracy {
  double caption = 0, shape = 0, color = 0, size = 0, background = 0;
  int64_t samples = 0;
};

// Nearest picture by mean squared error among the renderings of all captions at the 5 x 5 places of
// a regular grid over the jitter range, its ends included.
class ShapeClassifier {
 public:
  ShapeClassifier();
  // The caption of the nearest rendering (the first one on a tie) for x [3, 16, 16] in [-1, 1].
  // Errors: ShapeError; NumericError if a value is not finite.
  int64_t Classify(const Tensor& x) const;
  // For x [B, 3, 16, 16] and the B captions that were asked for.
  CaptionAccuracy Evaluate(const Tensor& x, const std::vector<int64_t>& captions) const;

 private:
  static constexpr int kGrid = 5;
  Tensor renderings_;  // [96, 25, 768]
};

}  // namespace calotype
