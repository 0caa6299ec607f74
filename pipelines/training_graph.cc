#include "pipelines/training_graph.h"

namespace calotype {

void ExportTrainingStep(Value loss, const Optimizer& optimizer, const Ema* ema) {
  ComputationGraph& graph = *loss.graph;
  std::vector<Value> parameters;
  for (const ParameterPtr& parameter : optimizer.parameters())
    parameters.push_back(graph.ParameterLeaf(parameter));
  std::vector<Value> outputs{loss}, cotangents{Value{}};
  std::vector<Value> gradients = Gradients(outputs, cotangents, parameters);
  Optimizer::Exported step = optimizer.ExportUpdates(graph, gradients);
  if (ema) ema->ExportUpdates(graph, step.parameters, step.finite);
  graph.Output("loss", loss);
  graph.Output("gradient_norm", step.gradient_norm);
}

}  // namespace calotype
