// Strided views: where the elements of a graph value lie in a buffer. An axis is a list of pieces
// (extent, stride), outermost first, so that an axis that is physically split (a channel axis that
// is merged with rows, heads next to head dimensions) is still a view and not a copy.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace calotype::jit {

struct Piece {
  int64_t extent = 1, stride = 0;
  bool operator==(const Piece&) const = default;
};
using Axis = std::vector<Piece>;  // no piece of extent 1; empty for an axis of size 1

struct View {
  int buffer = -1;
  DType dtype = DType::kF32;
  int64_t offset = 0;  // elements
  std::vector<Axis> axes;

  int64_t size(int axis) const;
  int64_t elements() const;
  bool operator==(const View&) const = default;
  std::string ToString() const;
};

// The row-major view of a whole buffer.
View RowMajor(int buffer, DType dtype, const Shape& shape);
// The dense view whose physical order of axes is `order`, outermost first.
View DenseInOrder(int buffer, DType dtype, const Shape& shape, std::span<const int> order);
// A dense view with the same order of pieces by stride, without gaps.
View Compact(const View& view);

// The index maps of the view ops. Empty if the result is not a strided view of the same buffer.
std::optional<View> ReshapeView(const View& view, const Shape& shape);
std::optional<View> SliceView(const View& view, int axis, int64_t start, int64_t size);
View PermuteView(const View& view, std::span<const int64_t> axes);
View InversePermuteView(const View& view, std::span<const int64_t> axes);
View BroadcastView(const View& view, const Shape& shape);  // NumPy's rule
// View of i32 or i64 data as f32 words with the same bits, for copies (i64: one more axis of size
// 2).
View BitsView(const View& view);

// Joins neighbouring pieces that are contiguous in each other and drops pieces of extent 1.
Axis Simplify(Axis axis);
// True if the view is row-major and dense.
bool IsRowMajor(const View& view);

}  // namespace calotype::jit
