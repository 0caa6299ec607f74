#include "graph/passes.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <set>
#include <sstream>
#include <string>

#include "core/debug.h"
#include "core/error.h"
#include "graph/functions.h"
#include "graph/op.h"
#include "graph/text.h"

namespace calotype {

namespace {

const ComputationNode& Producer(const Value& x) { return x.graph->node(x.id.node); }
bool Is(const Value& x, std::string_view op) { return Producer(x).op->name == op; }
Value InputOf(const Value& x) { return {x.graph, Producer(x).inputs[0]}; }

// True for a constant all of whose elements are `value`, with the same sign of zero.
bool IsFilledWith(Value x, float value) {
  if (Is(x, "Broadcast")) x = InputOf(x);
  const Tensor& constant = Producer(x).constant;
  if (!constant.defined() || constant.dtype() != DType::kF32) return false;
  return std::all_of(constant.values().begin(), constant.values().end(), [&](float element) {
    return element == value && std::signbit(element) == std::signbit(value);
  });
}

std::vector<Value> FoldNode(ComputationGraph& target, const ComputationNode& node,
                            std::span<const Value> inputs) {
  constexpr int64_t kLimit = 65536;
  std::vector<Tensor> operands;
  for (const Value& input : inputs) {
    if (!Producer(input).constant.defined()) return {};
    operands.push_back(Producer(input).constant);
  }
  if (operands.empty()) return {};
  std::vector<Tensor> results;
  for (const TensorType& type : node.types) {
    if (type.shape.elements() > kLimit) return {};
    results.emplace_back(type);
  }
  node.op->run({operands, results, node.attrs, node.op});
  std::vector<Value> values;
  for (const Tensor& result : results) values.push_back(target.Constant(result));
  return values;
}

std::vector<Value> SimplifyElementwise(ComputationGraph& target, const ComputationNode& node,
                                       std::span<const Value> inputs) {
  std::string_view name = node.op->name;
  const Shape& shape = node.types[0].shape;
  auto same = [&](const Value& x) { return x.shape() == shape; };
  if (name == "Mul") {
    if (IsFilledWith(inputs[1], 1) && same(inputs[0])) return {inputs[0]};
    if (IsFilledWith(inputs[0], 1) && same(inputs[1])) return {inputs[1]};
  }
  if (name == "Div" && IsFilledWith(inputs[1], 1) && same(inputs[0])) return {inputs[0]};
  if (name == "Sub" && IsFilledWith(inputs[1], 0) && same(inputs[0])) return {inputs[0]};
  if (name == "Neg" && Is(inputs[0], "Neg")) return {InputOf(inputs[0])};

  // A Broadcast operand is read unbroadcast as long as the others still span the whole shape.
  std::vector<Value> direct(inputs.begin(), inputs.end());
  bool changed = false;
  for (size_t k = 0; k < direct.size(); ++k) {
    if (!Is(direct[k], "Broadcast")) continue;
    Value original = direct[k];
    direct[k] = InputOf(original);
    Shape spanned;
    for (const Value& x : direct) spanned = BroadcastShapes(spanned, x.shape());
    if (spanned == shape)
      changed = true;
    else
      direct[k] = original;
  }
  if (!changed) return {};
  return target.Emit(*node.op, direct, node.attrs);
}

std::vector<Value> SimplifyNode(ComputationGraph& target, const ComputationNode& node,
                                std::span<const Value> inputs) {
  if (node.op->kind == OpKind::kElementwise) return SimplifyElementwise(target, node, inputs);
  std::string_view name = node.op->name;
  const Value& x = inputs[0];
  const Shape& shape = node.types[0].shape;
  if (name == "Reshape") {
    if (x.shape() == shape) return {x};
    if (Is(x, "Reshape")) return {Reshape(InputOf(x), shape)};
  }
  if (name == "Broadcast") {
    if (x.shape() == shape) return {x};
    if (Is(x, "Broadcast")) return {Broadcast(InputOf(x), shape)};
  }
  if (name == "Permute") {
    std::vector<int64_t> axes = node.attrs.Ints("axes");
    if (Is(x, "Permute")) {
      const auto& inner = Producer(x).attrs.Ints("axes");
      for (int64_t& axis : axes) axis = inner[axis];
      return {Permute(InputOf(x), axes)};
    }
    // Moving axes of size 1 does not move elements.
    std::vector<int64_t> real;
    for (int64_t axis : axes) {
      if (x.dim(static_cast<int>(axis)) != 1) real.push_back(axis);
    }
    if (std::is_sorted(real.begin(), real.end())) return {Reshape(x, shape)};
  }
  if (name == "Slice" && x.shape() == shape) return {x};
  if (name == "Sum" || name == "Max") {
    const auto& axes = node.attrs.Ints("axes");
    if (std::all_of(axes.begin(), axes.end(),
                    [&](int64_t axis) { return x.dim(static_cast<int>(axis)) == 1; })) {
      return {Reshape(x, shape)};
    }
  }
  return {};
}

std::vector<Value> DecomposeNode(ComputationGraph& target, const ComputationNode& node,
                                 std::span<const Value> inputs) {
  if (node.op->decompose == nullptr) return {};
  return node.op->decompose(target, node, inputs);
}

const std::set<std::string, std::less<>>& SwitchedOff() {
  static const auto names = [] {
    std::set<std::string, std::less<>> result;
    const char* text = std::getenv("CALOTYPE_PASSES");
    std::istringstream list(text ? text : "");
    for (std::string item; std::getline(list, item, ',');) {
      bool known = item == "-fuse";
      for (const Pass& pass : StandardPasses()) known |= item == fmt::format("-{}", pass.name);
      Check(known, "CALOTYPE_PASSES: \"{}\" is unknown; write -simplify, -fold or -fuse", item);
      result.insert(item.substr(1));
    }
    return result;
  }();
  return names;
}

}  // namespace

ComputationGraph Fold(const ComputationGraph& graph) { return Rebuild(graph, FoldNode); }
ComputationGraph Simplify(const ComputationGraph& graph) { return Rebuild(graph, SimplifyNode); }
ComputationGraph Decompose(const ComputationGraph& graph) { return Rebuild(graph, DecomposeNode); }

std::span<const Pass> StandardPasses() {
  static constexpr Pass kPasses[] = {{"simplify", Simplify}, {"fold", Fold}};
  return kPasses;
}

bool PassEnabled(std::string_view name) { return !SwitchedOff().contains(name); }

ComputationGraph Optimize(const ComputationGraph& graph) {
  ComputationGraph current = Clone(graph);
  const bool log = DebugEnabled("pass"), dump = !DumpFolder().empty();
  std::string before = log || dump ? ToText(current, 16) : "";
  if (dump) Dump("export.ir", before);
  for (const Pass& pass : StandardPasses()) {
    if (!PassEnabled(pass.name)) continue;
    auto start = std::chrono::steady_clock::now();
    size_t nodes = current.nodes().size();
    current = pass.run(current);
    Verify(current);
    if (!log && !dump) continue;
    std::string after = ToText(current, 16);
    std::chrono::duration<double, std::milli> ms = std::chrono::steady_clock::now() - start;
    if (log) {
      DebugLine(fmt::format("pass {}: {} -> {} nodes, {:.2f} ms{}", pass.name, nodes,
                            current.nodes().size(), ms.count(),
                            after == before ? " (unchanged)" : ""));
    }
    if (dump && after != before) Dump(fmt::format("{}.ir", pass.name), after);
    before = std::move(after);
  }
  return current;
}

}  // namespace calotype
