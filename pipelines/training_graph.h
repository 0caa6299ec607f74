// The graphs of training: the denoising loss, and one optimizer step with its gradients, updates
// and averages.
#pragma once

#include "diffusion/noise_schedule.h"
#include "graph/functions.h"
#include "optim/ema.h"
#include "optim/optimizer.h"

namespace calotype {

// Weights of the timesteps' losses, f32 [T], for a model that predicts the noise or the velocity:
// min(snr, gamma) / snr and min(snr, gamma) / (snr + 1) with snr = alpha_bar / (1 - alpha_bar)
// (Hang et al. 2023, arXiv:2303.09556). Errors: ValueError unless gamma > 0, or for a model that
// predicts the sample.
Tensor SnrWeights(const NoiseSchedule& schedule, double gamma);

// The mean over samples of weights[timesteps] times the mean squared error of the sample.
Value WeightedError(Value prediction, Value target, Value timesteps, const Tensor& weights);

// The mean over samples of w sum(mask (prediction - target)^2) / sum(mask), w = weights[timesteps]
// or 1 if weights is undefined. mask [B, 1, H, W] has one channel, so that the error is summed over
// channels: what diffusers' script train_custom_diffusion.py trains on.
Value MaskedError(Value prediction, Value target, Value mask, Value timesteps,
                  const Tensor& weights);

struct LossOptions {
  double snr_gamma = 0;  // 0: all timesteps count alike
  // The noise of the model's input if it is not the target's; undefined: the same.
  Value input_noise;
  // Dreambooth: the last prior_rows samples are pictures of the class. The loss is that of the
  // others plus prior_loss_weight times the mean squared error of these (Ruiz et al. 2022,
  // arXiv:2208.12242).
  int64_t prior_rows = 0;
  double prior_loss_weight = 1;
  // Where the loss of the other samples counts, [B - prior_rows, 1, H, W]: see MaskedError.
  // Undefined: everywhere, and the error is the mean squared one.
  Value mask;
};

// mean((prediction - schedule.Target(x, n, t))^2), where prediction = denoise(schedule.AddNoise(x,
// n, t)). images, noise f32 [B, C, H, W]; timesteps i64 [B].
template <class Denoise>
Value DenoisingLoss(const NoiseSchedule& schedule, Value images, Value noise, Value timesteps,
                    Denoise&& denoise, const LossOptions& options = {}) {
  Value added = options.input_noise.defined() ? options.input_noise : noise;
  Value prediction = denoise(schedule.AddNoise(images, added, timesteps));
  Value target = schedule.Target(images, noise, timesteps);
  auto error = [&](Value p, Value t, Value at) {
    if (options.mask.defined()) {
      Tensor weights;
      if (options.snr_gamma > 0) weights = SnrWeights(schedule, options.snr_gamma);
      return MaskedError(p, t, options.mask, at, weights);
    }
    if (options.snr_gamma == 0) return MeanSquaredError(p, t);
    return WeightedError(p, t, at, SnrWeights(schedule, options.snr_gamma));
  };
  if (options.prior_rows == 0) return error(prediction, target, timesteps);
  const int64_t rows = prediction.dim(0) - options.prior_rows;
  auto first = [&](Value v) { return Slice(v, 0, 0, rows); };
  auto prior = [&](Value v) { return Slice(v, 0, rows, options.prior_rows); };
  return error(first(prediction), first(target), first(timesteps)) +
         MeanSquaredError(prior(prediction), prior(target)) *
             static_cast<float>(options.prior_loss_weight);
}

// Adds to the graph of `loss`: its gradients for the optimizer's parameters, the updates of
// parameters and optimizer state, and, unless `ema` is null, of the averages. Declares their inputs
// in the order optimizer.Inputs, ema->Inputs, and the outputs loss and gradient_norm.
void ExportTrainingStep(Value loss, const Optimizer& optimizer, const Ema* ema);

// Gradient accumulation: the step in two graphs. The first runs for each of `batches` batches and
// adds the gradients of loss / batches to the sums; its output is loss. The second, without inputs
// but those of the optimizer and the averages, takes the step from the sums, sets them to 0, and
// has the output gradient_norm.
std::vector<ParameterPtr> GradientSums(const Optimizer& optimizer);
void ExportGradientSums(Value loss, const Optimizer& optimizer,
                        const std::vector<ParameterPtr>& sums, int64_t batches);
void ExportStepFromSums(ComputationGraph& graph, const Optimizer& optimizer, const Ema* ema,
                        const std::vector<ParameterPtr>& sums);

}  // namespace calotype
