#include "layers/layer_execution.h"

#include <algorithm>

#include "graph/functions.h"
#include "graph/op.h"

namespace calotype {

namespace {

// Copies nodes of one graph into another, on demand.
class Copier {
 public:
  Copier(const ComputationGraph& from, ComputationGraph& to)
      : from_(from), to_(to), map_(from.nodes().size()) {}

  void Bind(ValueId id, Value value) {
    auto& outputs = map_[id.node];
    outputs.resize(from_.node(id.node).types.size());
    outputs[id.output] = value;
  }
  bool Has(ValueId id) const {
    const auto& outputs = map_[id.node];
    return !outputs.empty() && outputs[id.output].defined();
  }
  Value Get(ValueId id) const { return map_[id.node][id.output]; }

  // Copies node `index`; its inputs must have been copied or bound.
  void Copy(int32_t index) {
    const ComputationNode& node = from_.node(index);
    if (node.parameter) {
      Bind({index, 0}, to_.ParameterLeaf(node.parameter));
    } else if (node.op == &kConstantOp) {
      Bind({index, 0}, to_.Constant(node.constant));
    } else {
      std::vector<Value> inputs;
      for (ValueId id : node.inputs) inputs.push_back(Get(id));
      to_.SetLabel(from_.label_of(index));
      std::vector<Value> outputs = to_.Emit(*node.op, inputs, node.attrs);
      for (size_t i = 0; i < outputs.size(); ++i)
        Bind({index, static_cast<int32_t>(i)}, outputs[i]);
    }
  }

 private:
  const ComputationGraph& from_;
  ComputationGraph& to_;
  std::vector<std::vector<Value>> map_;
};

bool IsOperation(const ComputationNode& node) { return node.op->kind != OpKind::kLeaf; }

}  // namespace

SplitGraph Split(const ComputationGraph& joint, std::span<const ValueId> outputs,
                 std::span<const ValueId> output_gradients, std::span<const ValueId> gradients) {
  SplitGraph split;
  int32_t count = static_cast<int32_t>(joint.nodes().size());
  std::vector<char> forward(count), backward(count);

  // Ancestors of the outputs belong to the forward part; nodes are in topological order.
  for (ValueId id : outputs) forward[id.node] = 1;
  for (int32_t i = count - 1; i >= 0; --i) {
    if (!forward[i]) continue;
    for (ValueId id : joint.node(i).inputs) forward[id.node] = 1;
  }
  // Whatever else the gradients need belongs to the backward part; an edge from there to an
  // operation of the forward part is a saved value. A reshape or broadcast of the forward part
  // costs nothing to repeat, while keeping its result may cost memory: its input is saved instead.
  std::vector<ValueId> saved;
  auto cheap = [&](const ComputationNode& node) {
    return node.op->name == "Reshape" || node.op->name == "Broadcast";
  };
  auto need = [&](ValueId id) {
    const ComputationNode& node = joint.node(id.node);
    if (IsOperation(node) && forward[id.node] && !cheap(node)) {
      if (std::ranges::find(saved, id) == saved.end()) saved.push_back(id);
    } else {
      backward[id.node] = 1;
    }
  };
  for (ValueId id : gradients) need(id);
  for (int32_t i = count - 1; i >= 0; --i) {
    if (!backward[i]) continue;
    for (ValueId id : joint.node(i).inputs) need(id);
  }

  std::vector<int32_t> inputs;  // the joint graph's inputs without the output gradients
  for (int32_t node : joint.inputs()) {
    bool is_gradient =
        std::ranges::find(output_gradients, ValueId{node, 0}) != output_gradients.end();
    if (!is_gradient) inputs.push_back(node);
  }

  Copier to_forward(joint, split.forward);
  for (int32_t node : inputs) {
    to_forward.Bind({node, 0},
                    split.forward.Input(joint.node(node).name, joint.node(node).types[0]));
  }
  for (int32_t i = 0; i < count; ++i) {
    if (forward[i] && !to_forward.Has({i, 0})) to_forward.Copy(i);
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    split.forward.Output(fmt::format("out.{}", i), to_forward.Get(outputs[i]));
  }
  for (size_t i = 0; i < saved.size(); ++i) {
    split.forward.Output(fmt::format("saved.{}", i), to_forward.Get(saved[i]));
  }
  split.saved = saved.size();

  Copier to_backward(joint, split.backward);
  for (ValueId id : output_gradients) {
    to_backward.Bind(id, split.backward.Input(joint.node(id.node).name, joint.type(id)));
  }
  for (size_t i = 0; i < saved.size(); ++i) {
    to_backward.Bind(saved[i],
                     split.backward.Input(fmt::format("saved.{}", i), joint.type(saved[i])));
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!backward[inputs[i]]) continue;
    const ComputationNode& node = joint.node(inputs[i]);
    to_backward.Bind({inputs[i], 0}, split.backward.Input(node.name, node.types[0]));
    split.saved_inputs.push_back(i);
  }
  for (int32_t i = 0; i < count; ++i) {
    if (backward[i] && !to_backward.Has({i, 0})) to_backward.Copy(i);
  }
  for (size_t i = 0; i < gradients.size(); ++i) {
    split.backward.Output(fmt::format("gradient.{}", i), to_backward.Get(gradients[i]));
  }
  return split;
}

std::shared_ptr<LayerExecution::Specialization> LayerExecution::Prepare(
    Layer& layer, std::span<const Tensor> inputs) {
  std::vector<std::optional<TensorType>> types;
  for (const Tensor& input : inputs) {
    types.push_back(input.defined() ? std::optional(input.type()) : std::nullopt);
  }
  uint64_t state = layer.StateKey();
  for (auto it = cache_.begin(); it != cache_.end(); ++it) {
    if ((*it)->types == types && (*it)->state == state) {
      cache_.splice(cache_.begin(), cache_, it);
      return cache_.front();
    }
  }

  auto result = std::make_shared<Specialization>();
  result->types = types;
  result->state = state;
  ComputationGraph joint;
  std::vector<Value> values;
  for (size_t i = 0; i < types.size(); ++i) {
    values.push_back(types[i] ? joint.Input(fmt::format("input.{}", i), *types[i]) : Value{});
  }
  std::vector<Value> outputs = layer.ExportComputationGraph(joint, values);
  std::vector<ValueId> output_ids, output_gradient_ids, gradient_ids;
  for (Value output : outputs) {
    output_ids.push_back(output.id);
    result->outputs.push_back(output.type());
  }
  if (layer.training() && layer.SupportsTraining()) {
    std::vector<Value> output_gradients, wrt;
    for (size_t i = 0; i < outputs.size(); ++i) {
      output_gradients.push_back(
          joint.Input(fmt::format("output_gradient.{}", i), outputs[i].type()));
      output_gradient_ids.push_back(output_gradients.back().id);
    }
    for (size_t i = 0; i < values.size(); ++i) {
      if (!types[i] || types[i]->dtype != DType::kF32) continue;
      result->differentiable.push_back(i);
      wrt.push_back(values[i]);
    }
    for (const ParameterPtr& parameter : layer.NamedParameters()) {
      if (!parameter->trainable()) continue;
      result->parameters.push_back(parameter);
      wrt.push_back(joint.ParameterLeaf(parameter));
    }
    for (Value gradient : Gradients(outputs, output_gradients, wrt)) {
      gradient_ids.push_back(gradient.id);
    }
  }
  result->graphs = Split(joint, output_ids, output_gradient_ids, gradient_ids);
  result->forward = std::make_unique<Interpreter>(result->graphs.forward);
  result->backward = std::make_unique<Interpreter>(result->graphs.backward);
  cache_.push_front(result);
  if (cache_.size() > kMaxGraphs) cache_.pop_back();
  return result;
}

uint64_t LayerExecution::Versions(const Specialization& specialization) {
  uint64_t sum = 0;
  for (const ParameterPtr& parameter : specialization.graphs.forward.Parameters()) {
    sum += parameter->version();
  }
  return sum;
}

int64_t LayerExecution::kept_bytes() const {
  int64_t bytes = 0;
  if (kept_) {
    for (const Tensor& tensor : kept_->saved) bytes += tensor.bytes();
  }
  return bytes;
}

std::vector<Tensor> LayerExecution::Forward(Layer& layer, std::span<const Tensor> inputs) {
  kept_.reset();
  std::shared_ptr<Specialization> specialization = Prepare(layer, inputs);
  std::vector<Tensor> present;
  for (const Tensor& input : inputs) {
    if (input.defined()) present.push_back(input);
  }
  std::vector<Tensor> results = specialization->forward->Run(present);
  size_t outputs = specialization->outputs.size();
  if (layer.training() && layer.SupportsTraining()) {
    Kept kept{specialization, inputs.size(), Versions(*specialization), {}};
    kept.saved.assign(results.begin() + static_cast<std::ptrdiff_t>(outputs), results.end());
    for (size_t input : specialization->graphs.saved_inputs) kept.saved.push_back(present[input]);
    kept_ = std::move(kept);
  }
  results.resize(outputs);
  return results;
}

std::vector<Tensor> LayerExecution::Backward(Layer& layer,
                                             std::span<const Tensor> output_gradients) {
  Check(kept_.has_value(), "{}: Backward needs a Forward in training mode before it",
        layer.Describe());
  const Specialization& specialization = *kept_->specialization;
  Check(Versions(specialization) == kept_->versions,
        "{}: a parameter was changed between Forward and Backward; run Forward again",
        layer.Describe());
  Check<ShapeError>(output_gradients.size() <= specialization.outputs.size(),
                    "{}: {} output gradients for {} outputs", layer.Describe(),
                    output_gradients.size(), specialization.outputs.size());
  std::vector<Tensor> inputs;
  for (size_t i = 0; i < specialization.outputs.size(); ++i) {
    const TensorType& type = specialization.outputs[i];
    if (i < output_gradients.size() && output_gradients[i].defined()) {
      Check<ShapeError>(output_gradients[i].type() == type,
                        "{}: the gradient of output {} is {}, the output is {}", layer.Describe(),
                        i, output_gradients[i].type(), type);
      inputs.push_back(output_gradients[i]);
    } else {
      inputs.push_back(Tensor::Zeros(type.shape, type.dtype));
    }
  }
  inputs.insert(inputs.end(), kept_->saved.begin(), kept_->saved.end());
  std::vector<Tensor> gradients = specialization.backward->Run(inputs);

  std::vector<Tensor> result(kept_->inputs);
  size_t next = 0;
  for (size_t input : specialization.differentiable) result[input] = gradients[next++];
  for (const ParameterPtr& parameter : specialization.parameters) {
    parameter->gradient = gradients[next++];
  }
  return result;
}

}  // namespace calotype
