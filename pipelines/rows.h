// The first axis of tensors: rows [N, ...] put one behind the other, cut out, or taken alone. They
// copy; any dtype goes.
#pragma once

#include <span>

#include "core/tensor.h"

namespace calotype {

// [N1, ...], [N2, ...], ... as [N1 + N2 + ..., ...].
// Errors: ShapeError without a part, or if the parts differ in dtype or in another axis.
Tensor StackRows(std::span<const Tensor> parts);

// The rows begin..end - 1 of x [N, ...] as [end - begin, ...].
// Errors: ShapeError unless 0 <= begin <= end <= N.
Tensor Rows(const Tensor& x, int64_t begin, int64_t end);

// Row i of x [N, ...] as [...]. Errors: like Rows.
Tensor Row(const Tensor& x, int64_t i);

}  // namespace calotype
