// The counter-based uniform numbers of the graph op PhiloxUniform and of attention dropout, as an
// inline function that kernels vectorize. Philox4x32-10 as in core/random.h; always inlined, so
// files compiled for several instruction sets may share it.
#pragma once

#include <stdint.h>

namespace calotype {

// Uniform in [0, 1): the upper 24 bits of the first word of Philox4x32-10 at counter
// (index, stream) with key `seed`.
[[gnu::always_inline]] inline float PhiloxUniformAt(uint64_t seed, uint64_t stream,
                                                    uint64_t index) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream), c3 = static_cast<uint32_t>(stream >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t{0xD2511F53} * c0;
    uint64_t p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return static_cast<float>(static_cast<int32_t>(c0 >> 8)) * 0x1p-24f;
}

}  // namespace calotype
