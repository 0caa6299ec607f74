#include "pipelines/rows.h"

#include <cstring>

namespace calotype {

Tensor StackRows(std::span<const Tensor> parts) {
  Check<ShapeError>(!parts.empty(), "stack: there is nothing to stack");
  int64_t rows = 0;
  for (const Tensor& part : parts) {
    Check<ShapeError>(part.defined() && part.shape().rank() >= 1, "stack: a part has no rows");
    rows += part.shape()[0];
    Check<ShapeError>(
        part.dtype() == parts[0].dtype() && part.shape().With(0, 1) == parts[0].shape().With(0, 1),
        "stack: the rows of {} differ from those of {}", part.type(), parts[0].type());
  }
  Tensor all(parts[0].shape().With(0, rows), parts[0].dtype());
  char* to = static_cast<char*>(all.raw());
  for (const Tensor& part : parts) {
    std::memcpy(to, part.raw(), static_cast<size_t>(part.bytes()));
    to += part.bytes();
  }
  return all;
}

Tensor Rows(const Tensor& x, int64_t begin, int64_t end) {
  Check<ShapeError>(x.defined() && x.shape().rank() >= 1, "rows: the tensor has no rows");
  Check<ShapeError>(0 <= begin && begin <= end && end <= x.shape()[0],
                    "rows: {} to {} are not in {}", begin, end, x.type());
  Tensor rows(x.shape().With(0, end - begin), x.dtype());
  const int64_t each = x.shape()[0] == 0 ? 0 : x.bytes() / x.shape()[0];
  std::memcpy(rows.raw(), static_cast<const char*>(x.raw()) + begin * each,
              static_cast<size_t>(rows.bytes()));
  return rows;
}

Tensor Row(const Tensor& x, int64_t i) {
  std::vector<int64_t> dims;
  for (int axis = 1; axis < x.shape().rank(); ++axis) dims.push_back(x.shape()[axis]);
  return Rows(x, i, i + 1).Reshape(Shape(dims));
}

}  // namespace calotype
