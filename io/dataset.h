// Captioned pictures for training: the interface that the trainer draws from.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "core/random.h"
#include "core/tensor.h"

namespace calotype {

// Called with a text for the user, e.g. about a picture that is skipped.
using WarningCallback = std::function<void(const std::string&)>;

struct Sample {
  Tensor image;  // [channels, side, side] in [-1, 1]
  std::string caption;
};

class Dataset {
 public:
  virtual ~Dataset() = default;

  virtual int64_t size() const = 0;  // number of pictures, at least 1
  virtual int side() const = 0;      // their width and height
  virtual int channels() const { return 3; }
  // Errors (all below): ValueError unless 0 <= index < size().
  virtual std::string caption(int64_t index) const = 0;
  // All captions of the picture, at least one; caption() is the first.
  virtual std::vector<std::string> captions(int64_t index) const { return {caption(index)}; }
  // The picture [channels, side, side] in [-1, 1], or a latent. A set that varies its pictures
  // draws from `random`, always the same count of numbers, so that the position of the stream
  // depends on the number of calls alone.
  virtual Tensor image(int64_t index, Random& random) const = 0;

  // What one draw for training gives.
  struct Drawn {
    Tensor image;
    int64_t caption = -1;  // which of captions(index) it shows; -1: any
    Tensor mask = {};      // with masked(): where the loss counts, f32 [1, side, side] of 0 and 1
  };
  // image(index), or a variation of it that image does not make. Errors: as image.
  virtual Drawn draw(int64_t index, Random& random) const { return {image(index, random)}; }
  virtual bool masked() const { return false; }

  // True if a draw of the picture is not the same each time.
  virtual bool varies(int64_t) const { return true; }

  Sample sample(int64_t index, Random& random) const;
  // Several pictures in order, [indices, channels, side, side].
  virtual Tensor images(std::span<const int64_t> indices, Random& random) const;
};

}  // namespace calotype
