// Views for random graphs: parts, copies, permutations and other shapes of one value, and values
// made of several views of one value. Code that is right for views of different values may be wrong
// where two of them show the same memory, or the same element at two places of a loop.
#pragma once

#include <algorithm>
#include <vector>

#include "core/random.h"
#include "graph/functions.h"

namespace calotype {

namespace random_views {

inline bool Chance(Random& random, int percent) { return random.Integer(100) < percent; }
inline int Below(Random& random, int64_t n) { return static_cast<int>(random.Integer(n)); }

inline Value Permuted(Value x, Random& random) {
  std::vector<int64_t> axes(x.rank());
  for (int d = 0; d < x.rank(); ++d) axes[d] = d;
  for (int d = x.rank() - 1; d > 0; --d) std::swap(axes[d], axes[Below(random, d + 1)]);
  return Permute(x, axes);
}

// The elements of x in row-major order, repeated or left out as the shape needs.
inline Value Refilled(Value x, const Shape& shape, Random& random) {
  int64_t have = x.shape().elements(), need = shape.elements();
  x = Reshape(x, {have});
  if (have < need) {
    int64_t times = (need + have - 1) / have;
    x = times == 2 ? Concat({x, x}, 0)
                   : Reshape(Broadcast(Reshape(x, {1, have}), {times, have}), {times * have});
  }
  if (x.dim(0) > need) x = Slice(x, 0, random.Integer(x.dim(0) - need + 1), need);
  return Reshape(x, shape);
}

// x turned about itself along an axis.
inline Value Rotated(Value x, int axis, Random& random) {
  const int64_t size = x.dim(axis);
  if (size < 2) return x;
  const int64_t first = 1 + random.Integer(size - 1);
  return Concat({Slice(x, axis, first, size - first), Slice(x, axis, 0, first)}, axis);
}

// x moved along an axis, zeros in its place.
inline Value Shifted(Value x, int axis, Random& random) {
  const int64_t size = x.dim(axis), by = random.Integer(std::min<int64_t>(size, 4));
  std::vector<int64_t> low(x.rank(), 0), high(x.rank(), 0);
  const bool up = Chance(random, 50);
  (up ? low : high)[axis] = by;
  return Pad(Slice(x, axis, up ? 0 : by, size - by), low, high);
}

// A part along an axis.
inline Value Part(Value x, int axis, int64_t size, Random& random) {
  return Slice(x, axis, random.Integer(x.dim(axis) - size + 1), size);
}

// A view of x with x's shape; half of them move elements.
inline Value Same(Value x, Random& random) {
  if (x.rank() == 0) return x;
  const int axis = Below(random, x.rank());
  switch (Below(random, 6)) {
    case 0:
      return Rotated(x, axis, random);
    case 1:
      return Shifted(x, axis, random);
    case 2:
      return Reshape(Permuted(x, random), x.shape());
    case 3:
      return Broadcast(Part(x, axis, 1, random), x.shape());
    case 4:
      return Part(x, axis, 1, random);  // broadcasts against x
    default:
      return x;
  }
}

// A view of x that has this shape, or has it by broadcasting if `exactly` is false.
inline Value ViewAs(Value x, const Shape& shape, Random& random, bool exactly = true) {
  if (x.shape() == shape && Chance(random, 60)) {
    Value y = Same(x, random);
    return exactly ? Broadcast(y, shape) : y;
  }
  if (Chance(random, 25)) return Refilled(x, shape, random);
  if (Chance(random, 30)) x = Permuted(x, random);
  while (x.rank() > shape.rank()) {
    std::vector<int64_t> dims = x.shape().ToVector();
    if (x.rank() == 1) return Reshape(Part(x, 0, 1, random), {});
    if (Chance(random, 50)) {  // join two axes or take an index of the first
      dims[1] *= dims[0];
    } else {
      x = Part(x, 0, 1, random);
    }
    dims.erase(dims.begin());
    x = Reshape(x, Shape(dims));
  }
  for (int d = 1; d <= x.rank(); ++d) {
    const int axis = x.rank() - d;
    const int64_t have = x.dim(axis), want = shape[-d];
    if (have > want) x = Part(x, axis, want, random);
    if (have > 1 && have < want) x = Part(x, axis, 1, random);
  }
  return exactly ? Broadcast(x, shape) : x;
}

// Any view of x.
inline Value Any(Value x, Random& random) {
  if (x.rank() == 0) return x;
  const int axis = Below(random, x.rank());
  switch (Below(random, 4)) {
    case 0:
      return Permuted(x, random);
    case 1:
      return Part(x, axis, 1 + random.Integer(x.dim(axis)), random);
    case 2:
      return Reshape(x, {x.shape().elements()});
    default:
      return Same(x, random);
  }
}

// Two or three views of x that meet element by element, in x's shape. `combine` makes one value of
// two that broadcast, `map` one of one.
template <class Combine, class Map>
Value Meeting(Value x, Random& random, Combine combine, Map map) {
  if (x.rank() == 0) return combine(x, map(x));
  if (Chance(random, 60)) x = map(x);  // not a leaf
  Value y = Same(x, random);
  if (Chance(random, 25)) y = map(y);
  Value z = Chance(random, 75) ? combine(x, y) : combine(y, x);
  if (Chance(random, 35)) z = combine(z, Same(Chance(random, 50) ? x : y, random));
  return Broadcast(z, x.shape());
}

// Parts of x that may overlap, side by side or combined, of the given size along the axis; x has at
// least that.
template <class Combine, class Map>
Value Parts(Value x, int axis, int64_t size, Random& random, Combine combine, Map map) {
  if (Chance(random, 50)) x = map(x);
  if (size > 1 && Chance(random, 40)) {
    const int64_t first = 1 + random.Integer(size - 1);
    Value a = Part(x, axis, first, random), b = Part(x, axis, size - first, random);
    if (Chance(random, 30)) b = map(b);
    return Concat({a, b}, axis);
  }
  Value a = Part(x, axis, size, random), b = Part(x, axis, size, random);
  if (Chance(random, 30)) b = map(b);
  Value y = combine(a, b);
  return Chance(random, 30) ? combine(y, Part(x, axis, size, random)) : y;
}

// x beside itself, something made of it, or a part of it.
template <class Map>
Value Beside(Value x, int axis, int64_t other, Random& random, Map map) {
  Value y = x;
  if (Chance(random, 40)) y = map(y);
  if (other < x.dim(axis)) y = Part(y, axis, other, random);
  if (Chance(random, 25)) y = Broadcast(Same(y, random), y.shape());
  return Chance(random, 50) ? Concat({x, y}, axis) : Concat({y, x}, axis);
}

}  // namespace random_views

}  // namespace calotype
