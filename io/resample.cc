#include "io/resample.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/error.h"

namespace calotype {
namespace {

constexpr int kBits = 32 - 8 - 2;  // of the fraction of a weight
constexpr double kLobes = 3;

double Sinc(double x) {
  if (x == 0) return 1;
  x *= std::numbers::pi;
  return std::sin(x) / x;
}

double Lanczos(double x) { return -kLobes <= x && x < kLobes ? Sinc(x) * Sinc(x / kLobes) : 0; }

// The taps of one output position along an axis.
struct Taps {
  int first = 0;
  std::vector<int32_t> weights;
};

std::vector<Taps> LanczosTaps(int from, int to) {
  const double scale = static_cast<double>(from) / to, filter = std::max(scale, 1.0);
  const double support = kLobes * filter;
  std::vector<Taps> all(static_cast<size_t>(to));
  for (int i = 0; i < to; ++i) {
    const double center = (i + 0.5) * scale;
    const int first = std::max(0, static_cast<int>(std::floor(center - support + 0.5)));
    const int last = std::min(from, static_cast<int>(std::floor(center + support + 0.5)));
    std::vector<double> weights;
    double sum = 0;
    for (int k = first; k < last; ++k) {
      weights.push_back(Lanczos((k - center + 0.5) * (1.0 / filter)));
      sum += weights.back();
    }
    Taps& taps = all[static_cast<size_t>(i)];
    taps.first = first;
    for (double w : weights) {
      if (sum != 0) w *= 1 / sum;
      const double fixed = w * (1 << kBits);
      taps.weights.push_back(static_cast<int32_t>(fixed + (fixed < 0 ? -0.5 : 0.5)));
    }
  }
  return all;
}

uint8_t ToByte(int32_t sum) { return static_cast<uint8_t>(std::clamp(sum >> kBits, 0, 255)); }

// Every row of `image` filtered to `width` pixels.
Image ResizeRows(const Image& image, int width) {
  Image result{width, image.height, {}};
  result.rgb.resize(size_t{3} * width * image.height);
  const std::vector<Taps> taps = LanczosTaps(image.width, width);
  for (int y = 0; y < image.height; ++y) {
    const uint8_t* row = image.rgb.data() + size_t{3} * y * image.width;
    uint8_t* to = result.rgb.data() + size_t{3} * y * width;
    for (const Taps& tap : taps) {
      const uint8_t* from = row + size_t{3} * tap.first;
      for (int c = 0; c < 3; ++c) {
        int32_t sum = 1 << (kBits - 1);
        for (size_t k = 0; k < tap.weights.size(); ++k) sum += from[3 * k + c] * tap.weights[k];
        *to++ = ToByte(sum);
      }
    }
  }
  return result;
}

Image ResizeColumns(const Image& image, int height) {
  Image result{image.width, height, {}};
  const size_t row_bytes = size_t{3} * image.width;
  result.rgb.resize(row_bytes * height);
  const std::vector<Taps> taps = LanczosTaps(image.height, height);
  std::vector<int32_t> sums(row_bytes);
  for (int y = 0; y < height; ++y) {
    const Taps& tap = taps[static_cast<size_t>(y)];
    std::fill(sums.begin(), sums.end(), 1 << (kBits - 1));
    for (size_t k = 0; k < tap.weights.size(); ++k) {
      const uint8_t* from = image.rgb.data() + (tap.first + k) * row_bytes;
      for (size_t x = 0; x < row_bytes; ++x) sums[x] += from[x] * tap.weights[k];
    }
    std::transform(sums.begin(), sums.end(), result.rgb.begin() + y * row_bytes, ToByte);
  }
  return result;
}

}  // namespace

Image ResizeLanczos(const Image& image, int width, int height) {
  CheckImage(image, "resize");
  constexpr int kMost = 16384;
  Check(width >= 1 && height >= 1 && width <= kMost && height <= kMost,
        "resize: the size {} x {} is not in [1, {}]", width, height, kMost);
  if (width == image.width && height == image.height) return image;
  if (height < image.height && image.height - height > 2 * (image.width - width)) {
    const Image columns = ResizeColumns(image, height);
    return width == image.width ? columns : ResizeRows(columns, width);
  }
  Image rows = width == image.width ? image : ResizeRows(image, width);
  return height == rows.height ? rows : ResizeColumns(rows, height);
}

std::vector<uint8_t> Luminance(const Image& image) {
  CheckImage(image, "luminance");
  std::vector<uint8_t> values;
  values.reserve(image.rgb.size() / 3);
  for (size_t i = 0; i < image.rgb.size(); i += 3) {
    const uint8_t* p = &image.rgb[i];
    values.push_back(
        static_cast<uint8_t>((19595 * p[0] + 38470 * p[1] + 7471 * p[2] + 0x8000) >> 16));
  }
  return values;
}

}  // namespace calotype
