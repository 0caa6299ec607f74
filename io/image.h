// Pictures in memory: 8-bit RGB, and the tensors that models see.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/tensor.h"

namespace calotype {

// Rows from the top, pixels from the left, three bytes R G B a pixel.
struct Image {
  int width = 0, height = 0;
  std::vector<uint8_t> rgb;
  bool operator==(const Image&) const = default;
};

// Errors: ValueError unless both sides are positive and rgb has 3 width height bytes.
void CheckImage(const Image& image, const char* what);

// [3, height, width] in [-1, 1]: value / 127.5 - 1. Errors (of all below): as CheckImage.
Tensor ImageToTensor(const Image& image);

// The reverse for x [3, H, W] or [1, 3, H, W] f32: round((x / 2 + 0.5) * 255), to even on ties,
// clamped to [0, 255]. Errors: ShapeError; NumericError if a value is NaN.
Image TensorToImage(const Tensor& x);

// The pictures of a batch x [B, 3, H, W].
std::vector<Image> TensorToImages(const Tensor& x);

// The pictures, all of one size, row by row in `columns` columns (the last row may be short), with
// `padding` white pixels around and between. Errors: ValueError if there is none or sizes differ.
Image ImageGrid(std::span<const Image> images, int columns, int padding = 2);

// Resampled to width x height with the triangle filter of support max(1, scale) on each axis,
// weights normalised at the borders: what torchvision and Pillow call bilinear with antialias.
// Computed in f32 and rounded once.
Image Resize(const Image& image, int width, int height);

// The picture with its short side resized to `size` (torchvision's Resize(size)).
Image ResizeShortSide(const Image& image, int size);

// The part of `width` x `height` whose upper left corner is at (left, top). Errors: ValueError if
// it does not lie within the picture.
Image Crop(const Image& image, int left, int top, int width, int height);

// A square picture: the short side resized to `size`, then the centre cut out (torchvision's
// Resize(size) and CenterCrop(size)).
Image ResizeAndCrop(const Image& image, int size);

// Left and right exchanged.
Image FlipHorizontally(const Image& image);

}  // namespace calotype
