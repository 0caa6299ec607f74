#include "core/fma_peak_kernels.h"
#include "core/simd.h"

namespace calotype::CALOTYPE_ISA {
namespace {

// Enough independent sums to hide the latency of two units (4 + 4 cycles where multiplying and
// adding are two instructions), few enough for 16 registers with the two factors.
constexpr int kSums = 12;
constexpr int kUnroll = 4;

float Run(int64_t rounds) {
  Vec factor = Splat(0.999f), term = Splat(0.001f), sum[kSums];
  for (int i = 0; i < kSums; ++i) sum[i] = Splat(static_cast<float>(i));
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 12
      for (int i = 0; i < kSums; ++i) sum[i] = Fma(sum[i], factor, term);
    }
  }
  Vec total = sum[0];
  for (int i = 1; i < kSums; ++i) total += sum[i];
  return SumLanes(total);
}

}  // namespace

extern const FmaLoop kFmaLoop = {kLanes,
#if defined(__AVX2__)
                                 true,
#else
                                 false,
#endif
                                 2.0 * kSums* kUnroll* kLanes, Run};

}  // namespace calotype::CALOTYPE_ISA
