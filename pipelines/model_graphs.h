// The graphs of a DiffusionModel that sampling, training, benchmarks and `calotype graph` run or
// show. Building one sets the model's training mode to what the graph is for.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "diffusion/noise_schedule.h"
#include "optim/ema.h"
#include "optim/optimizer.h"
#include "pipelines/diffusion_model.h"

namespace calotype {

// Input tokens i64 [batch, L]; output context. clip_skip: see CLIPTextModel::SetClipSkip. Errors:
// ValueError for a clip_skip of a model without CLIP.
ComputationGraph EncoderGraph(DiffusionModel& model, int64_t batch, int64_t clip_skip = 0);

// The inputs of a UNetGraph. 0: the model's.
struct UNetShape {
  int64_t batch = 1;
  int64_t height = 0, width = 0;                       // of the sample, not the picture
  int64_t tokens = 0;                                  // of the context
  auto operator<=>(const UNetShape&) const = default;  // NOLINT: clang-tidy 14 sees a null pointer
};
// Builds the prediction and returns it, and behind it whatever else the graph shall have as
// outputs; may declare further inputs, and change the attention of the U-Net meanwhile.
using DenoiseBuilder = std::function<std::vector<Value>(ComputationGraph&, Value sample,
                                                        Value timestep, Value context)>;
// Inputs sample [batch, in_channels, height, width], timestep f32 [batch] (samplers stop between
// timesteps), encoder_hidden_states [batch, tokens, D]; output out. `denoise` takes the place of
// model.Denoise; its further results are outputs out.1, out.2, ...
ComputationGraph UNetGraph(DiffusionModel& model, UNetShape shape,
                           const DenoiseBuilder& denoise = {});
inline ComputationGraph UNetGraph(DiffusionModel& model, int64_t batch) {
  return UNetGraph(model, UNetShape{.batch = batch});
}

// Of models with an autoencoder, one picture at a time; height and width are the latents'.
// Input latents [1, C, height, width]; output picture [1, 3, f height, f width], about [-1, 1].
ComputationGraph LatentDecoderGraph(DiffusionModel& model, int64_t height, int64_t width);
// Inputs picture, noise [1, C, height, width]; output latents: a sample of the encoder's
// distribution, scaled.
ComputationGraph LatentEncoderGraph(DiffusionModel& model, int64_t height, int64_t width);

struct LossInputs {
  int64_t side = 0;         // of the samples; 0: the model's
  bool embeddings = false;  // context f32 [batch, L, D] instead of tokens
};
// Inputs images, noise [batch, C, side, side] (samples: pictures, or latents), timesteps i64
// [batch], tokens i64 [batch, L]. Outputs loss: how well the prediction for the noisy samples meets
// the schedule's target; and, unless the model predicts the sample, noise_loss: the mean squared
// error of the noise that the prediction implies, by which models of different prediction types
// compare.
ComputationGraph LossGraph(DiffusionModel& model, const NoiseSchedule& schedule, int64_t batch,
                           const LossInputs& inputs = {});

struct TrainingGraphOptions {
  LossInputs inputs;
  double snr_gamma = 0;      // see LossOptions
  bool input_noise = false;  // a further input input_noise behind tokens, see LossOptions
  int64_t prior_rows = 0;    // of the batch's; see LossOptions
  double prior_loss_weight = 1;
  bool mask = false;  // a further input mask behind that, see LossOptions
};
// LossGraph with gradients and updates: see ExportTrainingStep.
ComputationGraph TrainingStepGraph(DiffusionModel& model, const NoiseSchedule& schedule,
                                   int64_t batch, const Optimizer& optimizer, const Ema* ema,
                                   const TrainingGraphOptions& options = {});
// LossGraph with its gradients added to sums: see ExportGradientSums.
ComputationGraph GradientSumGraph(DiffusionModel& model, const NoiseSchedule& schedule,
                                  int64_t batch, const Optimizer& optimizer,
                                  const std::vector<ParameterPtr>& sums, int64_t batches,
                                  const TrainingGraphOptions& options = {});

}  // namespace calotype
