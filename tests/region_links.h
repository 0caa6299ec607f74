// The links of random regions: what is done to a value before and behind a region's anchor
// (region_fuzz.h). The data of an input is a function of seed and name, so that parts of a region
// can be left out without changing the rest and a printed graph can be replayed.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "core/random.h"
#include "graph/functions.h"
#include "tests/random_views.h"
#include "tests/region_shapes.h"

namespace calotype::region_fuzz {

// How an input's values depend on its name: "x*-3" has numbers times 2^-3, "i<7" has indices below
// 7, "mask" has 0, -1 and -inf (never in the first column).
inline Tensor Data(uint64_t seed, const std::string& name, const TensorType& type, bool exact) {
  Random random(seed, "data of " + name);
  if (type.dtype != DType::kF32) {
    int64_t limit = std::stoll(name.substr(name.find('<') + 1));
    std::vector<int64_t> values(type.shape.elements());
    for (int64_t& v : values) v = random.Integer(limit);
    return Tensor::From(type.shape, values).To(type.dtype);
  }
  Tensor x(type.shape);
  size_t star = name.find('*');
  float scale = star == std::string::npos ? 1 : std::ldexp(1.0f, std::stoi(name.substr(star + 1)));
  if (exact) scale = 1;
  int64_t row = type.shape.rank() > 0 ? type.shape[-1] : 1;
  for (int64_t i = 0; i < x.elements(); ++i) {
    float v = 3 * random.Uniform() - 1.5f;
    if (name.starts_with("mask")) {
      v = i % row == 0 || v < 0 ? 0 : v < 1 ? -1 : -INFINITY;
    } else if (exact) {
      v = std::round(2 * v);
    }
    x.data()[i] = v * scale;
  }
  return x;
}

class Links {
 public:
  explicit Links(const Region& region) : region_(region), exact_(region.exact) {}

 protected:
  using Sizes = std::vector<int64_t>;

  static bool Chance(Random& random, int percent) { return random.Integer(100) < percent; }

  // A parameter or an input; `fan_in` scales its values so that sums of so many stay about 1.
  Value Leaf(std::string name, const Sizes& sizes, int64_t fan_in = 1, int parameter = 60) {
    int exponent = -static_cast<int>(std::lround(0.5 * std::log2(static_cast<double>(fan_in))));
    if (exponent != 0) name += fmt::format("*{}", exponent);
    Random choice(region_.seed, "kind of " + name);
    if (!Chance(choice, parameter)) return graph_.Input(name, Shape(sizes));
    auto p = std::make_shared<Parameter>(
        name, Data(region_.seed, name, {DType::kF32, Shape(sizes)}, exact_));
    return graph_.ParameterLeaf(p);
  }

  // -------------------------------------------------------------------------- links of both

  Value Unary(Value x, Random& random) {
    if (exact_) {
      switch (random.Integer(5)) {
        case 0:
          return Relu(x);
        case 1:
          return -1.0f * x;
        case 2:
          return Abs(x);
        case 3:
          return Maximum(x, -1.0f);
        default:
          return Minimum(x, 2.0f);
      }
    }
    switch (random.Integer(10)) {
      case 0:
      case 1:
      case 2:
        return Silu(x);
      case 3:
        return Gelu(x);
      case 4:
        return QuickGelu(x);
      case 5:
        return Tanh(x);
      case 6:
        return Sigmoid(x);
      case 7:
        return Relu(x);
      case 8:
        return Exp(Minimum(x, 1.0f));
      default:
        return GeluTanh(x);
    }
  }
  Value Scale(Value x, Random& random) {
    float c = exact_ ? static_cast<float>(random.Integer(3) - 1) : 2 * random.Uniform() - 1;
    return Chance(random, 50) ? x * c : x * c + (exact_ ? 1.0f : 0.3f);
  }
  Value Combine(Value x, Value y, Random& random) {
    switch (random.Integer(exact_ ? 4 : 5)) {
      case 0:
        return x * y;
      case 1:
        return x - y;
      case 2:
        return Maximum(x, y);
      case 3:
        return x + y;
      default:
        return x / (Square(y) + 0.5f);
    }
  }
  Value Binary(Value x, const std::string& name, Random& random) {
    Sizes sizes = x.shape().ToVector();
    if (Chance(random, 60)) {
      for (int64_t& s : sizes) {
        if (Chance(random, 50)) s = 1;
      }
      while (!sizes.empty() && sizes[0] == 1 && Chance(random, 50)) sizes.erase(sizes.begin());
    }
    bool again = !earlier_.empty() && Chance(random, 30);
    Value y = again ? Earlier(x.shape(), random, /*exactly=*/false) : Leaf(name, sizes, 1, 40);
    return Chance(random, 80) ? Combine(x, y, random) : Combine(y, x, random);
  }
  Value Norm(Value x, Link::Kind kind, const std::string& name, Random& random) {
    if (kind == Link::kSoftmax) {
      return Softmax(x, static_cast<int>(random.Integer(x.rank())));
    }
    bool affine = Chance(random, 70);
    if (kind == Link::kLayerNorm) {
      return LayerNorm(x, affine ? Leaf(name + ".gamma", {x.dim(-1)}) : Value{},
                       affine ? Leaf(name + ".beta", {x.dim(-1)}) : Value{}, 0.1);
    }
    int64_t channels = x.dim(1);
    Sizes divisors;
    for (int64_t g = 1; g <= channels; ++g) {
      if (channels % g == 0) divisors.push_back(g);
    }
    int64_t groups = divisors[random.Integer(static_cast<int64_t>(divisors.size()))];
    Value y = GroupNorm(x, affine ? Leaf(name + ".gamma", {channels}) : Value{},
                        affine ? Leaf(name + ".beta", {channels}) : Value{}, groups, 0.1);
    return Chance(random, 60) ? Silu(y) : y;
  }

  // ------------------------------------------------------------- several views of one value

  // A view of some value so far that has this shape, or broadcasts to it.
  Value Earlier(const Shape& shape, Random& random, bool exactly = true) {
    Value x = earlier_[random.Integer(static_cast<int64_t>(earlier_.size()))];
    return random_views::ViewAs(x, shape, random, exactly);
  }
  Value Meeting(Value x, const std::string& name, Random& random) {
    if (Chance(random, 15)) {
      int axis = static_cast<int>(random.Integer(x.rank()));
      Value index = graph_.Input(fmt::format("{}<{}", name, x.dim(axis)),
                                 TensorType{DType::kI32, Shape{x.dim(axis)}});
      return Combine(x, Gather(x, index, axis), random);
    }
    return random_views::Meeting(
        x, random, [&](Value a, Value b) { return Combine(a, b, random); },
        [&](Value a) { return Unary(a, random); });
  }
  Value Parts(Value x, int axis, int64_t size, Random& random) {
    return random_views::Parts(
        x, axis, size, random, [&](Value a, Value b) { return Combine(a, b, random); },
        [&](Value a) { return Unary(a, random); });
  }
  Value Beside(Value x, int axis, int64_t other, Random& random) {
    return random_views::Beside(x, axis, other, random, [&](Value a) { return Unary(a, random); });
  }
  // A value and a reduction of it, or of a view of it.
  Value Reduced(Value x, Random& random) {
    std::vector<int64_t> axes;
    for (int d = 0; d < x.rank(); ++d) {
      if (Chance(random, 50)) axes.push_back(d);
    }
    if (axes.empty()) axes = {x.rank() - 1};
    if (Chance(random, 60)) x = Unary(x, random);
    Value y = x;
    if (Chance(random, 40)) y = Broadcast(random_views::Same(y, random), y.shape());
    if (Chance(random, 25)) y = Combine(y, random_views::Same(x, random), random);
    bool gradients = region_.anchor == kMatMulGradients || region_.anchor == kConvGradients ||
                     region_.anchor == kAttentionGradients || region_.anchor == kNormGradients;
    Value r = !gradients && Chance(random, 30) ? Max(y, axes, true)
              : exact_                         ? Sum(y, axes, true)
                                               : Mean(y, axes, true);
    return Chance(random, 80) ? Combine(x, r, random) : Combine(r, x, random);
  }
  // Products of rows of x with rows of x: [.., m, n].
  Value Gram(Value x, int64_t m, int64_t n, Random& random) {
    Value y = Chance(random, 40) ? Unary(x, random) : x;
    Value a = random_views::Part(x, x.rank() - 2, m, random);
    Value b = random_views::Part(y, x.rank() - 2, n, random);
    Value z = MatMul(a, b, false, true);
    return exact_ ? z : z * (1 / std::sqrt(static_cast<float>(x.dim(-1))));
  }

  // ----------------------------------------------------------------------------- prologue

  // A value of this shape behind the prologue's links from `i` on, the last of which is a leaf.
  Value Prologue(const Sizes& sizes, size_t i = 0) {
    Value x = PrologueLink(sizes, i);
    if (i < region_.prologue.size()) earlier_.push_back(x);
    return x;
  }
  Value PrologueLink(const Sizes& sizes, size_t i) {
    if (i == region_.prologue.size() || sizes.empty()) {
      leaf_ = Leaf("x", sizes, 1, 15);
      earlier_.push_back(leaf_);
      return leaf_;
    }
    const Link& link = region_.prologue[i];
    Random random(link.seed, "prologue");
    std::string name = fmt::format("p{:x}", link.seed % (1 << 24));
    int rank = static_cast<int>(sizes.size());
    int axis = static_cast<int>(random.Integer(rank));
    Sizes inner = sizes;
    int64_t& s = inner[axis];
    auto next = [&] { return Prologue(inner, i + 1); };
    switch (link.kind) {
      case Link::kUnary:
        return Unary(next(), random);
      case Link::kScale:
        return Scale(next(), random);
      case Link::kBinary:
        return Binary(next(), name, random);
      case Link::kGroupNorm:
      case Link::kLayerNorm:
      case Link::kSoftmax: {
        Value x = next();
        Link::Kind kind = link.kind == Link::kGroupNorm && rank < 2 ? Link::kLayerNorm : link.kind;
        return exact_ ? x : Norm(x, kind, name, random);
      }
      case Link::kPermute: {
        Sizes axes(rank), back(rank);
        for (int d = 0; d < rank; ++d) axes[d] = d;
        for (int d = rank - 1; d > 0; --d) std::swap(axes[d], axes[random.Integer(d + 1)]);
        for (int d = 0; d < rank; ++d) {
          inner[axes[d]] = sizes[d];
          back[d] = axes[d];
        }
        return Permute(next(), back);
      }
      case Link::kReshape: {
        if (rank < 2) return next();
        int at = static_cast<int>(random.Integer(rank - 1));
        inner[at] *= inner[at + 1];
        inner.erase(inner.begin() + at + 1);
        return Reshape(next(), Shape(sizes));
      }
      case Link::kSlice: {
        int64_t before = random.Integer(4), after = random.Integer(4);
        s += before + after;
        return Slice(next(), axis, before, sizes[axis]);
      }
      case Link::kPad: {
        if (s < 3) return next();
        Sizes low(rank, 0), high(rank, 0);
        low[axis] = random.Integer(2);
        high[axis] = random.Integer(2);
        s -= low[axis] + high[axis];
        return Pad(next(), low, high);
      }
      case Link::kConcat: {
        if (rank == 4 && Chance(random, 60)) axis = 1;
        if (inner[axis] < 2) return next();
        int64_t first = 1 + random.Integer(inner[axis] - 1);
        Sizes other = sizes;
        other[axis] -= first;
        inner[axis] = first;
        Value x = next(), y;
        y = Chance(random, 40) ? Earlier(Shape(other), random) : Leaf(name, other, 1, 20);
        if (Chance(random, 30)) y = Unary(y, random);
        return Chance(random, 50) ? Concat({x, y}, axis) : Concat({y, x}, axis);
      }
      case Link::kContraction: {
        if (rank < 2) return next();
        int64_t k = 1 + random.Integer(20);
        inner.back() = k;
        bool tb = Chance(random, 60);
        Value x = next();
        Sizes w = tb ? Sizes{sizes.back(), k} : Sizes{k, sizes.back()};
        return MatMul(x, Leaf(name + ".w", w, k, 70), false, tb,
                      Chance(random, 50) ? Leaf(name + ".b", {sizes.back()}) : Value{});
      }
      case Link::kBroadcast:
        s = 1;
        return Broadcast(next(), Shape(sizes));
      case Link::kGather: {
        s = 1 + random.Integer(2 * sizes[axis]);
        Value index = graph_.Input(
            fmt::format("{}<{}", name, inner[axis]),
            TensorType{Chance(random, 50) ? DType::kI32 : DType::kI64, Shape{sizes[axis]}});
        return Gather(next(), index, axis);
      }
      case Link::kUpsample:
        if (rank != 4 || sizes[2] % 2 != 0 || sizes[3] % 2 != 0) return next();
        inner[2] /= 2;
        inner[3] /= 2;
        return ResizeNearest(next(), sizes[2], sizes[3]);
      case Link::kMeeting:
        return Meeting(next(), name, random);
      case Link::kParts: {
        const int64_t size = s;
        s = Chance(random, 40) ? 2 * s : s + random.Integer(4);
        return Parts(next(), axis, size, random);
      }
      case Link::kBeside: {
        if (s < 2) return next();
        const int64_t other = 1 + random.Integer(s / 2);
        s -= other;
        return Beside(next(), axis, other, random);
      }
      case Link::kReduced:
        return Reduced(next(), random);
      case Link::kGram:
        if (rank < 2 || rank > 3) return next();
        inner[rank - 2] = std::max(sizes[rank - 2], sizes[rank - 1]) + random.Integer(4);
        inner[rank - 1] = 1 + random.Integer(20);
        return Gram(next(), sizes[rank - 2], sizes[rank - 1], random);
      default:
        return next();
    }
  }

  // ------------------------------------------------------------------------------ epilogue

  // A parameter that the graph reads and writes.
  Value Update(Value y, const std::string& name, Random& random) {
    Value p = Leaf(name, y.shape().ToVector(), 1, 100), next;
    switch (random.Integer(6)) {
      case 0:
      case 1:  // index for index
        next = p - y * (exact_ ? 1.0f : 0.125f);
        break;
      case 2:  // the old value at other indices as well
        next = Meeting(p, name, random);
        break;
      case 3:
        next = Combine(random_views::Same(p, random), y, random);
        next = Broadcast(next, y.shape());
        break;
      case 4:
        next = Broadcast(random_views::Same(y, random), y.shape());
        break;
      default:
        next = updated_.empty() ? Concat({p}, 0)
                                : random_views::ViewAs(updated_.back(), y.shape(), random);
    }
    graph_.Update(p, next);
    updated_.push_back(p);
    if (Chance(random, 25)) graph_.Output(name + ".new", next);
    return Chance(random, 50) ? y : Combine(y, random_views::Same(p, random), random);
  }

  static int ChannelAxis(Value y) { return y.rank() == 4 ? 1 : y.rank() - 1; }
  Sizes AlongChannels(Value y) {
    Sizes sizes(y.rank(), 1);
    sizes[ChannelAxis(y)] = y.dim(ChannelAxis(y));
    return sizes;
  }

  Value Epilogue(Value y, size_t i) {
    const Link& link = region_.epilogue[i];
    Random random(link.seed, "epilogue");
    std::string name = fmt::format("e{:x}", link.seed % (1 << 24));
    int rank = y.rank();
    if (rank == 0) return y;
    int axis = static_cast<int>(random.Integer(rank)), channels = ChannelAxis(y);
    switch (link.kind) {
      case Link::kUnary:
        return Unary(y, random);
      case Link::kScale:
        return Scale(y, random);
      case Link::kBinary:
        return Binary(y, name, random);
      case Link::kGroupNorm:
      case Link::kLayerNorm:
      case Link::kSoftmax: {
        Link::Kind kind = link.kind == Link::kGroupNorm && rank < 2 ? Link::kLayerNorm : link.kind;
        return exact_ ? y : Norm(y, kind, name, random);
      }
      case Link::kPermute: {
        Sizes axes(rank);
        for (int d = 0; d < rank; ++d) axes[d] = d;
        if (rank == 4 && Chance(random, 60)) return Permute(y, {0, 2, 3, 1});
        for (int d = rank - 1; d > 0; --d) std::swap(axes[d], axes[random.Integer(d + 1)]);
        return Permute(y, axes);
      }
      case Link::kReshape: {
        Sizes sizes = y.shape().ToVector();
        if (rank < 2) return y;
        int at = static_cast<int>(random.Integer(rank - 1));
        sizes[at] *= sizes[at + 1];
        sizes.erase(sizes.begin() + at + 1);
        return Reshape(y, Shape(sizes));
      }
      case Link::kSlice: {
        int64_t count = 1 + random.Integer(y.dim(axis));
        return Slice(y, axis, random.Integer(y.dim(axis) - count + 1), count);
      }
      case Link::kPad: {
        Sizes low(rank, 0), high(rank, 0);
        low[axis] = random.Integer(3);
        high[axis] = random.Integer(3);
        return Pad(y, low, high);
      }
      case Link::kConcat: {
        Sizes other = y.shape().ToVector();
        other[axis] = 1 + random.Integer(8);
        Value z = Chance(random, 40) ? Earlier(Shape(other), random) : Leaf(name, other, 1, 20);
        return Chance(random, 50) ? Concat({y, z}, axis) : Concat({z, y}, axis);
      }
      case Link::kContraction: {
        if (rank < 2 || y.dim(-1) > 200) return y;
        int64_t n = 1 + random.Integer(20), k = y.dim(-1);
        return MatMul(y, Leaf(name + ".w", {n, k}, k, 70), false, true);
      }
      case Link::kBias:
        return y + Leaf(name, AlongChannels(y));
      case Link::kTimeEmbedding: {
        Sizes sizes = AlongChannels(y);
        sizes[0] = y.dim(0);
        return y + Leaf(name, sizes, 1, 10);
      }
      case Link::kResidual: {
        Value other = leaf_.defined() && leaf_.shape() == y.shape() && Chance(random, 60) ? leaf_
                      : Chance(random, 50) ? Earlier(y.shape(), random, /*exactly=*/false)
                                           : Leaf(name, y.shape().ToVector(), 1, 10);
        return Chance(random, 80) ? y + other : Combine(other, y, random);
      }
      case Link::kGated: {
        int64_t half = y.dim(channels) / 2;
        if (half == 0) return y;
        Value a = Slice(y, channels, 0, half), b = Slice(y, channels, half, half);
        return exact_ ? a * Relu(b) : a * (Chance(random, 70) ? Gelu(b) : Sigmoid(b));
      }
      case Link::kStatistics: {
        std::vector<int64_t> axes;
        for (int d = 0; d < rank; ++d) {
          if (rank == 4 ? d >= 2 : Chance(random, 50)) axes.push_back(d);
        }
        if (axes.empty()) axes = {rank - 1};
        Value x = Chance(random, 25) ? Meeting(y, name, random) : y;
        graph_.Output(name + ".sum", Sum(x, axes, Chance(random, 50)));
        if (Chance(random, 60)) graph_.Output(name + ".squares", Sum(Square(y), axes));
        return y;
      }
      case Link::kOutput:
        graph_.Output(name, Chance(random, 40) ? random_views::Any(y, random) : y);
        if (Chance(random, 20)) graph_.Output(name + ".again", y);
        return y;
      case Link::kTwice: {
        Value z = Unary(y, random);
        if (Chance(random, 40)) graph_.Output(name, z);
        return Combine(y, z, random);
      }
      case Link::kMeeting:
        return Meeting(y, name, random);
      case Link::kParts:
        return Parts(y, axis, 1 + random.Integer(y.dim(axis)), random);
      case Link::kBeside:
        if (y.shape().elements() > 20000) return y;
        return Beside(y, axis, 1 + random.Integer(y.dim(axis)), random);
      case Link::kReduced:
        return Reduced(y, random);
      case Link::kGram: {
        if (rank < 2 || rank > 3 || y.dim(-1) > 200) return y;
        const int64_t most = std::min<int64_t>(y.dim(-2), 40);
        const int64_t m = 1 + random.Integer(most);
        return Gram(y, m, Chance(random, 30) ? m : 1 + random.Integer(most), random);
      }
      case Link::kUpdate:
        return Update(y, name, random);
      default:
        return y;
    }
  }

  const Region& region_;
  bool exact_;
  ComputationGraph graph_;
  Value leaf_;                  // the leaf behind the prologue
  std::vector<Value> earlier_;  // all values so far that links have made, and the leaf
  std::vector<Value> updated_;  // parameters
};

}  // namespace calotype::region_fuzz
