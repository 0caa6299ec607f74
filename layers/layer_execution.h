// Eager execution of a layer: exports its graph for the types of the inputs, interprets it, and
// keeps what the gradient graph reads. One joint graph of outputs and gradients is built and cut in
// two: the forward part yields the outputs and exactly the values that the other part reads, so
// Backward recomputes nothing.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "graph/interpreter.h"
#include "layers/layer.h"

namespace calotype {

// A differentiable graph cut into two. Inputs of `forward`: those of the joint graph that are not
// output gradients. Outputs of `forward`: the results, then the saved values. Inputs of `backward`:
// the output gradients, then the saved values, then the forward inputs listed in saved_inputs.
// Outputs of `backward`: the gradients.
struct SplitGraph {
  ComputationGraph forward, backward;
  size_t saved = 0;
  std::vector<size_t> saved_inputs;
};
// `outputs` and `gradients` are values of `joint`; `output_gradients` are Input leaves of it that
// `outputs` do not depend on.
SplitGraph Split(const ComputationGraph& joint, std::span<const ValueId> outputs,
                 std::span<const ValueId> output_gradients, std::span<const ValueId> gradients);

class LayerExecution {
 public:
  std::vector<Tensor> Forward(Layer& layer, std::span<const Tensor> inputs);
  std::vector<Tensor> Backward(Layer& layer, std::span<const Tensor> output_gradients);

  size_t graphs() const { return cache_.size(); }
  int64_t kept_bytes() const;

 private:
  static constexpr size_t kMaxGraphs = 8;

  // The graphs for one combination of input types and layer state.
  struct Specialization {
    std::vector<std::optional<TensorType>> types;
    uint64_t state = 0;
    SplitGraph graphs;
    std::vector<TensorType> outputs;
    std::vector<size_t> differentiable;    // inputs with a gradient
    std::vector<ParameterPtr> parameters;  // trainable
    std::unique_ptr<Interpreter> forward, backward;
  };
  // What Backward needs of the last Forward.
  struct Kept {
    std::shared_ptr<Specialization> specialization;
    size_t inputs = 0;
    uint64_t versions = 0;  // sum over the parameters
    std::vector<Tensor> saved;
  };

  std::shared_ptr<Specialization> Prepare(Layer& layer, std::span<const Tensor> inputs);
  static uint64_t Versions(const Specialization& specialization);

  std::list<std::shared_ptr<Specialization>> cache_;  // latest first
  std::optional<Kept> kept_;
};

}  // namespace calotype
