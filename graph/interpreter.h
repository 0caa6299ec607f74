// Eager execution: interprets a graph node by node with the eager kernels, frees each value after
// its last use. The float64 reference interprets the same graph with plain double loops.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "graph/graph.h"

namespace calotype {

class Interpreter {
 public:
  // Keeps a reference to `graph`, which must outlive it and not change.
  explicit Interpreter(const ComputationGraph& graph);

  // Runs all nodes; inputs in the order of graph.inputs(). Applies the graph's updates at the end.
  // Returns the outputs in the order of graph.outputs().
  // Errors: ShapeError if the inputs do not fit, ValueError for a bad index.
  std::vector<Tensor> Run(std::span<const Tensor> inputs);

  // As Run in float64: inputs and parameters may be f32 (converted) or f64; updates are returned
  // behind the outputs instead of being written.
  std::vector<Tensor> RunReference(std::span<const Tensor> inputs,
                                   std::span<const Tensor> parameters = {}) const;

  // The most bytes that results of operations take at one time of Run; without inputs, parameters
  // and constants, and without what kernels take for themselves.
  int64_t PeakBytes() const;

 private:
  const ComputationGraph& graph_;
  std::vector<std::vector<ValueId>> free_after_;  // values whose last reader is this node
  std::vector<bool> needed_;                      // nodes that an output or update depends on
};

}  // namespace calotype
