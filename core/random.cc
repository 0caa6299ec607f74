#include "core/random.h"

#include <cmath>
#include <numbers>

namespace calotype {

std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t{0xD2511F53} * c[0];
    uint64_t p1 = uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0)};
    k[0] += 0x9E3779B9;
    k[1] += 0xBB67AE85;
  }
  return c;
}

uint64_t StreamOf(std::string_view name) {
  uint64_t hash = 0xcbf29ce484222325;
  for (unsigned char byte : name) hash = (hash ^ byte) * 0x100000001b3;
  return hash;
}

uint32_t Random::Next() {
  uint64_t index = position_ / 4;
  if (index != block_index_) {
    block_ = Philox4x32({static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                         static_cast<uint32_t>(stream_), static_cast<uint32_t>(stream_ >> 32)},
                        {static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32)});
    block_index_ = index;
  }
  return block_[position_++ % 4];
}

float Random::Uniform() { return static_cast<float>(Next() >> 8) * 0x1p-24f; }

float Random::Normal() {
  // One normal per pair of uniforms: no cached half, so the position alone is the state.
  double u1 = (static_cast<double>(Next()) + 0.5) * 0x1p-32;
  double u2 = (static_cast<double>(Next()) + 0.5) * 0x1p-32;
  return static_cast<float>(std::sqrt(-2.0 * std::log(u1)) * std::cos(2.0 * std::numbers::pi * u2));
}

int64_t Random::Integer(int64_t n) {
  Check(n > 0, "random integer: the range [0, {}) is empty", n);
  uint64_t range = static_cast<uint64_t>(n);
  uint64_t limit = ~uint64_t{0} - ~uint64_t{0} % range;
  for (;;) {
    uint64_t bits = (uint64_t{Next()} << 32) | Next();
    if (bits < limit) return static_cast<int64_t>(bits % range);
  }
}

Tensor Random::UniformTensor(const Shape& shape, float low, float high) {
  Tensor result(shape);
  for (float& x : result.values()) x = low + (high - low) * Uniform();
  return result;
}

Tensor Random::NormalTensor(const Shape& shape) {
  Tensor result(shape);
  for (float& x : result.values()) x = Normal();
  return result;
}

}  // namespace calotype
