// Normalisations on raw memory: group norm and layer norm with their gradients, softmax. Dense f32
// arrays, several threads, kernels compiled for each instruction-set level. The order of every sum
// depends on the shape alone, so results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace calotype {

// x [batch, channels, positions]; group g holds channels [g, g + 1) * channels / groups, which
// `groups` must divide.
struct GroupNormShape {
  int64_t batch = 0, channels = 0, positions = 0, groups = 1;
};

// Over the channels of a group and all positions: mean, rstd = 1 / sqrt(variance + eps) with the
// biased, centred variance, both [batch, groups]; y = (x - mean) * rstd * gamma + beta. gamma and
// beta [channels] may be null (1 and 0).
void GroupNormForward(const GroupNormShape& shape, double eps, const float* x, const float* gamma,
                      const float* beta, float* y, float* mean, float* rstd);

// With xhat = (x - mean) * rstd and the mean M over a group:
//   dx = rstd * (gamma dy - M(gamma dy) - xhat M(gamma dy xhat))
//   dgamma = sum dy xhat, dbeta = sum dy
// gamma may be null (1); dgamma and dbeta are null together or [channels].
void GroupNormBackward(const GroupNormShape& shape, const float* x, const float* gamma,
                       const float* mean, const float* rstd, const float* dy, float* dx,
                       float* dgamma, float* dbeta);

// The same over the last axis of x [rows, width]: mean and rstd [rows], gamma and beta [width].
void LayerNormForward(int64_t rows, int64_t width, double eps, const float* x, const float* gamma,
                      const float* beta, float* y, float* mean, float* rstd);
void LayerNormBackward(int64_t rows, int64_t width, const float* x, const float* gamma,
                       const float* mean, const float* rstd, const float* dy, float* dx,
                       float* dgamma, float* dbeta);

// y = exp(x - max x) / sum exp(x - max x) along each row of [rows, width]. A row of -inf gives NaN,
// as in PyTorch.
void SoftmaxForward(int64_t rows, int64_t width, const float* x, float* y);

}  // namespace calotype
