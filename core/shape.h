// Shape: the sizes of a tensor's axes, row-major order, rank at most 8, held inline. All size
// arithmetic is overflow-checked int64.
#pragma once

#include <fmt/format.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <vector>

namespace calotype {

// a * b and a + b; throw ShapeError naming `what` on overflow or a negative operand.
int64_t CheckedMul(int64_t a, int64_t b, const char* what);
int64_t CheckedAdd(int64_t a, int64_t b, const char* what);

class Shape {
 public:
  static constexpr int kMaxRank = 8;

  Shape() = default;  // rank 0: a scalar, one element
  Shape(std::initializer_list<int64_t> dims) : Shape(std::span(dims.begin(), dims.size())) {}
  // Errors: ShapeError for rank > 8, a negative size, or more than 2^48 elements.
  explicit Shape(std::span<const int64_t> dims);
  explicit Shape(const std::vector<int64_t>& dims) : Shape(std::span<const int64_t>(dims)) {}

  int rank() const { return rank_; }
  // Size of `axis`; a negative axis counts from the end. Errors: ShapeError out of range.
  int64_t operator[](int axis) const { return dims_[Axis(axis)]; }
  // `axis` in [-rank, rank) as an index in [0, rank).
  int Axis(int axis) const;
  int64_t elements() const;  // product of the sizes; 1 for rank 0
  // A copy with the size of `axis` replaced.
  Shape With(int axis, int64_t size) const;

  const int64_t* begin() const { return dims_.data(); }
  const int64_t* end() const { return dims_.data() + rank_; }
  std::span<const int64_t> dims() const { return {dims_.data(), static_cast<size_t>(rank_)}; }
  std::vector<int64_t> ToVector() const { return {begin(), end()}; }

  bool operator==(const Shape& other) const;
  std::string ToString() const;  // "[2, 3, 16, 16]"

  // Row-major strides in elements.
  std::array<int64_t, kMaxRank> Strides() const;

 private:
  std::array<int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};

// The shape both operands broadcast to by NumPy's rule (align at the end, 1 stretches).
// Errors: ShapeError naming both.
Shape BroadcastShapes(const Shape& a, const Shape& b);

}  // namespace calotype

template <>
struct fmt::formatter<calotype::Shape> : fmt::formatter<std::string> {
  auto format(const calotype::Shape& shape, fmt::format_context& context) const {
    return fmt::formatter<std::string>::format(shape.ToString(), context);
  }
};
