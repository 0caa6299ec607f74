// Pictures of random bytes.
#pragma once

#include "core/random.h"
#include "io/image.h"

namespace calotype::test {

inline Image RandomImage(int width, int height, Random& random) {
  Image image{width, height, std::vector<uint8_t>(size_t{3} * width * height)};
  for (uint8_t& byte : image.rgb) byte = static_cast<uint8_t>(random.Next());
  return image;
}

}  // namespace calotype::test
