#include "pipelines/training_graph.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace calotype {
namespace {

std::vector<Value> ParameterGradients(Value loss, Value cotangent, const Optimizer& optimizer) {
  std::vector<Value> parameters;
  for (const ParameterPtr& parameter : optimizer.parameters())
    parameters.push_back(loss.graph->ParameterLeaf(parameter));
  std::vector<Value> outputs{loss}, cotangents{cotangent};
  return Gradients(outputs, cotangents, parameters);
}

}  // namespace

Tensor SnrWeights(const NoiseSchedule& schedule, double gamma) {
  const PredictionType type = schedule.prediction_type();
  Check(std::isfinite(gamma) && gamma > 0, "min-SNR weights: gamma is {}, must be above 0", gamma);
  Check(type != PredictionType::kSample,
        "min-SNR weights: the model predicts the sample; they are for noise and velocity");
  Tensor weights({schedule.size()});
  for (int64_t t = 0; t < schedule.size(); ++t) {
    double alpha_bar = schedule.AlphaBar(t), snr = alpha_bar / (1 - alpha_bar);
    // Where nothing but noise is left, the limit: the quotient of two numbers that vanish is 1.
    double weight = type == PredictionType::kVelocity ? std::min(snr, gamma) / (snr + 1)
                                                      : std::min(1.0, gamma / snr);
    weights.data()[t] = static_cast<float>(weight);
  }
  return weights;
}

Value WeightedError(Value prediction, Value target, Value timesteps, const Tensor& weights) {
  Check<ShapeError>(prediction.shape() == target.shape() && prediction.rank() >= 2 &&
                        timesteps.shape() == Shape({prediction.dim(0)}),
                    "weighted error: {} against {} at timesteps {}", prediction.shape(),
                    target.shape(), timesteps.shape());
  std::vector<int64_t> axes;
  for (int axis = 1; axis < prediction.rank(); ++axis) axes.push_back(axis);
  Value each = Mean(Square(prediction - target), axes);
  return Mean(Gather(timesteps.graph->Constant(weights), timesteps) * each);
}

Value MaskedError(Value prediction, Value target, Value mask, Value timesteps,
                  const Tensor& weights) {
  Check<ShapeError>(
      prediction.shape() == target.shape() && prediction.rank() == 4 &&
          mask.shape() == Shape({prediction.dim(0), 1, prediction.dim(2), prediction.dim(3)}),
      "masked error: {} against {} with a mask {}", prediction.shape(), target.shape(),
      mask.shape());
  Value each = Sum(Square(prediction - target) * mask, {1, 2, 3}) / Sum(mask, {1, 2, 3});
  if (weights.defined()) each = Gather(timesteps.graph->Constant(weights), timesteps) * each;
  return Mean(each);
}

void ExportTrainingStep(Value loss, const Optimizer& optimizer, const Ema* ema) {
  ComputationGraph& graph = *loss.graph;
  Optimizer::Exported step =
      optimizer.ExportUpdates(graph, ParameterGradients(loss, Value{}, optimizer));
  if (ema) ema->ExportUpdates(graph, step.parameters, step.finite);
  graph.Output("loss", loss);
  graph.Output("gradient_norm", step.gradient_norm);
}

std::vector<ParameterPtr> GradientSums(const Optimizer& optimizer) {
  std::vector<ParameterPtr> sums;
  for (const ParameterPtr& p : optimizer.parameters()) {
    sums.push_back(std::make_shared<Parameter>(
        "gradient." + p->name(), Tensor::Zeros(p->value().shape()), /*trainable=*/false));
  }
  return sums;
}

void ExportGradientSums(Value loss, const Optimizer& optimizer,
                        const std::vector<ParameterPtr>& sums, int64_t batches) {
  Check(batches >= 1, "gradient accumulation: {} batches, must be at least 1", batches);
  ComputationGraph& graph = *loss.graph;
  Value share = Broadcast(graph.Constant(1.0f / static_cast<float>(batches)), loss.shape());
  std::vector<Value> gradients = ParameterGradients(loss, share, optimizer);
  for (size_t i = 0; i < sums.size(); ++i) {
    Value sum = graph.ParameterLeaf(sums[i]);
    graph.Update(sum, sum + gradients[i]);
  }
  graph.Output("loss", loss);
}

void ExportStepFromSums(ComputationGraph& graph, const Optimizer& optimizer, const Ema* ema,
                        const std::vector<ParameterPtr>& sums) {
  std::vector<Value> gradients;
  for (const ParameterPtr& sum : sums) gradients.push_back(graph.ParameterLeaf(sum));
  Optimizer::Exported step = optimizer.ExportUpdates(graph, gradients);
  if (ema) ema->ExportUpdates(graph, step.parameters, step.finite);
  for (const Value& sum : gradients)
    graph.Update(sum, Broadcast(graph.Constant(0.0f), sum.shape()));
  graph.Output("gradient_norm", step.gradient_norm);
}

}  // namespace calotype
