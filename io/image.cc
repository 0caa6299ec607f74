#include "io/image.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace calotype {

namespace {

// The taps of one output position along an axis.
struct Taps {
  int first = 0;
  std::vector<float> weights;
};

std::vector<Taps> TriangleTaps(int from, int to) {
  std::vector<Taps> all(to);
  double scale = static_cast<double>(from) / to;
  double support = std::max(scale, 1.0);
  for (int i = 0; i < to; ++i) {
    double center = (i + 0.5) * scale;
    int first = std::max(0, static_cast<int>(std::floor(center - support + 0.5)));
    int last = std::min(from, static_cast<int>(std::floor(center + support + 0.5)));
    std::vector<double> weights;
    double sum = 0;
    for (int k = first; k < last; ++k) {
      double w = std::max(0.0, 1.0 - std::abs((k + 0.5 - center) / support));
      weights.push_back(w);
      sum += w;
    }
    all[i].first = first;
    for (double w : weights) all[i].weights.push_back(static_cast<float>(w / sum));
  }
  return all;
}

uint8_t RoundToByte(float x) {
  return static_cast<uint8_t>(std::nearbyint(std::clamp(x, 0.0f, 255.0f)));
}

}  // namespace

void CheckImage(const Image& image, const char* what) {
  bool whole = image.width > 0 && image.height > 0 &&
               image.rgb.size() == size_t{3} * image.width * image.height;
  Check(whole, "{}: picture of {} x {} with {} bytes", what, image.width, image.height,
        image.rgb.size());
}

Tensor ImageToTensor(const Image& image) {
  CheckImage(image, "image to tensor");
  Tensor result({3, image.height, image.width});
  size_t pixels = size_t{1} * image.width * image.height;
  float* to = result.data();
  for (size_t i = 0; i < pixels; ++i) {
    for (size_t c = 0; c < 3; ++c) {
      to[c * pixels + i] = static_cast<float>(image.rgb[3 * i + c]) / 127.5f - 1.0f;
    }
  }
  return result;
}

Image TensorToImage(const Tensor& x) {
  const Shape& shape = x.shape();
  bool fits = (shape.rank() == 3 || (shape.rank() == 4 && shape[0] == 1)) && shape[-3] == 3 &&
              shape[-2] > 0 && shape[-1] > 0 && shape[-2] <= (1 << 20) && shape[-1] <= (1 << 20);
  Check<ShapeError>(fits, "tensor to image: shape {} is not [3, height, width]", shape.ToString());
  Image image{static_cast<int>(shape[-1]), static_cast<int>(shape[-2]), {}};
  size_t pixels = size_t{1} * image.width * image.height;
  image.rgb.resize(3 * pixels);
  const float* from = x.data();
  for (size_t c = 0; c < 3; ++c) {
    for (size_t i = 0; i < pixels; ++i) {
      float value = from[c * pixels + i];
      if (std::isnan(value)) [[unlikely]] {
        Fail<NumericError>("tensor to image: NaN in channel {} at x = {}, y = {}", c,
                           i % image.width, i / image.width);
      }
      image.rgb[3 * i + c] = RoundToByte((value / 2.0f + 0.5f) * 255.0f);
    }
  }
  return image;
}

std::vector<Image> TensorToImages(const Tensor& x) {
  const Shape& shape = x.shape();
  Check<ShapeError>(shape.rank() == 4,
                    "tensor to images: shape {} is not [batch, 3, height, width]",
                    shape.ToString());
  std::vector<Image> images;
  Tensor one({shape[1], shape[2], shape[3]});
  for (int64_t b = 0; b < shape[0]; ++b) {
    std::copy_n(x.data() + b * one.elements(), one.elements(), one.data());
    images.push_back(TensorToImage(one));
  }
  return images;
}

Image ImageGrid(std::span<const Image> images, int columns, int padding) {
  Check(!images.empty() && columns > 0 && padding >= 0,
        "image grid: {} pictures in {} columns with padding {}", images.size(), columns, padding);
  int count = static_cast<int>(images.size());
  columns = std::min(columns, count);
  int rows = (count + columns - 1) / columns;
  int width = images[0].width, height = images[0].height;
  for (const Image& image : images) {
    CheckImage(image, "image grid");
    Check(image.width == width && image.height == height,
          "image grid: a picture of {} x {} beside one of {} x {}", image.width, image.height,
          width, height);
  }
  int64_t total_width =
      CheckedAdd(CheckedMul(columns, width + padding, "image grid"), padding, "image grid");
  int64_t total_height =
      CheckedAdd(CheckedMul(rows, height + padding, "image grid"), padding, "image grid");
  Check(total_width <= (1 << 20) && total_height <= (1 << 20),
        "image grid: {} x {} pixels are too many", total_width, total_height);
  Image grid{static_cast<int>(total_width), static_cast<int>(total_height), {}};
  grid.rgb.assign(size_t{3} * grid.width * grid.height, 255);
  for (int i = 0; i < count; ++i) {
    int left = padding + i % columns * (width + padding);
    int top = padding + i / columns * (height + padding);
    for (int y = 0; y < height; ++y) {
      std::copy_n(images[i].rgb.begin() + size_t{3} * y * width, size_t{3} * width,
                  grid.rgb.begin() + 3 * (size_t{1} * (top + y) * grid.width + left));
    }
  }
  return grid;
}

Image Resize(const Image& image, int width, int height) {
  CheckImage(image, "resize");
  Check(width > 0 && height > 0 && width <= (1 << 20) && height <= (1 << 20),
        "resize: {} x {} is not a size", width, height);
  if (width == image.width && height == image.height) return image;
  std::vector<Taps> columns = TriangleTaps(image.width, width);
  std::vector<Taps> rows = TriangleTaps(image.height, height);
  // Rows first to width, then columns to height; intermediate values stay f32.
  std::vector<float> narrow(size_t{3} * width * image.height);
  for (int y = 0; y < image.height; ++y) {
    const uint8_t* from = image.rgb.data() + size_t{3} * y * image.width;
    float* to = narrow.data() + size_t{3} * y * width;
    for (int x = 0; x < width; ++x) {
      const Taps& taps = columns[x];
      float sum[3] = {0, 0, 0};
      for (size_t k = 0; k < taps.weights.size(); ++k) {
        for (size_t c = 0; c < 3; ++c) sum[c] += taps.weights[k] * from[3 * (taps.first + k) + c];
      }
      std::copy_n(sum, 3, to + 3 * x);
    }
  }
  Image result{width, height, std::vector<uint8_t>(size_t{3} * width * height)};
  std::vector<float> line(size_t{3} * width);
  for (int y = 0; y < height; ++y) {
    std::fill(line.begin(), line.end(), 0.0f);
    for (size_t k = 0; k < rows[y].weights.size(); ++k) {
      const float* from = narrow.data() + line.size() * (rows[y].first + k);
      float w = rows[y].weights[k];
      for (size_t i = 0; i < line.size(); ++i) line[i] += w * from[i];
    }
    std::transform(line.begin(), line.end(), result.rgb.begin() + line.size() * y, RoundToByte);
  }
  return result;
}

Image ResizeShortSide(const Image& image, int size) {
  CheckImage(image, "resize");
  Check(size > 0 && size <= (1 << 14), "resize: size {} is out of range", size);
  int short_side = std::min(image.width, image.height);
  auto scaled = [&](int side) {
    return side == short_side ? size : static_cast<int>(int64_t{size} * side / short_side);
  };
  int64_t long_side = int64_t{size} * std::max(image.width, image.height) / short_side;
  Check(long_side <= (1 << 20), "resize: a picture of {} x {} is too long for size {}", image.width,
        image.height, size);
  return Resize(image, scaled(image.width), scaled(image.height));
}

Image Crop(const Image& image, int left, int top, int width, int height) {
  CheckImage(image, "crop");
  Check(left >= 0 && top >= 0 && width > 0 && height > 0 && width <= image.width - left &&
            height <= image.height - top,
        "crop: {} x {} at ({}, {}) does not lie within a picture of {} x {}", width, height, left,
        top, image.width, image.height);
  Image result{width, height, std::vector<uint8_t>(size_t{3} * width * height)};
  for (int y = 0; y < height; ++y) {
    std::copy_n(image.rgb.begin() + 3 * (size_t{1} * (top + y) * image.width + left),
                size_t{3} * width, result.rgb.begin() + size_t{3} * y * width);
  }
  return result;
}

Image ResizeAndCrop(const Image& image, int size) {
  Image resized = ResizeShortSide(image, size);
  // torchvision rounds the corner to even on ties.
  int left = static_cast<int>(std::nearbyint((resized.width - size) / 2.0));
  int top = static_cast<int>(std::nearbyint((resized.height - size) / 2.0));
  return Crop(resized, left, top, size, size);
}

Image FlipHorizontally(const Image& image) {
  CheckImage(image, "flip");
  Image result = image;
  for (int y = 0; y < image.height; ++y) {
    for (int x = 0; x < image.width; ++x) {
      std::copy_n(image.rgb.begin() + 3 * (size_t{1} * y * image.width + x), 3,
                  result.rgb.begin() + 3 * (size_t{1} * y * image.width + image.width - 1 - x));
    }
  }
  return result;
}

}  // namespace calotype
