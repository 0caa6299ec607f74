// An op and its gradient. A graph is built first and run later; the gradient is more nodes of the
// same graph, so whatever runs the one runs the other.
#include <fmt/format.h>

#include "graph/functions.h"
#include "graph/interpreter.h"

using namespace calotype;

int main() {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{4});
  Value y = Sum(Silu(x) * x);  // y = sum over i of x_i^2 / (1 + exp(-x_i))
  Value dx = Gradients(std::vector{y}, std::vector<Value>{{}}, std::vector{x})[0];
  graph.Output("y", y);
  graph.Output("dx", dx);

  Tensor at = Tensor::From({4}, std::vector<float>{-1, 0, 1, 2});
  std::vector<Tensor> results = Interpreter(graph).Run(std::vector{at});
  fmt::print("y  = {:.6f}\ndx =", results[0].Item());
  for (float d : results[1].values()) fmt::print(" {:.6f}", d);
  fmt::print("\n");

  // The same slope by finite differences, in float64 by the reference interpreter.
  double h = 1e-6;
  auto f = [&](double x0) {
    Tensor moved = at.To(DType::kF64);
    moved.data<double>()[0] = x0;
    return Interpreter(graph).RunReference(std::vector{moved})[0].Item();
  };
  fmt::print("dx[0] by differences = {:.6f}\n", (f(-1 + h) - f(-1 - h)) / (2 * h));
  return 0;
}
