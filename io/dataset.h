// Captioned pictures for training: the interface that the trainer draws from.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "core/random.h"
#include "core/tensor.h"

namespace calotype {

// Called with a text for the user, e.g. about a picture that is skipped.
using WarningCallback = std::function<void(const std::string&)>;

struct Sample {
  Tensor image;  // [3, side, side] in [-1, 1]
  std::string caption;
};

class Dataset {
 public:
  virtual ~Dataset() = default;

  virtual int64_t size() const = 0;  // number of captions, at least 1
  virtual int side() const = 0;      // width and height of the pictures
  // Errors (all below): ValueError unless 0 <= index < size().
  virtual std::string caption(int64_t index) const = 0;
  // The picture [3, side, side] in [-1, 1]. A set that varies its pictures draws from `random`,
  // always the same count of numbers, so that the position of the stream depends on the number of
  // calls alone.
  virtual Tensor image(int64_t index, Random& random) const = 0;

  Sample sample(int64_t index, Random& random) const;
  // The pictures of several captions in order, [indices, 3, side, side].
  Tensor images(std::span<const int64_t> indices, Random& random) const;
};

}  // namespace calotype
