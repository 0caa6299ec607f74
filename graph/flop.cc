#include "graph/flop.h"

#include <fmt/format.h>

#include <algorithm>

#include "graph/op.h"

namespace calotype {

namespace {

double Elements(const TensorType& type) { return static_cast<double>(type.shape.elements()); }

// The share of (query, key) pairs of an attention that its causal mask leaves.
double VisibleShare(int64_t queries, int64_t keys) {
  double visible = 0;
  for (int64_t i = 0; i < queries; ++i) visible += static_cast<double>(std::min(i + 1, keys));
  return visible / (static_cast<double>(queries) * static_cast<double>(keys));
}

double NodeFlop(const ComputationGraph& graph, const ComputationNode& node) {
  auto input = [&](size_t i) -> const TensorType& { return graph.type(node.inputs[i]); };
  std::string_view op = node.op->name;
  if (Elements(node.types[0]) == 0) return 0;
  if (op == "MatMul") {
    const Shape& a = input(0).shape;
    return 2 * Elements(node.types[0]) *
           static_cast<double>(a[node.attrs.Int("transpose_a") ? -2 : -1]);
  }
  // All three do one multiply-add for each element of the convolution's result and each weight of
  // the output channel it belongs to.
  auto convolution = [](const TensorType& result, const TensorType& weight) {
    return 2 * Elements(result) * Elements(weight) / static_cast<double>(weight.shape[0]);
  };
  if (op == "Conv2d") return convolution(node.types[0], input(1));
  if (op == "Conv2dInputGradient") return convolution(input(0), input(1));
  if (op == "Conv2dWeightGradient") return convolution(input(1), node.types[0]);
  if (!node.op->decompose) return 0;

  // A fused op costs what its definition costs.
  ComputationGraph definition;
  std::vector<Value> inputs;
  for (size_t i = 0; i < node.inputs.size(); ++i) {
    inputs.push_back(definition.Input(fmt::format("x{}", i), input(i)));
  }
  ComputationNode copy = node;
  bool causal = op.starts_with("Attention") && node.attrs.Int("causal");
  if (causal) copy.attrs.Set("causal", int64_t{0});
  for (Value y : node.op->decompose(definition, copy, inputs)) {
    if (y.defined()) definition.Output(fmt::format("y{}", definition.outputs().size()), y);
  }
  double flop = CountFlop(definition);
  return causal ? flop * VisibleShare(input(0).shape[1], input(1).shape[1]) : flop;
}

}  // namespace

double CountFlop(const ComputationGraph& graph) {
  ComputationGraph live = Clone(graph);  // without dead code
  double flop = 0;
  for (const ComputationNode& node : live.nodes()) flop += NodeFlop(live, node);
  return flop;
}

}  // namespace calotype
