#include "pipelines/init_image.h"

#include <algorithm>

#include "core/error.h"
#include "io/resample.h"

namespace calotype {

InitImage PrepareInitImage(const Image& image, const std::optional<Image>& mask, int64_t width,
                           int64_t height, int64_t factor) {
  const int W = static_cast<int>(width), H = static_cast<int>(height);
  InitImage init;
  init.picture = ImageToTensor(ResizeLanczos(image, W, H)).Reshape({1, 3, height, width});
  if (!mask) return init;
  const std::vector<uint8_t> gray = Luminance(ResizeLanczos(*mask, W, H));
  init.masked_picture = init.picture.Clone();
  float* picture = init.masked_picture.data();
  for (int c = 0; c < 3; ++c) {
    for (uint8_t value : gray) {
      if (value >= 128) *picture = 0;
      ++picture;
    }
  }
  init.mask = Tensor({1, 1, height / factor, width / factor});
  float* to = init.mask.data();
  for (int64_t y = 0; y < height; y += factor) {
    for (int64_t x = 0; x < width; x += factor)
      *to++ = gray[static_cast<size_t>(y * width + x)] >= 128 ? 1.0f : 0.0f;
  }
  return init;
}

int64_t FirstStep(int64_t steps, double strength) {
  return steps - std::min(static_cast<int64_t>(static_cast<double>(steps) * strength), steps);
}

Tensor BlendByMask(const Tensor& mask, const Tensor& x, const Tensor& kept) {
  Check<ShapeError>(x.type() == kept.type() && x.elements() % mask.elements() == 0,
                    "blend: samples {} and {}, mask {}", x.type(), kept.type(), mask.type());
  Tensor result(x.shape());
  const size_t pixels = static_cast<size_t>(mask.elements());
  for (size_t i = 0; i < static_cast<size_t>(x.elements()); ++i) {
    const float m = mask.data()[i % pixels];
    result.data()[i] = (1 - m) * kept.data()[i] + m * x.data()[i];
  }
  return result;
}

Tensor JoinMask(const Tensor& x, const Tensor& mask, const Tensor& masked) {
  Check<ShapeError>(x.type() == masked.type() && x.shape().rank() == 4 &&
                        mask.shape() == Shape({1, 1, x.shape()[2], x.shape()[3]}),
                    "join: samples {} and {}, mask {}", x.type(), masked.type(), mask.type());
  const int64_t B = x.shape()[0], C = x.shape()[1], pixels = mask.elements();
  Tensor result(x.shape().With(1, 2 * C + 1));
  float* to = result.data();
  for (int64_t b = 0; b < B; ++b) {
    to = std::copy_n(x.data() + b * C * pixels, C * pixels, to);
    to = std::copy_n(mask.data(), pixels, to);
    to = std::copy_n(masked.data() + b * C * pixels, C * pixels, to);
  }
  return result;
}

}  // namespace calotype
