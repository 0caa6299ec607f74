// The graphs of a DiffusionModel that sampling, training, benchmarks and `calotype graph` run or
// show. Building one sets the model's training mode to what the graph is for.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "diffusion/noise_schedule.h"
#include "optim/ema.h"
#include "optim/optimizer.h"
#include "pipelines/diffusion_model.h"

namespace calotype {

// Input tokens i64 [batch, L]; output context.
ComputationGraph EncoderGraph(DiffusionModel& model, int64_t batch);
// Inputs sample [batch, C, side, side], timestep f32 [batch] (samplers stop between timesteps),
// encoder_hidden_states [batch, L, D]; output out. side 0: the model's.
ComputationGraph UNetGraph(DiffusionModel& model, int64_t batch, int64_t side = 0);
// Inputs images, noise [batch, C, side, side], timesteps i64 [batch], tokens i64 [batch, L].
// Outputs loss: how well the prediction for the noisy pictures meets the schedule's target; and,
// unless the model predicts the sample, noise_loss: the mean squared error of the noise that the
// prediction implies, by which models of different prediction types compare.
ComputationGraph LossGraph(DiffusionModel& model, const NoiseSchedule& schedule, int64_t batch);
// LossGraph with gradients and updates: see ExportTrainingStep.
ComputationGraph TrainingStepGraph(DiffusionModel& model, const NoiseSchedule& schedule,
                                   int64_t batch, const Optimizer& optimizer, const Ema* ema);

}  // namespace calotype
