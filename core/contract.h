// Contractions and fused kernels on raw memory: matrix product and convolution with their
// gradients. contract.cc implements them on oneDNN v3 (the only file that names it);
// contract_reference.h holds the plain loops that define them, for float and double. A null bias
// counts as 0. Errors of all: OutOfMemoryError; of convolutions ShapeError for a stride, padding or
// kernel out of range.
#pragma once

#include <cstdint>

namespace calotype {

// C[b][m][n] = sum_k A[b][m][k] B[b][k][n] (+ bias[n]) for b in [0, batch). Element (b, m, k) of A
// is at a[b * a_batch + m * a_row + k * a_col], one of a_row and a_col is 1; likewise B (k, n) with
// b_row, b_col; C is dense [batch, m, n]. A batch stride of 0 broadcasts the operand.
struct MatMulShape {
  int64_t batch = 1, m = 0, n = 0, k = 0;
  int64_t a_batch = 0, a_row = 0, a_col = 1;
  int64_t b_batch = 0, b_row = 0, b_col = 1;
  bool operator==(const MatMulShape&) const = default;
};
void MatMul(const MatMulShape& shape, const float* a, const float* b, const float* bias, float* c);

// Cross-correlation, all tensors dense: x [batch, in, height, width], w [out, in, kernel_h,
// kernel_w], y [batch, out, out_height(), out_width()].
struct Conv2dShape {
  int64_t batch = 0, in = 0, height = 0, width = 0, out = 0, kernel_h = 0, kernel_w = 0;
  int64_t stride = 1, top = 0, bottom = 0, left = 0, right = 0;
  int64_t out_height() const { return (height + top + bottom - kernel_h) / stride + 1; }
  int64_t out_width() const { return (width + left + right - kernel_w) / stride + 1; }
  bool operator==(const Conv2dShape&) const = default;
};
void Conv2dForward(const Conv2dShape& shape, const float* x, const float* w, const float* bias,
                   float* y);
void Conv2dBackwardInput(const Conv2dShape& shape, const float* dy, const float* w, float* dx);
void Conv2dBackwardWeight(const Conv2dShape& shape, const float* x, const float* dy, float* dw);

}  // namespace calotype
