// Graphs of random regions for tests: one anchor (contraction, attention, reduction, norm) between
// a prologue and an epilogue, as the code generator fuses them. The graph is a function of the
// region (region_shapes.h).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "tests/region_links.h"

namespace calotype::region_fuzz {

class Builder : private Links {
 public:
  explicit Builder(const Region& region) : Links(region), random_(region.seed, "options") {}

  ComputationGraph Build() {
    Value y = AnchorValue();
    earlier_.push_back(y);
    for (size_t i = 0; i < region_.epilogue.size(); ++i) {
      y = Epilogue(y, i);
      earlier_.push_back(y);
    }
    graph_.Output("y", y);
    return std::move(graph_);
  }

 private:
  using Links::Chance;
  bool Chance(int percent) { return Chance(random_, percent); }
  int64_t size(size_t i) const { return region_.sizes[i]; }

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
    if (Chance(12)) {  // by a view of something that x is made of
      wrt_ = {leaf_};
      Value y = Earlier(Shape(b), random_);
      return MatMul(x, exact_ ? y : y * (1 / std::sqrt(static_cast<float>(k))), ta, tb, bias);
    }
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
    if (self && projected && Chance(40)) {  // parts of one product
      const int64_t wide = heads * value_width;
      if (value_width == width && Chance(50)) {
        Value all = Reshape(project(x, "w.qkv", 3 * features), {batch, tokens, 3, features});
        auto part = [&](int64_t i) {
          return Reshape(Slice(all, 2, i, 1), {batch, tokens, features});
        };
        q = part(0), k = part(1), v = part(2);
      } else {
        Value all = project(x, "w.qkv", 2 * features + wide);
        const bool overlap = Chance(30);
        q = Slice(all, 2, 0, features);
        k = Slice(all, 2, overlap ? features / 2 : features, features);
        v = Slice(all, 2, overlap ? features : 2 * features, wide);
      }
    } else if (self && projected) {
      q = project(x, "w.q", features);
      k = project(x, "w.k", features);
      v = project(x, "w.v", heads * value_width);
    } else if (!self && projected) {
      Value context = Leaf("context", {shared, keys, 1 + random_.Integer(16)}, 1, 10);
      q = project(x, "w.q", features);
      k = project(context, "w.k", features);
      v = project(context, "w.v", heads * value_width);
    } else if (!self && Chance(40)) {
      Value both = Leaf("kv", {shared, keys, features + heads * value_width}, 1, 10);
      k = Slice(both, 2, 0, features);
      v = Slice(both, 2, Chance(30) ? features / 2 : features, heads * value_width);
    } else if (self && Chance(50)) {
      k = Broadcast(random_views::Same(x, random_), x.shape());
      v = Chance(50) ? Unary(x, random_) : Slice(x, 2, 0, heads * std::min(width, value_width));
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

  Random random_;
  std::vector<Value> wrt_;  // what gradients are taken by
};

}  // namespace calotype::region_fuzz
