// Reverse-mode differentiation: walks the nodes backwards and emits each op's gradient rule.
#include <map>
#include <memory>
#include <vector>

#include "core/error.h"
#include "graph/functions.h"
#include "graph/op.h"

namespace calotype {

namespace {

// If x and y are Pads along one axis whose insides lie side by side and fill it (the gradients of
// two slices that split a value), their sum is a concatenation.
Value SumOfPads(const Value& x, const Value& y) {
  auto inside = [](const Value& v) -> const ComputationNode* {
    const ComputationNode& node = v.graph->node(v.id.node);
    return node.op->name == "Pad" ? &node : nullptr;
  };
  const ComputationNode *a = inside(x), *b = inside(y);
  if (a == nullptr || b == nullptr) return {};
  int split = -1;
  for (int axis = 0; axis < x.rank(); ++axis) {
    auto zero = [&](const ComputationNode& node) {
      return node.attrs.Ints("low")[axis] == 0 && node.attrs.Ints("high")[axis] == 0;
    };
    if (zero(*a) && zero(*b)) continue;
    if (split >= 0) return {};
    split = axis;
  }
  auto first_then = [&](const ComputationNode& first, const ComputationNode& second) {
    return first.attrs.Ints("low")[split] == 0 && second.attrs.Ints("high")[split] == 0 &&
           second.attrs.Ints("low")[split] + first.attrs.Ints("high")[split] == x.dim(split);
  };
  Value ax{x.graph, a->inputs[0]}, by{y.graph, b->inputs[0]};
  if (first_then(*a, *b)) return Concat({ax, by}, split);
  if (first_then(*b, *a)) return Concat({by, ax}, split);
  return {};
}

Value SumOf(const Value& x, const Value& y) {
  Value joined = SumOfPads(x, y);
  return joined.defined() ? joined : Add(x, y);
}

// The values that gradient rules read. Those of a segment are computed again behind barriers, when
// the walk first reaches the segment, so that they stand behind the gradients of what follows.
class Recomputation {
 public:
  explicit Recomputation(ComputationGraph& graph) : graph_(graph), again_(graph.nodes().size()) {
    for (size_t i = 0; i < again_.size(); ++i) {
      const int32_t segment = graph.node(static_cast<int32_t>(i)).segment;
      if (segment >= 0) segments_[segment].push_back(static_cast<int32_t>(i));
    }
  }

  // To be called for each node before its rule.
  void Reach(int32_t node) {
    auto segment = segments_.find(graph_.node(node).segment);
    if (segment == segments_.end()) return;
    const std::vector<int32_t> nodes = std::move(segment->second);
    segments_.erase(segment);
    for (int32_t index : nodes) {
      const ComputationNode original = graph_.node(index);  // the vector may grow
      if (original.op->kind == OpKind::kLeaf) continue;
      std::vector<Value> inputs;
      for (ValueId id : original.inputs) inputs.push_back(Read(original, id));
      graph_.SetLabel(graph_.label_of(index));
      again_[index] = graph_.Emit(*original.op, inputs, original.attrs);
    }
  }

  // Input `id` of `reader`, and output `id` itself.
  Value Read(const ComputationNode& reader, ValueId id) const {
    const Value value = Result(id);
    const ComputationNode& node = graph_.node(id.node);
    const bool outside = reader.segment >= 0 && node.segment != reader.segment;
    // What depends on parameters alone is computed once in any case.
    const bool constant = node.op == &kParameterOp || node.op == &kConstantOp;
    return outside && !constant ? Barrier({&graph_, id}) : value;
  }
  Value Result(ValueId id) const {
    const std::vector<Value>& again = again_[id.node];
    return again.empty() ? Value{&graph_, id} : again[id.output];
  }

 private:
  ComputationGraph& graph_;
  std::map<int32_t, std::vector<int32_t>> segments_;  // those not reached yet
  std::vector<std::vector<Value>> again_;             // by first node
};

}  // namespace

std::vector<Value> Gradients(std::span<const Value> outputs, std::span<const Value> doutputs,
                             std::span<const Value> wrt) {
  Check<InternalError>(outputs.size() == doutputs.size(), "gradients: {} outputs, {} cotangents",
                       outputs.size(), doutputs.size());
  if (outputs.empty() || wrt.empty()) return {};
  ComputationGraph& graph = *outputs[0].graph;
  const size_t count = graph.nodes().size();

  // Nodes on a path from a wrt to the outputs; others need no gradient.
  std::vector<bool> depends(count, false);
  for (const Value& value : wrt) depends[value.id.node] = true;
  for (size_t i = 0; i < count; ++i) {
    for (ValueId id : graph.node(static_cast<int32_t>(i)).inputs) {
      if (depends[id.node]) depends[i] = true;
    }
  }

  Recomputation recomputation(graph);
  std::vector<std::vector<Value>> cotangents(count);
  auto accumulate = [&](ValueId id, Value value) {
    auto& slots = cotangents[id.node];
    if (slots.empty()) slots.resize(graph.node(id.node).types.size());
    Value& slot = slots[id.output];
    slot = slot.defined() ? SumOf(slot, value) : value;
  };
  for (size_t i = 0; i < outputs.size(); ++i) {
    Value dy = doutputs[i];
    if (!dy.defined()) {
      Check<ShapeError>(outputs[i].shape().elements() == 1,
                        "gradients: output of shape {} needs a cotangent", outputs[i].shape());
      dy = Broadcast(graph.Constant(1.0f), outputs[i].shape());
    }
    Check<ShapeError>(dy.shape() == outputs[i].shape(), "gradients: cotangent {} for output {}",
                      dy.shape(), outputs[i].shape());
    if (depends[outputs[i].id.node]) accumulate(outputs[i].id, dy);
  }

  for (size_t i = count; i-- > 0;) {
    if (!depends[i] || cotangents[i].empty()) continue;
    const ComputationNode node = graph.node(static_cast<int32_t>(i));  // the vector may grow
    if (node.op->kind == OpKind::kLeaf) continue;
    bool any = false;
    const size_t arity = node.inputs.size();
    auto needs = std::make_unique<bool[]>(arity);
    for (size_t k = 0; k < arity; ++k) any |= needs[k] = depends[node.inputs[k].node];
    if (!any) continue;
    const std::string label = graph.label_of(static_cast<int32_t>(i));
    Check<UnsupportedError>(node.op->gradient != nullptr,
                            "gradients: op {} at \"{}\" has no gradient", node.op->name, label);
    recomputation.Reach(static_cast<int32_t>(i));
    std::vector<Value> inputs, results;
    for (ValueId id : node.inputs) inputs.push_back(recomputation.Read(node, id));
    for (size_t o = 0; o < node.types.size(); ++o) {
      results.push_back(recomputation.Result({static_cast<int32_t>(i), static_cast<int32_t>(o)}));
    }
    graph.SetLabel(label);
    std::vector<Value> dinputs = node.op->gradient(
        {graph, node, inputs, results, cotangents[i], std::span<const bool>(needs.get(), arity)});
    Check<InternalError>(dinputs.size() == arity, "gradients: {} gave {} gradients for {} inputs",
                         node.op->name, dinputs.size(), arity);
    for (size_t k = 0; k < arity; ++k) {
      if (!needs[k] || !dinputs[k].defined()) continue;
      Check<InternalError>(dinputs[k].shape() == inputs[k].shape(),
                           "gradients: {} gave {} for input {} of shape {}", node.op->name,
                           dinputs[k].shape(), k, inputs[k].shape());
      accumulate(node.inputs[k], dinputs[k]);
    }
  }
  graph.SetLabel("");

  std::vector<Value> result;
  for (const Value& value : wrt) {
    auto& slots = cotangents[value.id.node];
    Value dx = slots.empty() ? Value{} : slots[value.id.output];
    result.push_back(dx.defined() ? dx : Broadcast(graph.Constant(0.0f), value.shape()));
  }
  return result;
}

}  // namespace calotype
