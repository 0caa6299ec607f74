// The graph in the ops that the lowering knows. Padding, spreading with zeros and biases become
// nodes of their own, so that placement and fusion treat them like everything else.
#include <algorithm>
#include <functional>
#include <map>

#include "core/contract.h"
#include "core/contract_reference.h"
#include "graph/functions.h"
#include "graph/passes.h"
#include "jit/lower.h"
#include "jit/lower_ops.h"
#include "jit/lower_winograd.h"

namespace calotype::jit {

namespace {

std::vector<TensorType> InferCorrelate(const InferContext& context) {
  const Shape &x = context.inputs[0].shape, &w = context.inputs[1].shape;
  Check<ShapeError>(x.rank() == 4 && w.rank() == 4 && x[1] == w[0] && x[2] >= w[2] && x[3] >= w[3],
                    "Correlate: {} by {}", x, w);
  return {{DType::kF32, {x[0], w[1], x[2] - w[2] + 1, x[3] - w[3] + 1}}};
}

template <class T>
void RunCorrelate(const RunContext& context,
                  void (*forward)(const Conv2dShape&, const T*, const T*, const T*, T*)) {
  const Shape &x = context.inputs[0].shape(), &w = context.inputs[1].shape();
  Conv2dShape s{.batch = x[0],
                .in = x[1],
                .height = x[2],
                .width = x[3],
                .out = w[1],
                .kernel_h = w[2],
                .kernel_w = w[3]};
  std::vector<T> flipped(w.elements());
  const T* from = context.inputs[1].data<T>();
  int64_t plane = w[2] * w[3];
  for (int64_t o = 0; o < w[0]; ++o) {
    for (int64_t c = 0; c < w[1]; ++c) {
      for (int64_t i = 0; i < plane; ++i) {
        flipped[(c * w[0] + o) * plane + i] = from[(o * w[1] + c) * plane + plane - 1 - i];
      }
    }
  }
  forward(s, context.inputs[0].data<T>(), flipped.data(), nullptr, context.outputs[0].data<T>());
}

bool HasKernel(const ComputationNode& node) {
  if (node.op->decompose == nullptr) return true;
  if (node.op != &kAttentionOp && node.op != &kAttentionGradientOp) return false;
  if (node.attrs.Float("dropout", 0) != 0) return false;
  // The gradient of keys that a batch shares is a sum over the batch.
  return node.op == &kAttentionOp || node.types[0].shape[0] == node.types[1].shape[0];
}

std::vector<Value> DecomposeNode(ComputationGraph& target, const ComputationNode& node,
                                 std::span<const Value> inputs) {
  if (HasKernel(node)) return {};
  return node.op->decompose(target, node, inputs);
}

Value Zeros(ComputationGraph& graph, const Shape& shape) {
  return Broadcast(graph.Constant(0.0f), shape);
}

// Zeros around x, or (negative) a part of it.
Value PadOrCut(Value x, std::vector<int64_t> low, std::vector<int64_t> high) {
  for (int axis = 0; axis < x.rank(); ++axis) {
    int64_t start = std::max<int64_t>(0, -low[axis]), stop = std::max<int64_t>(0, -high[axis]);
    if (start + stop > 0) x = Slice(x, axis, start, x.dim(axis) - start - stop);
    low[axis] = std::max<int64_t>(0, low[axis]);
    high[axis] = std::max<int64_t>(0, high[axis]);
  }
  auto zero = [](int64_t n) { return n == 0; };
  if (std::all_of(low.begin(), low.end(), zero) && std::all_of(high.begin(), high.end(), zero)) {
    return x;
  }
  return Pad(x, low, high);
}

Value PadImage(Value x, const Attrs& attrs) {
  return PadOrCut(x, {0, 0, attrs.Int("top"), attrs.Int("left")},
                  {0, 0, attrs.Int("bottom"), attrs.Int("right")});
}

Attrs Unpadded(Attrs attrs) {
  for (const char* side : {"top", "bottom", "left", "right"}) attrs.Set(side, int64_t{0});
  return attrs;
}

// dy spread and padded so that the gradient is a correlation with the turned kernel.
Value PadGradient(const ComputationNode& node, Value dy, Value w) {
  const Attrs& attrs = node.attrs;
  int64_t stride = attrs.Int("stride"), ho = dy.dim(2), wo = dy.dim(3);
  if (stride > 1) {
    dy = Reshape(dy, {dy.dim(0), dy.dim(1), ho, 1, wo, 1});
    dy = Pad(dy, {0, 0, 0, 0, 0, 0}, {0, 0, 0, stride - 1, 0, stride - 1});
    dy = Reshape(dy, {dy.dim(0), dy.dim(1), ho * stride, wo * stride});
  }
  int64_t low_h = w.dim(2) - 1 - attrs.Int("top"), low_w = w.dim(3) - 1 - attrs.Int("left");
  return PadOrCut(dy, {0, 0, low_h, low_w},
                  {0, 0, attrs.Int("height") + w.dim(2) - 1 - low_h - dy.dim(2),
                   attrs.Int("width") + w.dim(3) - 1 - low_w - dy.dim(3)});
}

// The input of a nearest-neighbour enlargement by two (ResizeNearest), or an undefined value.
Value EnlargedFrom(Value x) {
  auto producer = [](Value v) -> const ComputationNode& { return v.graph->node(v.id.node); };
  auto input = [&](Value v) { return Value{v.graph, producer(v).inputs[0]}; };
  if (x.rank() != 4 || producer(x).op != &kReshapeOp) return {};
  Value wide = input(x);
  if (producer(wide).op != &kBroadcastOp) return {};
  int64_t b = x.dim(0), c = x.dim(1), h = x.dim(2) / 2, w = x.dim(3) / 2;
  if (!(wide.shape() == Shape{b, c, h, 2, w, 2})) return {};
  Value narrow = input(wide);
  if (!(narrow.shape() == Shape{b, c, h, 1, w, 1})) return {};
  return Reshape(narrow, {b, c, h, w});
}

// A 3x3 convolution of a picture enlarged by two: each output pixel sees only 2x2 source pixels,
// with kernel rows and columns that fall on one source pixel added up. Four 2x2 convolutions of the
// small picture, one for each parity of row and column, do it with 4/9 of the products.
Value ConvolveEnlarged(Value x, Value w, Value bias) {
  const int64_t h = x.dim(2), width = x.dim(3), batch = x.dim(0), out = w.dim(0);
  auto halves = [](Value v, int axis, int parity) {
    Value first = Slice(v, axis, 0, 1), middle = Slice(v, axis, 1, 1), last = Slice(v, axis, 2, 1);
    if (parity == 0) return Concat({first, middle + last}, axis);
    return Concat({first + middle, last}, axis);
  };
  Value padded = Pad(x, {0, 0, 1, 1}, {0, 0, 1, 1});
  std::vector<Value> rows;
  for (int row : {0, 1}) {
    std::vector<Value> columns;
    for (int column : {0, 1}) {
      Value part = Slice(Slice(padded, 2, row, h + 1), 3, column, width + 1);
      Value y = Conv2d(part, halves(halves(w, 2, row), 3, column), {}, {});
      if (bias.defined()) y = y + Reshape(bias, {out, 1, 1});
      columns.push_back(Reshape(y, {batch, out, h, 1, width, 1}));
    }
    rows.push_back(Concat(columns, 5));
  }
  return Reshape(Concat(rows, 3), {batch, out, 2 * h, 2 * width});
}

bool IsPlain3x3(const ComputationNode& node, Value w) {
  for (const char* side : {"stride", "top", "bottom", "left", "right"}) {
    if (node.attrs.Int(side) != 1) return false;
  }
  return w.dim(2) == 3 && w.dim(3) == 3;
}

std::vector<Value> EnlargedNode(ComputationGraph&, const ComputationNode& node,
                                std::span<const Value> inputs) {
  if (node.op != &kConv2dOp || node.types[0].shape.elements() == 0) return {};
  if (!IsPlain3x3(node, inputs[1]) || inputs[1].shape().elements() == 0) return {};
  Value small = EnlargedFrom(inputs[0]);
  if (!small.defined()) return {};
  return {ConvolveEnlarged(small, inputs[1], inputs.size() == 3 ? inputs[2] : Value{})};
}

// A rewrite is a plain function, so what it needs to know besides the node stands here meanwhile.
thread_local std::map<const ComputationNode*, int> winograd_tiles;

std::vector<Value> WinogradNode(ComputationGraph&, const ComputationNode& node,
                                std::span<const Value> inputs) {
  auto chosen = winograd_tiles.find(&node);
  if (chosen == winograd_tiles.end()) return {};
  const bool gradient = node.op == &kConv2dInputGradientOp;
  Value x = gradient ? PadGradient(node, inputs[0], inputs[1]) : PadImage(inputs[0], node.attrs);
  Value y = WinogradConvolution(x, inputs[1], gradient, chosen->second);
  if (inputs.size() == 3) y = y + Reshape(inputs[2], {inputs[2].dim(0), 1, 1});
  return {y};
}

std::vector<Value> NormalizeNode(ComputationGraph& graph, const ComputationNode& node,
                                 std::span<const Value> inputs) {
  const Op* op = node.op;
  const Shape& shape = node.types[0].shape;
  auto empty = [](Value x) { return x.shape().elements() == 0; };
  if (op == &kAttentionGradientOp && empty(inputs[0])) {
    std::vector<Value> zeros;
    for (const TensorType& type : node.types) zeros.push_back(Zeros(graph, type.shape));
    return zeros;
  }
  if (shape.elements() == 0) return {};
  bool contraction = op == &kMatMulOp || op == &kConv2dOp;
  if (contraction && inputs.size() == 3) {
    Value y = graph.EmitOne(*op, inputs.first(2), node.attrs);
    ComputationNode product = graph.node(y.id.node);  // a copy: the graph grows
    auto unbiased = NormalizeNode(graph, product, inputs.first(2));
    if (!unbiased.empty()) y = unbiased[0];
    Value bias = op == &kMatMulOp ? inputs[2] : Reshape(inputs[2], {inputs[2].dim(0), 1, 1});
    return {y + bias};
  }
  if (op == &kMatMulOp || op == &kConv2dOp || op == &kConv2dInputGradientOp ||
      op == &kConv2dWeightGradientOp || op->kind == OpKind::kReduce || op == &kPadOp ||
      op == &kScatterAddOp) {
    // Sums over nothing.
    bool nothing = empty(inputs[0]) || (inputs.size() == 2 && empty(inputs[1]));
    if (nothing) return {Zeros(graph, shape)};
  }
  if (op == &kConcatOp) {
    std::vector<Value> parts;
    for (const Value& part : inputs) {
      if (!empty(part)) parts.push_back(part);
    }
    if (parts.size() == 1) return {parts[0]};
    if (parts.size() < inputs.size()) return {graph.EmitOne(kConcatOp, parts, node.attrs)};
    return {};
  }
  if (op == &kConv2dOp) {
    return {graph.EmitOne(*op, {PadImage(inputs[0], node.attrs), inputs[1]}, Unpadded(node.attrs))};
  }
  if (op == &kConv2dWeightGradientOp) {
    return {graph.EmitOne(*op, {PadImage(inputs[0], node.attrs), inputs[1]}, Unpadded(node.attrs))};
  }
  if (op == &kConv2dInputGradientOp) {
    return {graph.EmitOne(kCorrelateOp, {PadGradient(node, inputs[0], inputs[1]), inputs[1]})};
  }
  if (op == &kPadOp) {
    auto zero = [](int64_t n) { return n == 0; };
    const auto &low = node.attrs.Ints("low"), &high = node.attrs.Ints("high");
    if (std::all_of(low.begin(), low.end(), zero) && std::all_of(high.begin(), high.end(), zero)) {
      return {inputs[0]};
    }
  }
  return {};
}

}  // namespace

const Op kCorrelateOp{
    .name = "Correlate",
    .kind = OpKind::kCall,
    .min_arity = 2,
    .max_arity = 2,
    .doc =
        "y[b, c, i, j] = sum over o, p, q of x[b, o, i + p, j + q] w[o, c, KH - 1 - p, KW - 1 - q]",
    .source = "",
    .infer = InferCorrelate,
    .run = [](const RunContext& c) { RunCorrelate<float>(c, Conv2dForward); },
    .reference =
        [](const RunContext& c) { RunCorrelate<double>(c, reference::Conv2dForward<double>); }};

ComputationGraph Normalize(const ComputationGraph& graph, const LowerOptions& options) {
  ComputationGraph current = Clone(graph);
  auto decomposable = [&] {
    return std::any_of(current.nodes().begin(), current.nodes().end(),
                       [](const ComputationNode& node) { return !HasKernel(node); });
  };
  for (int round = 0; decomposable(); ++round) {
    Check<InternalError>(round < 8, "lowering: decompositions do not end");
    current = Rebuild(current, DecomposeNode);
  }
  current = Rebuild(Optimize(current), EnlargedNode);
  winograd_tiles.clear();
  const std::map<int32_t, int> tiles =
      options.forced_tile > 0 ? ForceWinograd(current, options.forced_tile)
                              : ChooseWinograd(current, options.winograd_bytes, options.tuner);
  winograd_tiles.clear();  // measuring lowers other graphs
  for (auto [node, tile] : tiles) winograd_tiles[&current.node(node)] = tile;
  current = Rebuild(current, WinogradNode);
  winograd_tiles.clear();
  return Rebuild(current, NormalizeNode);
}

}  // namespace calotype::jit
