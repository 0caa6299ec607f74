// The IR. A ComputationGraph is a vector of ComputationNodes in topological order; passes, the
// gradient, the interpreter (eager execution) and the JIT all work on it.
//
// Semantics
// - Data is IEEE binary32, indices are int32/int64. Every node is a pure function of its inputs.
// - Elementwise and view nodes: each result is the sequence of IEEE operations that the op's
//   formula writes (ops.def, core/scalar.h), in its order, no fused multiply-add. Eager and
//   compiled code give the same bits on every machine.
// - Reductions and contractions (Sum, MatMul, Conv2d, norms, Softmax, Attention) may reassociate
//   and fuse multiply-add; their error obeys the usual bound u * (2 sqrt(K) + 2) * sum |a||b|.
// - Maximum(x, y) and Minimum(x, y) return NaN if either is NaN, and y for (+0, -0) pairs.
//   Comparisons give 1.0 or 0.0, and 0.0 if either side is NaN. Select(m, a, b) is a where m != 0
//   (NaN counts as != 0), and never lets the untaken branch into the result.
// - Whatever can differ between two calls (time, noise, context, learning rate, parameters, seeds)
//   is an Input or a Parameter leaf, never a constant.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "core/parameter.h"
#include "core/tensor.h"
#include "graph/attrs.h"

namespace calotype {

class ComputationGraph;
struct Op;

// Output `output` of node `node`, as stored inside a graph.
struct ValueId {
  int32_t node = -1;
  int32_t output = 0;
  bool operator==(const ValueId&) const = default;
};

// A ValueId together with its graph: what layers and functions pass around.
struct Value {
  ComputationGraph* graph = nullptr;
  ValueId id;

  bool defined() const { return graph != nullptr; }
  const TensorType& type() const;
  const Shape& shape() const { return type().shape; }
  int rank() const { return shape().rank(); }
  int64_t dim(int axis) const { return shape()[axis]; }
  bool operator==(const Value&) const = default;
};

struct ComputationNode {
  const Op* op = nullptr;
  std::vector<ValueId> inputs;
  Attrs attrs;
  std::vector<TensorType> types;  // one for each output
  int32_t label = 0;              // index into ComputationGraph::labels()
  int32_t segment = -1;           // see ComputationGraph::Segment

  // Payload of leaves; empty otherwise.
  std::string name;        // Input: its declared name
  ParameterPtr parameter;  // Parameter
  Tensor constant;         // Constant
};

// Writes `source` into the storage of `target` after the outputs have been computed (optimizers,
// averages). InternalError unless `target` is a Parameter leaf without another update.
struct GraphUpdate {
  ValueId target;
  ValueId source;
};

struct GraphOutput {
  std::string name;
  ValueId value;
};

class ComputationGraph {
 public:
  ComputationGraph();
  ComputationGraph(ComputationGraph&&) = default;
  ComputationGraph& operator=(ComputationGraph&&) = default;
  ComputationGraph(const ComputationGraph&) = delete;  // Value points to its graph

  // Leaves. Inputs are ordered by declaration; their names are unique.
  Value Input(std::string name, const TensorType& type);
  Value Input(std::string name, const Shape& shape) {
    return Input(std::move(name), {DType::kF32, shape});
  }
  Value ParameterLeaf(const ParameterPtr& parameter);  // the same leaf for the same parameter
  Value Constant(const Tensor& value);                 // scalars are shared by value
  Value Constant(float value) { return Constant(Tensor::Scalar(value)); }

  // The only way to add an operation: checks the arity, infers the types (errors name the op, all
  // shapes and the label), and returns the existing node if an equal one is there. Never executes.
  std::vector<Value> Emit(const Op& op, std::span<const Value> inputs, Attrs attrs = {});
  // The same for an op with one output.
  Value EmitOne(const Op& op, std::span<const Value> inputs, Attrs attrs = {});
  Value EmitOne(const Op& op, std::initializer_list<Value> inputs, Attrs attrs = {}) {
    return EmitOne(op, std::span(inputs.begin(), inputs.size()), std::move(attrs));
  }

  // Names a result; order of declaration is that of Run. Errors: ValueError for a name used twice.
  void Output(std::string name, Value value);
  void Update(Value target, Value source);  // see GraphUpdate. Errors: ShapeError for other types

  const std::vector<ComputationNode>& nodes() const { return nodes_; }
  const ComputationNode& node(int32_t index) const { return nodes_[index]; }
  const TensorType& type(ValueId id) const { return nodes_[id.node].types[id.output]; }
  const std::vector<int32_t>& inputs() const {
    return inputs_;
  }  // node numbers of the Input leaves
  const std::vector<GraphOutput>& outputs() const { return outputs_; }
  const std::vector<GraphUpdate>& updates() const { return updates_; }
  // Parameters read by the graph, in order of their first use.
  std::vector<ParameterPtr> Parameters() const;

  // Labels nodes emitted during its life with a path ("unet.down_blocks.0"), for messages and
  // dumps.
  class Label {
   public:
    Label(ComputationGraph& graph, std::string_view part);
    ~Label();
    Label(const Label&) = delete;

   private:
    ComputationGraph& graph_;
    int32_t previous_;
  };
  // Gradient checkpointing: Gradients computes the nodes emitted during its life again, from the
  // values that they read from outside, instead of reading the first results, so that these need
  // not be kept. Inside another segment, or with enabled = false, it does nothing. Passes forget
  // it.
  class Segment {
   public:
    explicit Segment(ComputationGraph& graph, bool enabled = true);
    ~Segment();
    Segment(const Segment&) = delete;

   private:
    ComputationGraph* graph_;  // null: does nothing
  };
  const std::string& label(int32_t index) const { return labels_[index]; }
  const std::string& label_of(int32_t node) const { return labels_[nodes_[node].label]; }
  // For passes that copy nodes: labels the next nodes with exactly this path.
  void SetLabel(const std::string& path);

 private:
  int32_t Add(ComputationNode node);
  int32_t InternLabel(const std::string& path);

  std::vector<ComputationNode> nodes_;
  std::vector<int32_t> inputs_;
  std::vector<GraphOutput> outputs_;
  std::vector<GraphUpdate> updates_;
  std::vector<std::string> labels_;
  int32_t current_label_ = 0;
  int32_t current_segment_ = -1, segments_ = 0;
  std::unordered_multimap<uint64_t, int32_t> by_hash_;
};

// Copies the nodes that `graph`'s outputs and updates need into a new graph. `rewrite` is called
// for each operation node (not leaves) with its inputs already mapped into the new graph and
// returns its replacement outputs, or an empty vector to copy the node as it is. Dead code
// vanishes. Every Input is kept, also an unused one. This is how passes are written.
using Rewrite = std::vector<Value> (*)(ComputationGraph& target, const ComputationNode& node,
                                       std::span<const Value> inputs);
ComputationGraph Rebuild(const ComputationGraph& graph, Rewrite rewrite);
inline ComputationGraph Clone(const ComputationGraph& graph) { return Rebuild(graph, nullptr); }

// Checks all invariants of a graph: order, types re-inferred, unique names, updates that fit their
// targets. Errors: InternalError naming the node.
void Verify(const ComputationGraph& graph);

}  // namespace calotype
