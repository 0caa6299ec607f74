#include "graph/op_decompose.h"

#include <algorithm>

#include "graph/functions.h"

namespace calotype {

std::vector<Value> DecomposedGradient(const GradientContext& context) {
  // Behind StopGradient the inputs are independent of each other: the derivative along one must not
  // follow a path through another that was computed from it.
  std::vector<Value> inputs, wrt;
  std::vector<size_t> positions;
  for (size_t i = 0; i < context.inputs.size(); ++i) {
    if (!context.needs[i]) {
      inputs.push_back(context.inputs[i]);
      continue;
    }
    inputs.push_back(StopGradient(context.inputs[i]));
    // Equal inputs share a node, whose gradient is already the sum over their places.
    if (std::find(wrt.begin(), wrt.end(), inputs.back()) == wrt.end()) {
      wrt.push_back(inputs.back());
      positions.push_back(i);
    }
  }
  std::vector<Value> all = context.node.op->decompose(context.graph, context.node, inputs);
  std::vector<Value> outputs, doutputs;
  for (size_t o = 0; o < all.size(); ++o) {
    if (!context.doutputs[o].defined()) continue;
    outputs.push_back(all[o]);
    doutputs.push_back(context.doutputs[o]);
  }
  std::vector<Value> gradients = Gradients(outputs, doutputs, wrt);
  std::vector<Value> result(context.inputs.size());
  for (size_t i = 0; i < positions.size(); ++i) result[positions[i]] = gradients[i];
  return result;
}

}  // namespace calotype
