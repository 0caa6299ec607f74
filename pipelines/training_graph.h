// The graphs of training: the denoising loss, and one optimizer step with its gradients, updates
// and averages.
#pragma once

#include "diffusion/noise_schedule.h"
#include "graph/functions.h"
#include "optim/ema.h"
#include "optim/optimizer.h"

namespace calotype {

// mean((prediction - schedule.Target(x, n, t))^2), where prediction = denoise(schedule.AddNoise(x,
// n, t)). images, noise f32 [B, C, H, W]; timesteps i64 [B].
template <class Denoise>
Value DenoisingLoss(const NoiseSchedule& schedule, Value images, Value noise, Value timesteps,
                    Denoise&& denoise) {
  Value prediction = denoise(schedule.AddNoise(images, noise, timesteps));
  return MeanSquaredError(prediction, schedule.Target(images, noise, timesteps));
}

// Adds to the graph of `loss`: its gradients for the optimizer's parameters, the updates of
// parameters and optimizer state, and, unless `ema` is null, of the averages. Declares their inputs
// in the order optimizer.Inputs, ema->Inputs, and the outputs loss and gradient_norm.
void ExportTrainingStep(Value loss, const Optimizer& optimizer, const Ema* ema);

}  // namespace calotype
