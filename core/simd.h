// One vector of floats as wide as the registers of the instruction-set level that the including
// file is compiled for. Only for *_isa.cc files: everything lies in an unnamed namespace inside the
// level's own and is always inlined, so no copy for one level can be linked into another.
#pragma once

#include <stdint.h>

#if defined(__SSE4_1__)
#include <immintrin.h>
#endif

#define CALOTYPE_SIMD [[gnu::always_inline]] inline

namespace calotype::CALOTYPE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef float VecUnaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

CALOTYPE_SIMD Vec Load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
CALOTYPE_SIMD void Store(float* p, Vec x) { *reinterpret_cast<VecUnaligned*>(p) = x; }

// (GCC 12 warns about the undefined operand inside the plain AVX-512 intrinsics; maskz has none.)
#if defined(__AVX512F__)
CALOTYPE_SIMD Vec Splat(float x) { return _mm512_set1_ps(x); }
CALOTYPE_SIMD Vec Fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
CALOTYPE_SIMD Vec Max(Vec a, Vec b) { return _mm512_maskz_max_ps(0xffff, a, b); }
CALOTYPE_SIMD Vec Round(Vec a) { return _mm512_maskz_roundscale_ps(0xffff, a, 8); }
#elif defined(__AVX2__)
CALOTYPE_SIMD Vec Splat(float x) { return _mm256_set1_ps(x); }
CALOTYPE_SIMD Vec Fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
CALOTYPE_SIMD Vec Max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
CALOTYPE_SIMD Vec Round(Vec a) { return _mm256_round_ps(a, 8); }
#elif defined(__SSE4_1__)
CALOTYPE_SIMD Vec Splat(float x) { return _mm_set1_ps(x); }
CALOTYPE_SIMD Vec Fma(Vec a, Vec b, Vec c) { return a * b + c; }
CALOTYPE_SIMD Vec Max(Vec a, Vec b) { return _mm_max_ps(a, b); }
CALOTYPE_SIMD Vec Round(Vec a) { return _mm_round_ps(a, 8); }
#else
CALOTYPE_SIMD Vec Splat(float x) { return Vec{x, x, x, x}; }
CALOTYPE_SIMD Vec Fma(Vec a, Vec b, Vec c) { return a * b + c; }
CALOTYPE_SIMD Vec Max(Vec a, Vec b) { return a > b ? a : b; }
CALOTYPE_SIMD Vec Round(Vec a) {
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_rintf(a[i]);
  return a;
}
#endif

// 2^t for t <= 0, relative error 1.3e-7; 0 for t below -126 (also -inf), NaN stays NaN.
CALOTYPE_SIMD Vec Exp2(Vec t) {
  Vec low = Splat(-126.0f);
  VecInt vanishes = t < low;
  t = vanishes ? low : t;
  Vec n = Round(t);
  Vec f = t - n;
  // Minimax polynomial of 2^f on [-1/2, 1/2].
  Vec p = Splat(0.0013276472f);
  p = Fma(p, f, Splat(0.0096755413f));
  p = Fma(p, f, Splat(0.055507133f));
  p = Fma(p, f, Splat(0.2402212f));
  p = Fma(p, f, Splat(0.69314697f));
  p = Fma(p, f, Splat(1.0f));
#if defined(__AVX512F__)
  p = _mm512_maskz_scalef_ps(0xffff, p, n);
#else
  p = (Vec)((VecInt)p + (__builtin_convertvector(n, VecInt) << 23));
#endif
  return vanishes ? Vec{} : p;
}

// The sum of the lanes, pairwise: the same order at every call.
CALOTYPE_SIMD float SumLanes(Vec x) {
  float part[kLanes];
  Store(part, x);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

}  // namespace
}  // namespace calotype::CALOTYPE_ISA
