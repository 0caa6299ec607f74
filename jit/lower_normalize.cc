// The graph in the ops that the lowering knows. Padding, spreading with zeros and biases become
// nodes of their own, so that placement and fusion treat them like everything else.
#include <algorithm>

#include "core/contract.h"
#include "core/contract_reference.h"
#include "graph/functions.h"
#include "graph/passes.h"
#include "jit/lower.h"
#include "jit/lower_ops.h"

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

Value InputGradient(ComputationGraph& graph, const ComputationNode& node, Value dy, Value w) {
  const Attrs& attrs = node.attrs;
  int64_t stride = attrs.Int("stride"), ho = dy.dim(2), wo = dy.dim(3);
  if (stride > 1) {
    dy = Reshape(dy, {dy.dim(0), dy.dim(1), ho, 1, wo, 1});
    dy = Pad(dy, {0, 0, 0, 0, 0, 0}, {0, 0, 0, stride - 1, 0, stride - 1});
    dy = Reshape(dy, {dy.dim(0), dy.dim(1), ho * stride, wo * stride});
  }
  int64_t low_h = w.dim(2) - 1 - attrs.Int("top"), low_w = w.dim(3) - 1 - attrs.Int("left");
  dy = PadOrCut(dy, {0, 0, low_h, low_w},
                {0, 0, attrs.Int("height") + w.dim(2) - 1 - low_h - dy.dim(2),
                 attrs.Int("width") + w.dim(3) - 1 - low_w - dy.dim(3)});
  return graph.EmitOne(kCorrelateOp, {dy, w});
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
  if (op == &kConv2dInputGradientOp) return {InputGradient(graph, node, inputs[0], inputs[1])};
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

ComputationGraph Normalize(const ComputationGraph& graph) {
  ComputationGraph current = Clone(graph);
  auto decomposable = [&] {
    return std::any_of(current.nodes().begin(), current.nodes().end(),
                       [](const ComputationNode& node) { return !HasKernel(node); });
  };
  for (int round = 0; decomposable(); ++round) {
    Check<InternalError>(round < 8, "lowering: decompositions do not end");
    current = Rebuild(current, DecomposeNode);
  }
  return Rebuild(Optimize(current), NormalizeNode);
}

}  // namespace calotype::jit
