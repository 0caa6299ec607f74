#include "graph/interpreter.h"

#include <algorithm>

#include "core/error.h"
#include "graph/op.h"

namespace calotype {

namespace {

void CheckInputs(const ComputationGraph& graph, std::span<const Tensor> inputs, bool f64) {
  Check<ShapeError>(inputs.size() == graph.inputs().size(), "run: {} inputs given, {} declared",
                    inputs.size(), graph.inputs().size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    const ComputationNode& leaf = graph.node(graph.inputs()[i]);
    const TensorType& type = leaf.types[0];
    bool dtype_fits = inputs[i].dtype() == type.dtype ||
                      (f64 && type.dtype == DType::kF32 && inputs[i].dtype() == DType::kF64);
    Check<ShapeError>(inputs[i].defined() && dtype_fits && inputs[i].shape() == type.shape,
                      "run: input \"{}\" is {}, expects {}", leaf.name, inputs[i].type(), type);
  }
}

Tensor ToReference(const Tensor& x) { return x.dtype() == DType::kF32 ? x.To(DType::kF64) : x; }

TensorType ReferenceType(const TensorType& type) {
  return {type.dtype == DType::kF32 ? DType::kF64 : type.dtype, type.shape};
}

// Runs one node in float64, by its reference or by its decomposition.
std::vector<Tensor> RunNodeReference(const ComputationNode& node, std::span<const Tensor> inputs) {
  if (node.op->reference != nullptr) {
    std::vector<Tensor> outputs;
    for (const TensorType& type : node.types) outputs.emplace_back(ReferenceType(type));
    node.op->reference({inputs, outputs, node.attrs, node.op});
    return outputs;
  }
  Check<InternalError>(node.op->decompose != nullptr, "{}: neither a reference nor a decomposition",
                       node.op->name);
  ComputationGraph graph;
  std::vector<Value> values;
  for (size_t i = 0; i < inputs.size(); ++i) {
    TensorType type = inputs[i].type();
    if (type.dtype == DType::kF64) type.dtype = DType::kF32;
    values.push_back(graph.Input(fmt::format("x{}", i), type));
  }
  std::vector<Value> outputs = node.op->decompose(graph, node, values);
  std::vector<bool> present;
  for (size_t o = 0; o < outputs.size(); ++o) {
    present.push_back(outputs[o].defined());
    if (outputs[o].defined()) graph.Output(fmt::format("y{}", o), outputs[o]);
  }
  std::vector<Tensor> computed = Interpreter(graph).RunReference(inputs);
  std::vector<Tensor> result;
  size_t next = 0;
  for (bool is_present : present) result.push_back(is_present ? computed[next++] : Tensor());
  return result;
}

}  // namespace

Interpreter::Interpreter(const ComputationGraph& graph) : graph_(graph) {
  const auto& nodes = graph.nodes();
  free_after_.resize(nodes.size());
  std::vector<std::vector<int32_t>> last_use(nodes.size());
  for (size_t i = 0; i < nodes.size(); ++i) last_use[i].assign(nodes[i].types.size(), -1);
  needed_.assign(nodes.size(), false);
  constexpr int32_t kForever = INT32_MAX;
  auto keep = [&](ValueId id) {
    last_use[id.node][id.output] = kForever;
    needed_[id.node] = true;
  };
  for (const GraphOutput& output : graph.outputs()) keep(output.value);
  for (const GraphUpdate& update : graph.updates()) keep(update.source);
  for (size_t i = nodes.size(); i-- > 0;) {
    if (!needed_[i]) continue;
    for (ValueId id : nodes[i].inputs) {
      needed_[id.node] = true;
      int32_t& last = last_use[id.node][id.output];
      if (last < 0)
        last = static_cast<int32_t>(i);  // the first met going backwards is the last use
    }
  }
  for (size_t i = 0; i < nodes.size(); ++i) {
    for (size_t o = 0; o < last_use[i].size(); ++o) {
      int32_t last = last_use[i][o];
      ValueId id{static_cast<int32_t>(i), static_cast<int32_t>(o)};
      if (last >= 0 && last != kForever)
        free_after_[last].push_back(id);
      else if (last < 0 && needed_[i])
        free_after_[i].push_back(id);  // an output that nobody reads
    }
  }
}

std::vector<Tensor> Interpreter::Run(std::span<const Tensor> inputs) {
  CheckInputs(graph_, inputs, false);
  const auto& nodes = graph_.nodes();
  std::vector<std::vector<Tensor>> values(nodes.size());
  for (size_t i = 0; i < inputs.size(); ++i) values[graph_.inputs()[i]] = {inputs[i]};
  std::vector<Tensor> operands;
  for (size_t i = 0; i < nodes.size(); ++i) {
    const ComputationNode& node = nodes[i];
    if (!needed_[i] || node.op == &kInputOp) continue;
    if (node.op == &kParameterOp) {
      values[i] = {node.parameter->value()};
    } else if (node.op == &kConstantOp) {
      values[i] = {node.constant};
    } else {
      operands.clear();
      for (ValueId id : node.inputs) operands.push_back(values[id.node][id.output]);
      if (node.op->shares_storage) {
        values[i] = {operands[0].Reshape(node.types[0].shape)};
      } else {
        values[i].reserve(node.types.size());
        for (const TensorType& type : node.types) values[i].emplace_back(type);
        try {
          node.op->run({operands, values[i], node.attrs, node.op});
        } catch (const ValueError& error) {
          const std::string& label = graph_.label_of(static_cast<int32_t>(i));
          if (label.empty()) throw;
          throw ValueError(fmt::format("{} at {}", error.what(), label));
        }
      }
    }
    for (ValueId id : free_after_[i]) values[id.node][id.output] = Tensor();
  }
  std::vector<Tensor> outputs;
  for (const GraphOutput& output : graph_.outputs()) {
    Tensor value = values[output.value.node][output.value.output];
    // A result never shares storage with a parameter, which the next update would change.
    for (const GraphUpdate& update : graph_.updates()) {
      const Tensor& target = nodes[update.target.node].parameter->value();
      if (value.SharesStorage(target)) value = value.Clone();
    }
    outputs.push_back(std::move(value));
  }
  // All new values exist before the first parameter is written, except those that are themselves
  // parameters or views of them: copy these first.
  std::vector<Tensor> sources;
  for (const GraphUpdate& update : graph_.updates()) {
    Tensor source = values[update.source.node][update.source.output];
    for (const GraphUpdate& other : graph_.updates()) {
      if (source.SharesStorage(nodes[other.target.node].parameter->value())) {
        source = source.Clone();
        break;
      }
    }
    sources.push_back(std::move(source));
  }
  for (size_t u = 0; u < sources.size(); ++u) {
    nodes[graph_.updates()[u].target.node].parameter->Write().CopyFrom(sources[u]);
  }
  return outputs;
}

int64_t Interpreter::PeakBytes() const {
  const auto& nodes = graph_.nodes();
  // Where the storage of a value comes from, and how many values still read it.
  std::vector<std::vector<ValueId>> roots(nodes.size());
  std::vector<std::vector<int>> readers(nodes.size());
  auto bytes = [&](ValueId id) {
    const TensorType& type = graph_.type(id);
    return type.shape.elements() * DTypeSize(type.dtype);
  };
  int64_t live = 0, peak = 0;
  for (size_t i = 0; i < nodes.size(); ++i) {
    const ComputationNode& node = nodes[i];
    readers[i].assign(node.types.size(), 0);
    for (size_t o = 0; o < node.types.size(); ++o) {
      bool shares = node.op->shares_storage;
      ValueId root = shares ? roots[node.inputs[0].node][node.inputs[0].output]
                            : ValueId{static_cast<int32_t>(i), static_cast<int32_t>(o)};
      roots[i].push_back(root);
      if (!needed_[i]) continue;
      ++readers[root.node][root.output];
      if (!shares && node.op->kind != OpKind::kLeaf) live += bytes(root);
    }
    peak = std::max(peak, live);
    for (ValueId id : free_after_[i]) {
      ValueId root = roots[id.node][id.output];
      if (--readers[root.node][root.output] == 0 && nodes[root.node].op->kind != OpKind::kLeaf)
        live -= bytes(root);
    }
  }
  return peak;
}

std::vector<Tensor> Interpreter::RunReference(std::span<const Tensor> inputs,
                                              std::span<const Tensor> parameters) const {
  CheckInputs(graph_, inputs, true);
  const auto& nodes = graph_.nodes();
  std::vector<std::vector<Tensor>> values(nodes.size());
  for (size_t i = 0; i < inputs.size(); ++i) values[graph_.inputs()[i]] = {ToReference(inputs[i])};
  size_t next_parameter = 0;
  for (size_t i = 0; i < nodes.size(); ++i) {
    const ComputationNode& node = nodes[i];
    if (node.op == &kParameterOp) {
      Tensor value = node.parameter->value();
      if (!parameters.empty()) {
        Check<ShapeError>(next_parameter < parameters.size() &&
                              parameters[next_parameter].shape() == value.shape(),
                          "reference: parameter {} is missing or has another shape",
                          node.parameter->name());
        value = parameters[next_parameter++];
      }
      values[i] = {ToReference(value)};
      continue;
    }
    if (!needed_[i] || node.op == &kInputOp) continue;
    if (node.op == &kConstantOp) {
      values[i] = {ToReference(node.constant)};
      continue;
    }
    std::vector<Tensor> operands;
    for (ValueId id : node.inputs) operands.push_back(values[id.node][id.output]);
    values[i] = RunNodeReference(node, operands);
    for (ValueId id : free_after_[i]) values[id.node][id.output] = Tensor();
  }
  std::vector<Tensor> outputs;
  for (const GraphOutput& output : graph_.outputs()) {
    outputs.push_back(values[output.value.node][output.value.output]);
  }
  for (const GraphUpdate& update : graph_.updates()) {
    outputs.push_back(values[update.source.node][update.source.output]);
  }
  return outputs;
}

}  // namespace calotype
