#include "core/norm_kernels.h"
#include "core/simd.h"

namespace calotype::CALOTYPE_ISA {
namespace {

// Sums run over kSumVectors independent vectors, then a scalar tail.
constexpr int kSumVectors = 4;
constexpr int64_t kSumStep = int64_t{kSumVectors} * kLanes;

// sum of term(i, vector at i) over [0, n); `vector` and `scalar` give the terms of kLanes and of
// one.
template <class V, class S>
CALOTYPE_SIMD float Sum(int64_t n, V vector, S scalar) {
  Vec sum[kSumVectors] = {};
  int64_t i = 0;
  for (; i + kSumStep <= n; i += kSumStep) {
#pragma GCC unroll 4
    for (int v = 0; v < kSumVectors; ++v) sum[v] += vector(i + v * kLanes);
  }
  for (; i + kLanes <= n; i += kLanes) sum[0] += vector(i);
  float tail = 0;
  for (; i < n; ++i) tail += scalar(i);
  return SumLanes((sum[0] + sum[1]) + (sum[2] + sum[3])) + tail;
}

CALOTYPE_SIMD float SumOf(const float* x, int64_t n) {
  return Sum(
      n, [=](int64_t i) { return Load(x + i); }, [=](int64_t i) { return x[i]; });
}

// sum (x - mean)^2
CALOTYPE_SIMD float SumOfSquares(const float* x, float mean, int64_t n) {
  Vec m = Splat(mean);
  return Sum(
      n,
      [=](int64_t i) {
        Vec d = Load(x + i) - m;
        return d * d;
      },
      [=](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
}

// sum a (x - mean)
CALOTYPE_SIMD float SumOfProducts(const float* a, const float* x, float mean, int64_t n) {
  Vec m = Splat(mean);
  return Sum(
      n, [=](int64_t i) { return Load(a + i) * (Load(x + i) - m); },
      [=](int64_t i) { return a[i] * (x[i] - mean); });
}

CALOTYPE_SIMD float ReciprocalRoot(float sum_of_squares, int64_t n, double eps) {
  return static_cast<float>(1 / __builtin_sqrt(sum_of_squares / static_cast<double>(n) + eps));
}

void GroupForward(int64_t channels, int64_t positions, double eps, const float* x,
                  const float* gamma, const float* beta, float* y, float* mean, float* rstd) {
  int64_t n = channels * positions;
  float m = SumOf(x, n) / static_cast<float>(n);
  float r = ReciprocalRoot(SumOfSquares(x, m, n), n, eps);
  *mean = m;
  *rstd = r;
  for (int64_t c = 0; c < channels; ++c) {
    const float* in = x + c * positions;
    float* out = y + c * positions;
    float scale = gamma ? gamma[c] * r : r;
    float shift = beta ? beta[c] : 0.0f;
    for (int64_t i = 0; i < positions; ++i) out[i] = (in[i] - m) * scale + shift;
  }
}

void GroupBackward(int64_t channels, int64_t positions, const float* x, const float* gamma,
                   float mean, float rstd, const float* dy, float* dx, float* dgamma,
                   float* dbeta) {
  float sum_dy = 0, sum_dy_xhat = 0;  // of gamma dy and gamma dy xhat over the group
  for (int64_t c = 0; c < channels; ++c) {
    float s1 = SumOf(dy + c * positions, positions);
    float s2 = SumOfProducts(dy + c * positions, x + c * positions, mean, positions) * rstd;
    dbeta[c] = s1;
    dgamma[c] = s2;
    sum_dy += gamma ? gamma[c] * s1 : s1;
    sum_dy_xhat += gamma ? gamma[c] * s2 : s2;
  }
  float n = static_cast<float>(channels * positions);
  float c1 = sum_dy / n * rstd;
  float c2 = sum_dy_xhat / n * rstd * rstd;
  for (int64_t c = 0; c < channels; ++c) {
    const float* in = x + c * positions;
    const float* g = dy + c * positions;
    float* out = dx + c * positions;
    float scale = gamma ? gamma[c] * rstd : rstd;
    for (int64_t i = 0; i < positions; ++i) out[i] = g[i] * scale - c1 - (in[i] - mean) * c2;
  }
}

void LayerForward(int64_t rows, int64_t width, double eps, const float* x, const float* gamma,
                  const float* beta, float* y, float* mean, float* rstd) {
  for (int64_t row = 0; row < rows; ++row, x += width, y += width) {
    float m = SumOf(x, width) / static_cast<float>(width);
    float r = ReciprocalRoot(SumOfSquares(x, m, width), width, eps);
    mean[row] = m;
    rstd[row] = r;
    if (gamma) {
      for (int64_t i = 0; i < width; ++i) y[i] = (x[i] - m) * r * gamma[i] + beta[i];
    } else {
      for (int64_t i = 0; i < width; ++i) y[i] = (x[i] - m) * r;
    }
  }
}

void LayerBackward(int64_t rows, int64_t width, const float* x, const float* gamma,
                   const float* mean, const float* rstd, const float* dy, float* dx, float* dgamma,
                   float* dbeta) {
  for (int64_t row = 0; row < rows; ++row, x += width, dy += width, dx += width) {
    float m = mean[row], r = rstd[row];
    Vec vm = Splat(m);
    float s1, s2;  // sums of gamma dy and gamma dy (x - mean)
    if (gamma) {
      s1 = Sum(
          width, [=](int64_t i) { return Load(gamma + i) * Load(dy + i); },
          [=](int64_t i) { return gamma[i] * dy[i]; });
      s2 = Sum(
          width, [=](int64_t i) { return Load(gamma + i) * Load(dy + i) * (Load(x + i) - vm); },
          [=](int64_t i) { return gamma[i] * dy[i] * (x[i] - m); });
    } else {
      s1 = SumOf(dy, width);
      s2 = SumOfProducts(dy, x, m, width);
    }
    float n = static_cast<float>(width);
    float c1 = s1 / n * r;
    float c2 = s2 * r / n * r * r;
    if (gamma) {
      for (int64_t i = 0; i < width; ++i) dx[i] = dy[i] * gamma[i] * r - c1 - (x[i] - m) * c2;
    } else {
      for (int64_t i = 0; i < width; ++i) dx[i] = dy[i] * r - c1 - (x[i] - m) * c2;
    }
    if (dgamma) {
      for (int64_t i = 0; i < width; ++i) {
        dgamma[i] += dy[i] * ((x[i] - m) * r);
        dbeta[i] += dy[i];
      }
    }
  }
}

constexpr float kLog2E = 1.44269504f;

void SoftmaxForward(int64_t rows, int64_t width, const float* x, float* y) {
  for (int64_t row = 0; row < rows; ++row, x += width, y += width) {
    Vec top = Splat(-__builtin_inff());
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) top = Max(top, Load(x + i));
    float max = -__builtin_inff();
    for (int lane = 0; lane < kLanes; ++lane) max = top[lane] > max ? top[lane] : max;
    for (; i < width; ++i) max = x[i] > max ? x[i] : max;
    Vec m = Splat(max), scale = Splat(kLog2E), sums = {};
    for (i = 0; i + kLanes <= width; i += kLanes) {
      Vec e = Exp2((Load(x + i) - m) * scale);
      Store(y + i, e);
      sums += e;
    }
    if (i < width) {
      float tail[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        tail[lane] = i + lane < width ? x[i + lane] : -__builtin_inff();
      }
      Store(tail, Exp2((Load(tail) - m) * scale));
      for (int lane = 0; i + lane < width; ++lane) y[i + lane] = tail[lane];
      sums += Load(tail);
    }
    float inverse = 1 / SumLanes(sums);
    for (i = 0; i < width; ++i) y[i] *= inverse;
  }
}

}  // namespace

extern const NormKernels kNormKernels = {GroupForward, GroupBackward, LayerForward, LayerBackward,
                                         SoftmaxForward};

}  // namespace calotype::CALOTYPE_ISA
