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
CALOTYPE_SIMD Vec Max(Vec a, Vec b) { return a > b ? a : b; }  // b if one is NaN
CALOTYPE_SIMD Vec Round(Vec a) {
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_rintf(a[i]);
  return a;
}
#endif

// 2^t for t <= 0, relative error 1.3e-7; 0 for t below -126 (also -inf; AVX-512 goes through the
// denormals), NaN stays NaN.
CALOTYPE_SIMD Vec Exp2(Vec t) {
  Vec low = Splat(-200.0f);
  Vec bounded = Max(low, t);  // t if that is NaN
  Vec n = Round(bounded);
  Vec f = bounded - n;
  // Minimax polynomial of 2^f on [-1/2, 1/2].
  Vec p = Splat(0.0013276472f);
  p = Fma(p, f, Splat(0.0096755413f));
  p = Fma(p, f, Splat(0.055507133f));
  p = Fma(p, f, Splat(0.2402212f));
  p = Fma(p, f, Splat(0.69314697f));
  p = Fma(p, f, Splat(1.0f));
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(0xffff, p, n);
#else
  VecInt vanishes = t < Splat(-126.0f);
  p = (Vec)((VecInt)p + (__builtin_convertvector(n, VecInt) << 23));
  return (Vec)(~vanishes & (VecInt)p);
#endif
}

// The sum of the lanes, by halves: the same order at every call.
CALOTYPE_SIMD float SumLanes(Vec x) {
#if defined(__SSE4_1__)
#if defined(__AVX512F__)
  __m256d upper = _mm512_maskz_extractf64x4_pd(0xf, _mm512_castps_pd(x), 1);
  __m256d lower = _mm512_maskz_extractf64x4_pd(0xf, _mm512_castps_pd(x), 0);
  __m256 eight = _mm256_castpd_ps(lower) + _mm256_castpd_ps(upper);
#elif defined(__AVX2__)
  __m256 eight = x;
#endif
#if defined(__AVX2__)
  __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
#else
  __m128 four = x;
#endif
  four += _mm_movehl_ps(four, four);
  return four[0] + four[1];
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

}  // namespace
}  // namespace calotype::CALOTYPE_ISA
