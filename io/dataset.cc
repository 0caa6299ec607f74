#include "io/dataset.h"

#include <algorithm>

#include "core/error.h"

namespace calotype {

Sample Dataset::sample(int64_t index, Random& random) const {
  return {image(index, random), caption(index)};
}

Tensor Dataset::images(std::span<const int64_t> indices, Random& random) const {
  Tensor batch({static_cast<int64_t>(indices.size()), channels(), side(), side()});
  float* to = batch.data();
  for (int64_t index : indices) {
    Tensor one = image(index, random);
    Check<InternalError>(one.shape() == Shape({channels(), side(), side()}),
                         "data set: picture {} has shape {}", index, one.shape().ToString());
    to = std::copy_n(one.data(), one.elements(), to);
  }
  return batch;
}

}  // namespace calotype
