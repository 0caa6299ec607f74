// The kernels behind core/norm.h, one table for each instruction-set level (norm_isa.cc). Each
// handles a range of groups or rows on one thread.
#pragma once

#include <stdint.h>

#include "core/isa.h"

namespace calotype {

struct NormKernels {
  // `channels` rows of `positions` elements: writes mean and rstd, then y.
  void (*group_forward)(int64_t channels, int64_t positions, double eps, const float* x,
                        const float* gamma, const float* beta, float* y, float* mean, float* rstd);
  // dgamma and dbeta: the sums over the positions of each channel of this one group.
  void (*group_backward)(int64_t channels, int64_t positions, const float* x, const float* gamma,
                         float mean, float rstd, const float* dy, float* dx, float* dgamma,
                         float* dbeta);
  void (*layer_forward)(int64_t rows, int64_t width, double eps, const float* x, const float* gamma,
                        const float* beta, float* y, float* mean, float* rstd);
  // Adds the sums over these rows to dgamma and dbeta (null together).
  void (*layer_backward)(int64_t rows, int64_t width, const float* x, const float* gamma,
                         const float* mean, const float* rstd, const float* dy, float* dx,
                         float* dgamma, float* dbeta);
  void (*softmax_forward)(int64_t rows, int64_t width, const float* x, float* y);
};

CALOTYPE_DECLARE_ISA(extern const NormKernels kNormKernels)

}  // namespace calotype
