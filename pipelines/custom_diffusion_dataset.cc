#include "pipelines/custom_diffusion_dataset.h"

#include <algorithm>
#include <array>

#include "core/error.h"
#include "io/image.h"

namespace calotype {
namespace {

// Two for small pictures, two for large ones.
constexpr std::array<const char*, 4> kBeginnings{"a far away ", "very small ", "zoomed in ",
                                                 "close up "};
constexpr float kSmaller = 0.66f;  // share of draws that are not enlarged
constexpr int kFewestCells = 3;    // of a scaled picture's side, so that one is left in the middle

}  // namespace

CustomDiffusionDataset::CustomDiffusionDataset(const Dataset& pictures, int64_t factor,
                                               bool augment)
    : pictures_(pictures), factor_(static_cast<int>(factor)), augment_(augment) {
  const int smallest = augment ? side() / 3 : side();
  Check(channels() == 3 && factor >= 1 && side() % factor == 0,
        "custom diffusion: pictures of {} channels and {} pixels a side with a factor of {}",
        channels(), side(), factor);
  Check(
      smallest >= kFewestCells * factor,
      "custom diffusion: pictures of {} pixels a side are too small{}, a side must be at least {}",
      side(), augment ? " to be scaled (no_augmentation does without)" : "",
      kFewestCells * factor * (augment ? 3 : 1));
}

std::vector<std::string> CustomDiffusionDataset::captions(int64_t index) const {
  const std::vector<std::string> own = pictures_.captions(index);
  std::vector<std::string> all = own;
  for (const char* beginning : kBeginnings) {
    for (const std::string& caption : own) {
      if (augment_) all.push_back(beginning + caption);
    }
  }
  return all;
}

Dataset::Drawn CustomDiffusionDataset::draw(int64_t index, Random& random) const {
  const Tensor picture = pictures_.image(index, random);
  const int side = this->side();
  int scale = side;
  if (augment_ && random.Uniform() < kSmaller) {
    scale = side / 3 + static_cast<int>(random.Integer(side + 1 - side / 3));
  } else if (augment_) {
    const int low = side * 6 / 5, high = std::max(low + 1, side * 7 / 5);
    scale = low + static_cast<int>(random.Integer(high - low));
  }
  // The place of the smaller square in the larger one.
  const int room = std::abs(side - scale);
  const int top = static_cast<int>(random.Integer(room + 1)),
            left = static_cast<int>(random.Integer(room + 1));
  const auto captions = static_cast<int64_t>(pictures_.captions(index).size());
  Drawn drawn{.image = picture, .caption = random.Integer(captions)};
  if (scale * 5 < side * 3) {
    drawn.caption += captions * (1 + random.Integer(2));
  } else if (scale > side) {
    drawn.caption += captions * (3 + random.Integer(2));
  }

  const int cells = side / factor_;
  drawn.mask = Tensor::Zeros({1, cells, cells});
  int first_row = 0, last_row = cells, first_column = 0, last_column = cells;
  if (scale <= side) {
    first_row = top / factor_ + 1, last_row = (top + scale) / factor_ - 1;
    first_column = left / factor_ + 1, last_column = (left + scale) / factor_ - 1;
  }
  for (int row = first_row; row < last_row; ++row) {
    for (int column = first_column; column < last_column; ++column)
      drawn.mask.data()[row * cells + column] = 1;
  }
  if (scale == side) return drawn;

  const Image scaled = Resize(TensorToImage(picture), scale, scale);
  if (scale > side) {
    drawn.image = ImageToTensor(Crop(scaled, left, top, side, side));
    return drawn;
  }
  const Tensor small = ImageToTensor(scaled);
  drawn.image = Tensor::Zeros({3, side, side});
  for (int row = 0; row < 3 * scale; ++row) {
    const int channel = row / scale, y = row % scale;
    std::copy_n(small.data() + row * scale, scale,
                drawn.image.data() + (channel * side + top + y) * side + left);
  }
  return drawn;
}

}  // namespace calotype
