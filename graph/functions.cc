// Composites: functions of several ops.
#include "graph/functions.h"

#include "core/error.h"

namespace calotype {

Value ResizeNearest(Value x, int64_t height, int64_t width) {
  Check<ShapeError>(x.rank() == 4 && height > 0 && width > 0,
                    "ResizeNearest: {} to {} x {}, expects [B, C, H, W]", x.shape(), height, width);
  int64_t b = x.dim(0), c = x.dim(1), h = x.dim(2), w = x.dim(3);
  if (height == h && width == w) return x;
  if (height % h == 0 && width % w == 0) {
    Value y = Reshape(x, {b, c, h, 1, w, 1});
    y = Broadcast(y, {b, c, h, height / h, w, width / w});
    return Reshape(y, {b, c, height, width});
  }
  auto indices = [&](int64_t from, int64_t to) {
    std::vector<int64_t> index(to);
    for (int64_t i = 0; i < to; ++i) index[i] = i * from / to;
    return x.graph->Constant(Tensor::From({to}, index));
  };
  Value y = Gather(x, indices(h, height), 2);
  return Gather(y, indices(w, width), 3);
}

Value AvgPool2x2(Value x) {
  Check<ShapeError>(x.rank() == 4, "AvgPool2x2: {} is not [B, C, H, W]", x.shape());
  int64_t h = x.dim(2) / 2, w = x.dim(3) / 2;
  x = Slice(Slice(x, 2, 0, 2 * h), 3, 0, 2 * w);
  return Sum(Reshape(x, {x.dim(0), x.dim(1), h, 2, w, 2}), {3, 5}) * 0.25f;
}

Value MeanSquaredError(Value prediction, Value target) {
  Check<ShapeError>(prediction.shape() == target.shape(), "MeanSquaredError: {} against {}",
                    prediction.shape(), target.shape());
  return Mean(Square(prediction - target));
}

}  // namespace calotype
