#include "pipelines/model_graphs.h"

#include "pipelines/training_graph.h"

namespace calotype {
namespace {

TensorType Tokens(const DiffusionModel& model, int64_t batch) {
  return {DType::kI64, {batch, model.caption_tokens()}};
}

// Declares the inputs of LossGraph and returns the loss; sets *noise_loss, if asked for, to the
// error of the noise that the prediction implies (undefined for models that predict the sample).
Value ExportLoss(ComputationGraph& graph, DiffusionModel& model, const NoiseSchedule& schedule,
                 int64_t batch, Value* noise_loss = nullptr) {
  Shape pictures{batch, model.channels(), model.side(), model.side()};
  Value images = graph.Input("images", pictures), noise = graph.Input("noise", pictures);
  Value timesteps = graph.Input("timesteps", {DType::kI64, {batch}});
  Value tokens = graph.Input("tokens", Tokens(model, batch));
  return DenoisingLoss(schedule, images, noise, timesteps, [&](Value noisy) {
    Value prediction = model.Denoise(noisy, timesteps, model.Encode(tokens));
    if (noise_loss && schedule.prediction_type() == PredictionType::kEpsilon) {
      *noise_loss = MeanSquaredError(prediction, noise);
    } else if (noise_loss && schedule.prediction_type() == PredictionType::kVelocity) {
      // With x_t = s x + r n and v = s n - r x (s^2 + r^2 = 1), n = s v + r x_t.
      *noise_loss = MeanSquaredError(schedule.AddNoise(prediction, noisy, timesteps), noise);
    }
    return prediction;
  });
}

}  // namespace

ComputationGraph EncoderGraph(DiffusionModel& model, int64_t batch) {
  model.SetTrainingMode(false);
  ComputationGraph graph;
  graph.Output("context", model.Encode(graph.Input("tokens", Tokens(model, batch))));
  return graph;
}

ComputationGraph UNetGraph(DiffusionModel& model, int64_t batch, int64_t side) {
  model.SetTrainingMode(false);
  if (side == 0) side = model.side();
  ComputationGraph graph;
  Value sample = graph.Input("sample", Shape{batch, model.channels(), side, side});
  Value timestep = graph.Input("timestep", Shape{batch});
  Value context = graph.Input("encoder_hidden_states",
                              Shape{batch, model.caption_tokens(), model.context_width()});
  graph.Output("out", model.Denoise(sample, timestep, context));
  return graph;
}

ComputationGraph LossGraph(DiffusionModel& model, const NoiseSchedule& schedule, int64_t batch) {
  model.SetTrainingMode(false);
  ComputationGraph graph;
  Value noise_loss;
  graph.Output("loss", ExportLoss(graph, model, schedule, batch, &noise_loss));
  if (noise_loss.defined()) graph.Output("noise_loss", noise_loss);
  return graph;
}

ComputationGraph TrainingStepGraph(DiffusionModel& model, const NoiseSchedule& schedule,
                                   int64_t batch, const Optimizer& optimizer, const Ema* ema) {
  model.SetTrainingMode(true);
  ComputationGraph graph;
  ExportTrainingStep(ExportLoss(graph, model, schedule, batch), optimizer, ema);
  return graph;
}

}  // namespace calotype
