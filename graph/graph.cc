#include "graph/graph.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "graph/op.h"

namespace calotype {

namespace {

uint64_t Mix(uint64_t hash, uint64_t value) {
  hash ^= value + 0x9e3779b97f4a7c15 + (hash << 6) + (hash >> 2);
  return hash * 0xff51afd7ed558ccd;
}

uint64_t HashOf(const ComputationNode& node) {
  uint64_t hash = Mix(0, reinterpret_cast<uintptr_t>(node.op));
  for (ValueId id : node.inputs) hash = Mix(Mix(hash, id.node), id.output);
  for (const auto& [name, value] : node.attrs.entries()) {
    hash = Mix(hash, std::hash<std::string>()(name));
    if (auto* i = std::get_if<int64_t>(&value)) hash = Mix(hash, *i);
    if (auto* d = std::get_if<double>(&value)) hash = Mix(hash, std::hash<double>()(*d));
    if (auto* v = std::get_if<std::vector<int64_t>>(&value)) {
      for (int64_t x : *v) hash = Mix(hash, x);
    }
    if (auto* s = std::get_if<std::string>(&value)) hash = Mix(hash, std::hash<std::string>()(*s));
  }
  return hash;
}

bool SameOperation(const ComputationNode& a, const ComputationNode& b) {
  return a.op == b.op && a.inputs == b.inputs && a.attrs == b.attrs;
}

// Small constants are equal by value, large ones by storage.
bool SameConstant(const Tensor& a, const Tensor& b) {
  if (!(a.type() == b.type())) return false;
  return a.SharesStorage(b) || (a.bytes() <= 64 && std::memcmp(a.raw(), b.raw(), a.bytes()) == 0);
}

}  // namespace

const TensorType& Value::type() const {
  Check<InternalError>(defined(), "value: access to an undefined value");
  return graph->type(id);
}

ComputationGraph::ComputationGraph() { labels_.push_back(""); }

int32_t ComputationGraph::Add(ComputationNode node) {
  node.label = current_label_;
  node.segment = current_segment_;
  nodes_.push_back(std::move(node));
  return static_cast<int32_t>(nodes_.size()) - 1;
}

Value ComputationGraph::Input(std::string name, const TensorType& type) {
  for (int32_t index : inputs_) {
    Check(nodes_[index].name != name, "graph: input \"{}\" is declared twice", name);
  }
  ComputationNode node{.op = &kInputOp, .types = {type}};
  node.name = std::move(name);
  int32_t index = Add(std::move(node));
  inputs_.push_back(index);
  return {this, {index, 0}};
}

Value ComputationGraph::ParameterLeaf(const ParameterPtr& parameter) {
  uint64_t hash = Mix(1, reinterpret_cast<uintptr_t>(parameter.get()));
  auto [first, last] = by_hash_.equal_range(hash);
  for (auto it = first; it != last; ++it) {
    if (nodes_[it->second].parameter == parameter) return {this, {it->second, 0}};
  }
  Check(parameter->value().defined(),
        "graph: parameter {} has no value; compiled code released it after packing "
        "(release_weights), so load the model again",
        parameter->name());
  ComputationNode node{.op = &kParameterOp, .types = {parameter->value().type()}};
  node.parameter = parameter;
  int32_t index = Add(std::move(node));
  by_hash_.emplace(hash, index);
  return {this, {index, 0}};
}

Value ComputationGraph::Constant(const Tensor& value) {
  Check(value.defined(), "graph: undefined constant");
  uint64_t hash = Mix(2, value.bytes());
  if (value.bytes() <= 64) {
    for (int64_t i = 0; i < value.bytes(); ++i) {
      hash = Mix(hash, static_cast<const uint8_t*>(value.raw())[i]);
    }
  }
  auto [first, last] = by_hash_.equal_range(hash);
  for (auto it = first; it != last; ++it) {
    const ComputationNode& node = nodes_[it->second];
    if (node.op == &kConstantOp && SameConstant(node.constant, value)) {
      return {this, {it->second, 0}};
    }
  }
  ComputationNode node{.op = &kConstantOp, .types = {value.type()}};
  node.constant = value;
  int32_t index = Add(std::move(node));
  by_hash_.emplace(hash, index);
  return {this, {index, 0}};
}

std::vector<Value> ComputationGraph::Emit(const Op& op, std::span<const Value> inputs,
                                          Attrs attrs) {
  std::vector<TensorType> types;
  ComputationNode node{.op = &op, .attrs = std::move(attrs)};
  for (const Value& input : inputs) {
    Check<InternalError>(input.graph == this,
                         "{}: an input belongs to another graph or is undefined", op.name);
    node.inputs.push_back(input.id);
    types.push_back(input.type());
  }
  int arity = static_cast<int>(inputs.size());
  Check<InternalError>(arity >= op.min_arity && (op.max_arity < 0 || arity <= op.max_arity),
                       "{}: {} inputs, expects {} to {}", op.name, arity, op.min_arity,
                       op.max_arity);

  uint64_t hash = HashOf(node);
  auto [first, last] = by_hash_.equal_range(hash);
  int32_t index = -1;
  for (auto it = first; it != last && index < 0; ++it) {
    if (SameOperation(nodes_[it->second], node)) index = it->second;
  }
  if (index < 0) {
    try {
      node.types = op.infer({types, node.attrs, &op});
    } catch (const ShapeError& error) {
      const std::string& label = labels_[current_label_];
      if (label.empty()) throw;
      throw ShapeError(fmt::format("{} at {}", error.what(), label));
    }
    index = Add(std::move(node));
    by_hash_.emplace(hash, index);
  }
  std::vector<Value> outputs;
  for (size_t i = 0; i < nodes_[index].types.size(); ++i) {
    outputs.push_back({this, {index, static_cast<int32_t>(i)}});
  }
  return outputs;
}

Value ComputationGraph::EmitOne(const Op& op, std::span<const Value> inputs, Attrs attrs) {
  return Emit(op, inputs, std::move(attrs))[0];
}

void ComputationGraph::Output(std::string name, Value value) {
  Check<InternalError>(value.graph == this, "graph: output \"{}\" belongs to another graph", name);
  for (const GraphOutput& output : outputs_) {
    Check(output.name != name, "graph: output \"{}\" is declared twice", name);
  }
  outputs_.push_back({std::move(name), value.id});
}

void ComputationGraph::Update(Value target, Value source) {
  Check<InternalError>(target.graph == this && source.graph == this,
                       "graph: an update belongs to another graph");
  const ComputationNode& leaf = nodes_[target.id.node];
  Check<InternalError>(leaf.parameter != nullptr,
                       "graph: the target of an update is not a parameter");
  Check<ShapeError>(source.type() == target.type(), "graph: update of {} with {}, expects {}",
                    leaf.parameter->name(), source.type(), target.type());
  for (const GraphUpdate& update : updates_) {
    Check<InternalError>(!(update.target == target.id), "graph: parameter {} is updated twice",
                         leaf.parameter->name());
  }
  updates_.push_back({target.id, source.id});
}

std::vector<ParameterPtr> ComputationGraph::Parameters() const {
  std::vector<ParameterPtr> result;
  for (const ComputationNode& node : nodes_) {
    if (node.parameter) result.push_back(node.parameter);
  }
  return result;
}

int32_t ComputationGraph::InternLabel(const std::string& path) {
  for (size_t i = labels_.size(); i-- > 0;) {
    if (labels_[i] == path) return static_cast<int32_t>(i);
  }
  labels_.push_back(path);
  return static_cast<int32_t>(labels_.size()) - 1;
}

void ComputationGraph::SetLabel(const std::string& path) { current_label_ = InternLabel(path); }

ComputationGraph::Label::Label(ComputationGraph& graph, std::string_view part)
    : graph_(graph), previous_(graph.current_label_) {
  const std::string& outer = graph.labels_[previous_];
  std::string path = outer.empty() ? std::string(part) : fmt::format("{}.{}", outer, part);
  graph.current_label_ = graph.InternLabel(path);
}

ComputationGraph::Label::~Label() { graph_.current_label_ = previous_; }

ComputationGraph::Segment::Segment(ComputationGraph& graph, bool enabled)
    : graph_(enabled && graph.current_segment_ < 0 ? &graph : nullptr) {
  if (graph_) graph_->current_segment_ = graph_->segments_++;
}

ComputationGraph::Segment::~Segment() {
  if (graph_) graph_->current_segment_ = -1;
}

ComputationGraph Rebuild(const ComputationGraph& graph, Rewrite rewrite) {
  const auto& nodes = graph.nodes();
  std::vector<bool> live(nodes.size(), false);
  for (const GraphOutput& output : graph.outputs()) live[output.value.node] = true;
  for (const GraphUpdate& update : graph.updates()) {
    live[update.source.node] = live[update.target.node] = true;
  }
  for (size_t i = nodes.size(); i-- > 0;) {
    if (live[i]) {
      for (ValueId id : nodes[i].inputs) live[id.node] = true;
    }
  }

  ComputationGraph target;
  std::vector<std::vector<Value>> mapped(nodes.size());
  auto map = [&](ValueId id) { return mapped[id.node][id.output]; };
  for (size_t i = 0; i < nodes.size(); ++i) {
    const ComputationNode& node = nodes[i];
    target.SetLabel(graph.label_of(static_cast<int32_t>(i)));
    if (node.op == &kInputOp) {
      mapped[i] = {target.Input(node.name, node.types[0])};
      continue;
    }
    if (!live[i]) continue;
    if (node.op == &kParameterOp) {
      mapped[i] = {target.ParameterLeaf(node.parameter)};
    } else if (node.op == &kConstantOp) {
      mapped[i] = {target.Constant(node.constant)};
    } else {
      std::vector<Value> inputs;
      for (ValueId id : node.inputs) inputs.push_back(map(id));
      if (rewrite) mapped[i] = rewrite(target, node, inputs);
      if (mapped[i].empty()) mapped[i] = target.Emit(*node.op, inputs, node.attrs);
      Check<InternalError>(mapped[i].size() == node.types.size(),
                           "rewrite of {}: {} outputs for {}", node.op->name, mapped[i].size(),
                           node.types.size());
      for (size_t o = 0; o < node.types.size(); ++o) {
        if (!mapped[i][o].defined()) continue;  // allowed for an output that nothing uses
        Check<InternalError>(mapped[i][o].type() == node.types[o], "rewrite of {}: {} became {}",
                             node.op->name, node.types[o], mapped[i][o].type());
      }
    }
  }
  target.SetLabel("");
  for (const GraphOutput& output : graph.outputs()) target.Output(output.name, map(output.value));
  for (const GraphUpdate& update : graph.updates())
    target.Update(map(update.target), map(update.source));
  return target;
}

void Verify(const ComputationGraph& graph) {
  const auto& nodes = graph.nodes();
  auto valid = [&](ValueId id, size_t before) {
    return id.node >= 0 && static_cast<size_t>(id.node) < before && id.output >= 0 &&
           static_cast<size_t>(id.output) < nodes[id.node].types.size();
  };
  for (size_t i = 0; i < nodes.size(); ++i) {
    const ComputationNode& node = nodes[i];
    std::vector<TensorType> types;
    for (ValueId id : node.inputs) {
      Check<InternalError>(valid(id, i), "verify: node {} ({}) reads a value that is not before it",
                           i, node.op->name);
      types.push_back(graph.type(id));
    }
    if (node.op->kind == OpKind::kLeaf) continue;
    Check<InternalError>(node.op->infer({types, node.attrs, node.op}) == node.types,
                         "verify: node {} ({}) at {} has wrong types", i, node.op->name,
                         graph.label_of(static_cast<int32_t>(i)));
  }
  for (const GraphOutput& output : graph.outputs()) {
    Check<InternalError>(valid(output.value, nodes.size()), "verify: output {} is no value",
                         output.name);
  }
  for (const GraphUpdate& update : graph.updates()) {
    Check<InternalError>(valid(update.target, nodes.size()) && valid(update.source, nodes.size()) &&
                             nodes[update.target.node].parameter != nullptr &&
                             graph.type(update.target) == graph.type(update.source),
                         "verify: an update is damaged");
  }
}

}  // namespace calotype
