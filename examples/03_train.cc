// A training loop. Loss, gradients and the AdamW update are one graph: a step is one call,
// interpreted here, compiled by changing one word.
#include <fmt/format.h>

#include <cmath>

#include "core/random.h"
#include "graph/functions.h"
#include "layers/linear.h"
#include "pipelines/graph_runner.h"
#include "pipelines/training_graph.h"

using namespace calotype;

int main() {
  nn::Linear hidden({.in_features = 1, .out_features = 32}),
      out({.in_features = 32, .out_features = 1});
  std::vector<ParameterPtr> parameters = hidden.NamedParameters();
  for (const ParameterPtr& p : out.NamedParameters())
    parameters.push_back(p), p->set_name("out." + p->name());
  Optimizer optimizer(AdamW{}, parameters, /*max_gradient_norm=*/1);

  ComputationGraph graph;
  Value x = graph.Input("x", Shape{64, 1}), y = graph.Input("y", Shape{64, 1});
  Value loss = MeanSquaredError(out.Call(Tanh(hidden.Call(x))), y);
  ExportTrainingStep(loss, optimizer, /*ema=*/nullptr);  // adds gradients and updates
  GraphRunner step(std::move(graph), Backend::kEager);   // or kJit

  Random random(/*seed=*/7);
  for (int k = 1; k <= 1000; ++k) {
    Tensor xs = random.UniformTensor({64, 1}, -3, 3), ys(xs.shape());
    for (int i = 0; i < 64; ++i) ys.data()[i] = std::sin(xs.data()[i]);
    std::vector<Tensor> inputs{xs, ys};
    for (Tensor& input : optimizer.Inputs(k, /*learning_rate=*/0.01)) inputs.push_back(input);
    Tensor result = step.Run(inputs)[0];
    if (k == 1 || k % 250 == 0) fmt::print("step {:4}: loss {:.5f}\n", k, result.Item());
  }
  return 0;
}
