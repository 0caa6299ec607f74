// Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
// easy as 1, 2, 3"). A number is a pure function of (seed, stream, index), so it does not depend on
// the order of calls, on threads or on the machine.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "core/tensor.h"

namespace calotype {

// The four 32-bit outputs of Philox4x32-10 for a 128-bit counter and a 64-bit key.
std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

// FNV-1a 64: a stable stream number for a name such as a parameter path.
uint64_t StreamOf(std::string_view name);

class Random {
 public:
  // Streams with different (seed, stream) are independent.
  explicit Random(uint64_t seed, uint64_t stream = 0) : seed_(seed), stream_(stream) {}
  Random(uint64_t seed, std::string_view stream) : Random(seed, StreamOf(stream)) {}

  uint32_t Next();             // the next 32 random bits
  float Uniform();             // in [0, 1), 24 bits
  float Normal();              // mean 0, variance 1 (Box-Muller)
  int64_t Integer(int64_t n);  // in [0, n), unbiased. Errors: ValueError unless n > 0.

  Tensor UniformTensor(const Shape& shape, float low = 0, float high = 1);  // f32, [low, high]
  Tensor NormalTensor(const Shape& shape);  // f32, mean 0, variance 1

  // The position in the stream; setting it continues exactly there (for resume).
  uint64_t position() const { return position_; }
  void set_position(uint64_t position) { position_ = position; }

 private:
  uint64_t seed_, stream_;
  uint64_t position_ = 0;  // count of 32-bit numbers drawn
  std::array<uint32_t, 4> block_{};
  uint64_t block_index_ = ~uint64_t{0};
};

}  // namespace calotype
