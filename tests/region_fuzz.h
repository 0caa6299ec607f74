// Graphs of random regions for tests: one anchor (contraction, attention, reduction, norm) between
// a prologue and an epilogue, as the code generator fuses them. The graph is a function of the
// region (region_shapes.h), and the data of an input a function of seed and name, so that parts of
// a region can be left out without changing the rest and a printed graph can be replayed.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "core/random.h"
#include "graph/functions.h"
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

class Builder {
 public:
  explicit Builder(const Region& region)
      : region_(region), random_(region.seed, "options"), exact_(region.exact) {}

  ComputationGraph Build() {
    Value y = AnchorValue();
    for (size_t i = 0; i < region_.epilogue.size(); ++i) y = Epilogue(y, i);
    graph_.Output("y", y);
    return std::move(graph_);
  }

 private:
  using Sizes = std::vector<int64_t>;

  static int64_t Elements(const Sizes& sizes) {
    int64_t n = 1;
    for (int64_t s : sizes) n *= s;
    return n;
  }
  static bool Chance(Random& random, int percent) { return random.Integer(100) < percent; }
  bool Chance(int percent) { return Chance(random_, percent); }
  int64_t size(size_t i) const { return region_.sizes[i]; }

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
    Value y = Leaf(name, sizes, 1, 40);
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

  // ----------------------------------------------------------------------------- prologue

  // A value of this shape behind the prologue's links from `i` on, the last of which is a leaf.
  Value Prologue(const Sizes& sizes, size_t i = 0) {
    if (i == region_.prologue.size() || sizes.empty()) {
      leaf_ = Leaf("x", sizes, 1, 15);
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
        Value x = next(), y = Leaf(name, other, 1, 20);
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
      default:
        return next();
    }
  }

  // ------------------------------------------------------------------------------- anchors

  Value MatMulAnchor() {
    int64_t batch = size(0), m = size(1), n = size(2), k = size(3);
    bool transposed = region_.anchor == kMatMulTransposed;
    bool ta = transposed && Chance(50), tb = transposed ? Chance(50) : Chance(80);
    bool batched = region_.anchor == kMatMulBatched;
    Sizes a = ta ? Sizes{k, m} : Sizes{m, k}, b = tb ? Sizes{n, k} : Sizes{k, n};
    if (batched || (batch > 1 && Chance(70))) a.insert(a.begin(), batch);
    if (batched && Chance(80)) b.insert(b.begin(), Chance(80) ? batch : 1);
    Value bias = Chance(50) ? Leaf("b", {n}) : Value{};
    Value x = Prologue(a);
    Value w = Leaf("w", b, k, batched ? 20 : 75);
    wrt_ = {leaf_, w};
    if (bias.defined()) wrt_.push_back(bias);
    return MatMul(x, w, ta, tb, bias);
  }

  Value ConvAnchor() {
    int64_t batch = size(0), height = size(1), width = size(2), in = size(3), out = size(4);
    Conv2dOptions options = Conv2dOptions::Padded(1, 1);
    int64_t kh = 3, kw = 3;
    Anchor anchor = region_.anchor;
    if (anchor == kConvGradients) {
      anchor = std::array{kConv3x3, kConv3x3Stride2, kConv1x1, kConvAny}[random_.Integer(4)];
    }
    if (anchor == kConv3x3Stride2) options.stride = 2;
    if (anchor == kConv1x1) {
      kh = kw = 1;
      options = Chance(80) ? Conv2dOptions{} : Conv2dOptions{.stride = 2};
    } else if (anchor == kConvAny) {
      kh = 1 + random_.Integer(5);
      kw = Chance(50) ? kh : 1 + random_.Integer(5);
      options.stride = 1 + random_.Integer(2);
      for (int64_t* side : {&options.top, &options.bottom, &options.left, &options.right}) {
        *side = random_.Integer(3);
      }
    } else if (anchor != kConvUpsampled && Chance(20)) {  // diffusers pads below and right only
      options = {.stride = options.stride, .top = 0, .bottom = 1, .left = 0, .right = 1};
    }
    options.bottom += std::max<int64_t>(0, kh - height - options.top - options.bottom);
    options.right += std::max<int64_t>(0, kw - width - options.left - options.right);
    Value bias = Chance(60) ? Leaf("b", {out}) : Value{};
    Value x;
    if (anchor == kConvUpsampled) {
      Value small = Prologue({batch, in, (height + 1) / 2, (width + 1) / 2});
      x = ResizeNearest(small, 2 * small.dim(2), 2 * small.dim(3));
    } else {
      x = Prologue({batch, in, height, width});
    }
    Value w = Leaf("w", {out, in, kh, kw}, in * kh * kw, 75);
    wrt_ = {leaf_, w};
    if (bias.defined()) wrt_.push_back(bias);
    return Conv2d(x, w, bias, options);
  }

  Value AttentionAnchor() {
    int64_t batch = size(0), tokens = size(1), keys = size(2), heads = size(3), width = size(4);
    bool self =
        region_.anchor == kSelfAttention || (region_.anchor == kAttentionGradients && Chance(50));
    if (self) keys = tokens;
    AttentionOptions options;
    options.heads = heads;
    options.scale = 1 / std::sqrt(static_cast<double>(width));
    options.causal = Chance(25);
    int64_t features = heads * width, value_width = Chance(75) ? width : 1 + random_.Integer(24);
    Value x = Prologue({batch, tokens, features}), q = x, k = x, v = x;
    auto project = [&](Value from, const char* name, int64_t to) {
      return MatMul(from, Leaf(name, {to, from.dim(-1)}, from.dim(-1), 80), false, true);
    };
    bool projected = Chance(60);
    int64_t shared = Chance(80) ? batch : 1;
    if (self && projected) {
      q = project(x, "w.q", features);
      k = project(x, "w.k", features);
      v = project(x, "w.v", heads * value_width);
    } else if (!self && projected) {
      Value context = Leaf("context", {shared, keys, 1 + random_.Integer(16)}, 1, 10);
      q = project(x, "w.q", features);
      k = project(context, "w.k", features);
      v = project(context, "w.v", heads * value_width);
    } else if (!self) {
      k = Leaf("k", {shared, keys, features}, 1, 10);
      v = Leaf("v", {shared, keys, heads * value_width}, 1, 10);
    }
    Value mask;
    if (Chance(30)) {
      Sizes sizes = {Chance(50) ? batch : 1, Chance(30) ? heads : 1, Chance(50) ? tokens : 1, keys};
      mask = graph_.Input("mask", Shape(sizes));
    }
    wrt_ = {leaf_};
    if (k != x) wrt_.push_back(k);
    AttentionResult result = Attention(q, k, v, options, mask);
    if (Chance(15)) graph_.Output("lse", result.lse);
    if (projected && Chance(50)) return project(result.out, "w.out", features);
    return result.out;
  }

  Value ReduceAnchor() {
    Value x = Prologue({size(0), size(1), size(2)});
    std::vector<int64_t> axes = {2};
    if (region_.anchor == kReduceRows) {
      if (Chance(30)) axes = {1, 2};
    } else {
      axes = Chance(50) ? std::vector<int64_t>{1} : std::vector<int64_t>{0, 1};
    }
    bool keep = Chance(40);
    // A maximum of rounded values is exact only if they are.
    if (Chance(30)) return Max(x, axes, keep);
    return exact_ || Chance(50) ? Sum(x, axes, keep) : Mean(x, axes, keep);
  }

  Value NormAnchor() {
    Anchor anchor = region_.anchor;
    if (anchor == kNormGradients) {
      anchor = std::array{kGroupNorm, kLayerNorm, kSoftmax}[random_.Integer(3)];
    }
    Sizes pictures = {size(0), size(2), 1 + size(1) / 4, 1 + size(1) % 7};
    Value x = Prologue(anchor == kGroupNorm ? pictures : Sizes{size(0), size(1), size(2)});
    wrt_ = {leaf_};
    Link::Kind kind = anchor == kGroupNorm   ? Link::kGroupNorm
                      : anchor == kLayerNorm ? Link::kLayerNorm
                                             : Link::kSoftmax;
    return Norm(x, kind, "norm", random_);
  }

  // The gradients of y: that of the last of wrt_ goes on, the others are outputs or updates.
  Value GradientsOf(Value y) {
    std::vector<Value> dy = {Leaf("dy", y.shape().ToVector(), 1, 0)};
    std::vector<Value> outputs = {y};
    std::vector<Value> gradients = calotype::Gradients(outputs, dy, wrt_);
    if (Chance(50)) graph_.Output("forward", y);
    size_t main = random_.Integer(static_cast<int64_t>(wrt_.size()));
    for (size_t i = 0; i < wrt_.size(); ++i) {
      if (i == main) continue;
      bool parameter = graph_.node(wrt_[i].id.node).parameter != nullptr;
      if (parameter && Chance(40)) {
        graph_.Update(wrt_[i], wrt_[i] - gradients[i] * (exact_ ? 1.0f : 0.125f));
      } else {
        graph_.Output(fmt::format("d{}", i), gradients[i]);
      }
    }
    return gradients[main];
  }

  Value AnchorValue() {
    switch (region_.anchor) {
      case kMatMul:
      case kMatMulTransposed:
      case kMatMulBatched:
        return MatMulAnchor();
      case kMatMulGradients:
        return GradientsOf(MatMulAnchor());
      case kConv3x3:
      case kConv3x3Stride2:
      case kConv1x1:
      case kConvAny:
      case kConvUpsampled:
        return ConvAnchor();
      case kConvGradients:
        return GradientsOf(ConvAnchor());
      case kSelfAttention:
      case kCrossAttention:
        return AttentionAnchor();
      case kAttentionGradients:
        return GradientsOf(AttentionAnchor());
      case kReduceRows:
      case kReduceColumns:
        return ReduceAnchor();
      case kGroupNorm:
      case kLayerNorm:
      case kSoftmax:
        return NormAnchor();
      case kNormGradients:
        return GradientsOf(NormAnchor());
      default:
        return Prologue({size(0), size(1), size(2)});
    }
  }

  // ------------------------------------------------------------------------------ epilogue

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
        Value z = Leaf(name, other, 1, 20);
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
        Value other = leaf_.defined() && leaf_.shape() == y.shape() && Chance(random, 60)
                          ? leaf_
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
        graph_.Output(name + ".sum", Sum(y, axes, Chance(random, 50)));
        if (Chance(random, 60)) graph_.Output(name + ".squares", Sum(Square(y), axes));
        return y;
      }
      case Link::kOutput:
        graph_.Output(name, y);
        return y;
      case Link::kTwice: {
        Value z = Unary(y, random);
        if (Chance(random, 40)) graph_.Output(name, z);
        return Combine(y, z, random);
      }
      default:
        return y;
    }
  }

  const Region& region_;
  Random random_;
  bool exact_;
  ComputationGraph graph_;
  Value leaf_;              // the leaf behind the prologue
  std::vector<Value> wrt_;  // what gradients are taken by
};

}  // namespace calotype::region_fuzz
