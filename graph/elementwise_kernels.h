// Eager kernels of the elementwise ops, one table per instruction set (elementwise_isa.cc).
#pragma once

#include <cstdint>

namespace calotype {

// out[i] = f(x[i], y[i], z[i]) for i < n; operand k is a scalar (x[0]) if bit k of `scalars` is
// set.
using ElementwiseKernel = void (*)(int64_t n, const float* x, const float* y, const float* z,
                                   int scalars, float* out);

// The kernel of ops.def's entry number `entry` (elementwise entries counted from 0) for output 0,
// or of its partial derivative to operand `part - 1` for part >= 1.
ElementwiseKernel FindElementwiseKernel(int entry, int part);

}  // namespace calotype
