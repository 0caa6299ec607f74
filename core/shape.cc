#include "core/shape.h"

#include <algorithm>

#include "core/error.h"

namespace calotype {

namespace {
constexpr int64_t kMaxElements = int64_t{1} << 48;
}

int64_t CheckedMul(int64_t a, int64_t b, const char* what) {
  int64_t product = 0;
  Check<ShapeError>(a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, &product),
                    "{}: {} * {} is negative or overflows 64 bits", what, a, b);
  return product;
}

int64_t CheckedAdd(int64_t a, int64_t b, const char* what) {
  int64_t sum = 0;
  Check<ShapeError>(a >= 0 && b >= 0 && !__builtin_add_overflow(a, b, &sum),
                    "{}: {} + {} is negative or overflows 64 bits", what, a, b);
  return sum;
}

Shape::Shape(std::span<const int64_t> dims) {
  Check<ShapeError>(dims.size() <= kMaxRank, "shape: rank {} is over the limit of {}", dims.size(),
                    kMaxRank);
  rank_ = static_cast<int>(dims.size());
  std::copy(dims.begin(), dims.end(), dims_.begin());
  // Checked over the non-zero sizes, so that a zero cannot hide an overflow elsewhere.
  int64_t product = 1;
  for (int64_t size : dims) {
    Check<ShapeError>(size >= 0, "shape: negative size in {}", ToString());
    if (size > 0) product = CheckedMul(product, size, "shape");
    Check<ShapeError>(product <= kMaxElements, "shape: {} has more than 2^48 elements", ToString());
  }
}

int Shape::Axis(int axis) const {
  int index = axis < 0 ? axis + rank_ : axis;
  Check<ShapeError>(index >= 0 && index < rank_, "shape: axis {} is out of range for {}", axis,
                    ToString());
  return index;
}

int64_t Shape::elements() const {
  int64_t product = 1;
  for (int64_t size : *this) product *= size;
  return product;
}

Shape Shape::With(int axis, int64_t size) const {
  std::vector<int64_t> dims = ToVector();
  dims[Axis(axis)] = size;
  return Shape(dims);
}

bool Shape::operator==(const Shape& other) const {
  return rank_ == other.rank_ && std::equal(begin(), end(), other.begin());
}

std::string Shape::ToString() const { return fmt::format("[{}]", fmt::join(begin(), end(), ", ")); }

std::array<int64_t, Shape::kMaxRank> Shape::Strides() const {
  std::array<int64_t, kMaxRank> strides{};
  int64_t step = 1;
  for (int axis = rank_ - 1; axis >= 0; --axis) {
    strides[axis] = step;
    step *= dims_[axis];
  }
  return strides;
}

Shape BroadcastShapes(const Shape& a, const Shape& b) {
  int rank = std::max(a.rank(), b.rank());
  std::vector<int64_t> dims(rank);
  for (int i = 1; i <= rank; ++i) {
    int64_t da = i <= a.rank() ? a[-i] : 1;
    int64_t db = i <= b.rank() ? b[-i] : 1;
    Check<ShapeError>(da == db || da == 1 || db == 1, "shapes {} and {} do not broadcast", a, b);
    dims[rank - i] = da == 1 ? db : da;
  }
  return Shape(dims);
}

}  // namespace calotype
