#include "pipelines/model_graphs.h"

#include "core/error.h"
#include "pipelines/training_graph.h"

namespace calotype {
namespace {

TensorType Tokens(const DiffusionModel& model, int64_t batch) {
  return {DType::kI64, {batch, model.caption_tokens()}};
}

// Declares the inputs of LossGraph and returns the loss; sets *noise_loss, if asked for, to the
// error of the noise that the prediction implies (undefined for models that predict the sample).
Value ExportLoss(ComputationGraph& graph, DiffusionModel& model, const NoiseSchedule& schedule,
                 int64_t batch, const TrainingGraphOptions& training = {},
                 Value* noise_loss = nullptr) {
  const int64_t side = training.inputs.side > 0 ? training.inputs.side : model.sample_side();
  Shape pictures{batch, model.channels(), side, side};
  Value images = graph.Input("images", pictures), noise = graph.Input("noise", pictures);
  Value timesteps = graph.Input("timesteps", {DType::kI64, {batch}});
  Shape embedded{batch, model.caption_tokens(), model.context_width()};
  Value context = training.inputs.embeddings
                      ? graph.Input("context", embedded)
                      : model.Encode(graph.Input("tokens", Tokens(model, batch)));
  LossOptions options{.snr_gamma = training.snr_gamma,
                      .input_noise = {},
                      .prior_rows = training.prior_rows,
                      .prior_loss_weight = training.prior_loss_weight,
                      .mask = {}};
  if (training.input_noise) options.input_noise = graph.Input("input_noise", pictures);
  if (training.mask)
    options.mask = graph.Input("mask", Shape{batch - training.prior_rows, 1, side, side});
  auto denoise = [&](Value noisy) {
    Value prediction = model.Denoise(noisy, timesteps, context);
    if (noise_loss && schedule.prediction_type() == PredictionType::kEpsilon) {
      *noise_loss = MeanSquaredError(prediction, noise);
    } else if (noise_loss && schedule.prediction_type() == PredictionType::kVelocity) {
      // With x_t = s x + r n and v = s n - r x (s^2 + r^2 = 1), n = s v + r x_t.
      *noise_loss = MeanSquaredError(schedule.AddNoise(prediction, noisy, timesteps), noise);
    }
    return prediction;
  };
  return DenoisingLoss(schedule, images, noise, timesteps, denoise, options);
}

// Another clip_skip for as long as it lives; `clip` may be null.
class ClipSkipScope {
 public:
  ClipSkipScope(CLIPTextModel* clip, int64_t clip_skip)
      : clip_(clip), before_(clip ? clip->clip_skip() : 0) {
    if (clip_) clip_->SetClipSkip(clip_skip);
  }
  ~ClipSkipScope() {
    if (clip_) clip_->SetClipSkip(before_);
  }
  ClipSkipScope(const ClipSkipScope&) = delete;
  ClipSkipScope& operator=(const ClipSkipScope&) = delete;

 private:
  CLIPTextModel* clip_;
  int64_t before_;
};

}  // namespace

ComputationGraph EncoderGraph(DiffusionModel& model, int64_t batch, int64_t clip_skip) {
  model.SetTrainingMode(false);
  CLIPTextModel* clip = model.text_encoder();
  Check(clip || clip_skip == 0, "clip_skip is {}, but the model's text encoder is not CLIP",
        clip_skip);
  const ClipSkipScope scope(clip, clip_skip);
  ComputationGraph graph;
  graph.Output("context", model.Encode(graph.Input("tokens", Tokens(model, batch))));
  return graph;
}

ComputationGraph UNetGraph(DiffusionModel& model, UNetShape shape, const DenoiseBuilder& denoise) {
  model.SetTrainingMode(false);
  auto [batch, height, width, tokens] = shape;
  if (height == 0) height = model.sample_side();
  if (width == 0) width = model.sample_side();
  if (tokens == 0) tokens = model.caption_tokens();
  ComputationGraph graph;
  Value sample =
      graph.Input("sample", Shape{batch, model.unet().config().in_channels, height, width});
  Value timestep = graph.Input("timestep", Shape{batch});
  Value context = graph.Input("encoder_hidden_states", Shape{batch, tokens, model.context_width()});
  if (!denoise) {
    graph.Output("out", model.Denoise(sample, timestep, context));
    return graph;
  }
  std::vector<Value> outputs = denoise(graph, sample, timestep, context);
  Check<InternalError>(!outputs.empty(), "U-Net graph: the builder returned no prediction");
  for (size_t i = 0; i < outputs.size(); ++i)
    graph.Output(i == 0 ? "out" : fmt::format("out.{}", i), outputs[i]);
  return graph;
}

ComputationGraph LatentDecoderGraph(DiffusionModel& model, int64_t height, int64_t width) {
  Check(model.vae(), "the model has no autoencoder");
  model.SetTrainingMode(false);
  ComputationGraph graph;
  Value latents = graph.Input("latents", Shape{1, model.channels(), height, width});
  graph.Output("picture", model.vae()->Decode(model.vae()->UnscaleLatents(latents)));
  return graph;
}

ComputationGraph LatentEncoderGraph(DiffusionModel& model, int64_t height, int64_t width) {
  Check(model.vae(), "the model has no autoencoder");
  model.SetTrainingMode(false);
  ComputationGraph graph;
  Value picture =
      graph.Input("picture", Shape{1, 3, height * model.factor(), width * model.factor()});
  Value noise = graph.Input("noise", Shape{1, model.channels(), height, width});
  graph.Output("latents", model.vae()->ScaleLatents(model.vae()->Encode(picture).Sample(noise)));
  return graph;
}

ComputationGraph LossGraph(DiffusionModel& model, const NoiseSchedule& schedule, int64_t batch,
                           const LossInputs& inputs) {
  model.SetTrainingMode(false);
  ComputationGraph graph;
  Value noise_loss;
  graph.Output("loss", ExportLoss(graph, model, schedule, batch, {.inputs = inputs}, &noise_loss));
  if (noise_loss.defined()) graph.Output("noise_loss", noise_loss);
  return graph;
}

ComputationGraph TrainingStepGraph(DiffusionModel& model, const NoiseSchedule& schedule,
                                   int64_t batch, const Optimizer& optimizer, const Ema* ema,
                                   const TrainingGraphOptions& options) {
  model.SetTrainingMode(true);
  ComputationGraph graph;
  ExportTrainingStep(ExportLoss(graph, model, schedule, batch, options), optimizer, ema);
  return graph;
}

ComputationGraph GradientSumGraph(DiffusionModel& model, const NoiseSchedule& schedule,
                                  int64_t batch, const Optimizer& optimizer,
                                  const std::vector<ParameterPtr>& sums, int64_t batches,
                                  const TrainingGraphOptions& options) {
  model.SetTrainingMode(true);
  ComputationGraph graph;
  ExportGradientSums(ExportLoss(graph, model, schedule, batch, options), optimizer, sums, batches);
  return graph;
}

}  // namespace calotype
