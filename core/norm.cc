#include "core/norm.h"

#include <algorithm>
#include <cstring>

#include "core/norm_kernels.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace calotype {

namespace {

// Elements of one chunk of work: a few microseconds, and small enough to stay in the L1 or L2
// cache.
constexpr int64_t kChunkElements = 16384;

int64_t Grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, kChunkElements / std::max<int64_t>(1, elements_per_item));
}

const NormKernels& Kernels() { return CALOTYPE_SELECT_ISA(kNormKernels); }

// out[i] = parts[0][i] + parts[1][i] + ..., in this order.
void SumParts(const float* parts, int64_t count, int64_t n, float* out) {
  ParallelFor(n, Grain(count), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = 0;
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t i = begin; i < end; ++i) out[i] += parts[p * n + i];
    }
  });
}

}  // namespace

void GroupNormForward(const GroupNormShape& s, double eps, const float* x, const float* gamma,
                      const float* beta, float* y, float* mean, float* rstd) {
  const NormKernels& kernels = Kernels();
  int64_t channels = s.channels / s.groups, size = channels * s.positions;
  ParallelFor(s.batch * s.groups, Grain(size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t c = i % s.groups * channels;
      kernels.group_forward(channels, s.positions, eps, x + i * size, gamma ? gamma + c : nullptr,
                            beta ? beta + c : nullptr, y + i * size, mean + i, rstd + i);
    }
  });
}

void GroupNormBackward(const GroupNormShape& s, const float* x, const float* gamma,
                       const float* mean, const float* rstd, const float* dy, float* dx,
                       float* dgamma, float* dbeta) {
  const NormKernels& kernels = Kernels();
  int64_t channels = s.channels / s.groups, size = channels * s.positions;
  ScratchLayout layout(
      ThreadScratch(2 * (s.batch * s.channels + 16) * static_cast<int64_t>(sizeof(float))));
  float* dgamma_parts = layout.Take<float>(s.batch * s.channels);
  float* dbeta_parts = layout.Take<float>(s.batch * s.channels);
  ParallelFor(s.batch * s.groups, Grain(size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels.group_backward(channels, s.positions, x + i * size,
                             gamma ? gamma + i % s.groups * channels : nullptr, mean[i], rstd[i],
                             dy + i * size, dx + i * size, dgamma_parts + i * channels,
                             dbeta_parts + i * channels);
    }
  });
  if (dgamma) {
    SumParts(dgamma_parts, s.batch, s.channels, dgamma);
    SumParts(dbeta_parts, s.batch, s.channels, dbeta);
  }
}

void LayerNormForward(int64_t rows, int64_t width, double eps, const float* x, const float* gamma,
                      const float* beta, float* y, float* mean, float* rstd) {
  const NormKernels& kernels = Kernels();
  ParallelFor(rows, Grain(width), [&](int64_t begin, int64_t end) {
    kernels.layer_forward(end - begin, width, eps, x + begin * width, gamma, beta,
                          y + begin * width, mean + begin, rstd + begin);
  });
}

void LayerNormBackward(int64_t rows, int64_t width, const float* x, const float* gamma,
                       const float* mean, const float* rstd, const float* dy, float* dx,
                       float* dgamma, float* dbeta) {
  const NormKernels& kernels = Kernels();
  // At least 32 rows in a part, so that the parts are small beside x.
  int64_t grain = std::max<int64_t>(32, Grain(width)), parts = (rows + grain - 1) / grain;
  float *dgamma_parts = nullptr, *dbeta_parts = nullptr;
  if (dgamma) {
    ScratchLayout layout(
        ThreadScratch(2 * (parts * width + 16) * static_cast<int64_t>(sizeof(float))));
    dgamma_parts = layout.Take<float>(parts * width);
    dbeta_parts = layout.Take<float>(parts * width);
  }
  ParallelFor(rows, grain, [&](int64_t begin, int64_t end) {
    int64_t part = begin / grain * width;
    if (dgamma) {
      std::memset(dgamma_parts + part, 0, width * sizeof(float));
      std::memset(dbeta_parts + part, 0, width * sizeof(float));
    }
    kernels.layer_backward(end - begin, width, x + begin * width, gamma, mean + begin, rstd + begin,
                           dy + begin * width, dx + begin * width,
                           dgamma ? dgamma_parts + part : nullptr,
                           dgamma ? dbeta_parts + part : nullptr);
  });
  if (dgamma) {
    SumParts(dgamma_parts, parts, width, dgamma);
    SumParts(dbeta_parts, parts, width, dbeta);
  }
}

void SoftmaxForward(int64_t rows, int64_t width, const float* x, float* y) {
  const NormKernels& kernels = Kernels();
  ParallelFor(rows, Grain(width), [&](int64_t begin, int64_t end) {
    kernels.softmax_forward(end - begin, width, x + begin * width, y + begin * width);
  });
}

}  // namespace calotype
