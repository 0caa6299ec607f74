// Image to image and inpainting: the picture that sampling starts from instead of noise alone, and
// the mask of what is drawn anew. Pictures are prepared as diffusers' image processor does: resized
// by Lanczos' filter, masks then turned gray and cut at 128, and taken at every factor-th pixel.
#pragma once

#include <cstdint>
#include <optional>

#include "core/tensor.h"
#include "io/image.h"

namespace calotype {

struct InitImage {
  Tensor picture;  // [1, 3, H, W] in [-1, 1]
  // With a mask: the picture with 0 (gray) where it is drawn anew; and the mask at the size of the
  // sample [1, 1, H / factor, W / factor], 1 where it is drawn anew and 0 where it stays.
  Tensor masked_picture, mask;
};

// The pictures resized to width x height, multiples of `factor`.
InitImage PrepareInitImage(const Image& image, const std::optional<Image>& mask, int64_t width,
                           int64_t height, int64_t factor);

// The first step of an image to image walk over N steps: N - min(floor(N strength), N).
int64_t FirstStep(int64_t steps, double strength);

// mask x + (1 - mask) kept for x, kept [B, C, h, w], mask [1, 1, h, w].
Tensor BlendByMask(const Tensor& mask, const Tensor& x, const Tensor& kept);

// The U-Net's input [B, 2 C + 1, h, w]: sample x [B, C, h, w], mask [1, 1, h, w], and the sample of
// the masked picture [B, C, h, w].
Tensor JoinMask(const Tensor& x, const Tensor& mask, const Tensor& masked);

}  // namespace calotype
