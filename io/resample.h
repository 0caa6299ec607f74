// Pictures as Pillow resamples and converts them, to the byte: what diffusers does to a picture
// before the autoencoder sees it.
#pragma once

#include <cstdint>
#include <vector>

#include "io/image.h"

namespace calotype {

// Image.resize((width, height), LANCZOS): the windowed sinc of three lobes, widened when shrinking;
// along x, then along y, in fixed point and rounded to bytes after each. As from Pillow 13 on,
// along y first if the height shrinks, by more than twice what the width does. The same picture if
// the size is. Errors: ValueError unless 1 <= width, height <= 16384.
Image ResizeLanczos(const Image& image, int width, int height);

// Image.convert("L"): (19595 R + 38470 G + 7471 B) / 65536, rounded; width * height values.
std::vector<uint8_t> Luminance(const Image& image);

}  // namespace calotype
