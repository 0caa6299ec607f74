// NoiseSchedule: the forward process of a diffusion model. x_t = sqrt(alpha_bar_t) x0 +
// sqrt(1 - alpha_bar_t) n for t = 0..T-1, with alpha_bar_t the running product of 1 - beta (Ho et
// al. 2020, arXiv:2006.11239). Gives noisy samples and training targets, eagerly on tensors and as
// graph nodes; both give the same bits.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "core/tensor.h"
#include "diffusion/scheduler_config.h"
#include "graph/graph.h"

namespace calotype {

// What the model is trained to output: the noise n, the clean sample x0, or the velocity
// v = sqrt(alpha_bar) n - sqrt(1 - alpha_bar) x0 (Salimans & Ho 2022, arXiv:2202.00512).
enum class PredictionType { kEpsilon, kSample, kVelocity };

// The T betas of a config in float32, rounded as diffusers rounds them.
// Errors: those of Validate.
std::vector<float> Betas(const SchedulerConfig& config);

class NoiseSchedule {
 public:
  // Errors: those of Validate.
  explicit NoiseSchedule(const SchedulerConfig& config);

  int64_t size() const { return static_cast<int64_t>(alphas_cumprod_.size()); }  // T
  PredictionType prediction_type() const { return prediction_type_; }
  // alpha_bar_t for t = 0..T-1, decreasing. Where rescale_betas_zero_snr makes the last one 0, it
  // is 2^-24 for the Euler and DPM solvers.
  std::span<const float> alphas_cumprod() const { return alphas_cumprod_; }
  // alpha_bar of one timestep. Errors: ValueError outside [0, T).
  double AlphaBar(int64_t timestep) const;

  // sample, noise: f32 [B, ...]; timesteps: i64 [B], or [1] for one timestep for all samples.
  // Errors: ShapeError; ValueError for a timestep outside [0, T).
  Tensor AddNoise(const Tensor& sample, const Tensor& noise, const Tensor& timesteps) const;
  Tensor Velocity(const Tensor& sample, const Tensor& noise, const Tensor& timesteps) const;
  // What the model should output for AddNoise's result: noise, sample or Velocity.
  Tensor Target(const Tensor& sample, const Tensor& noise, const Tensor& timesteps) const;

  // The same as nodes. The timesteps are an i64 value, usually a declared input; one outside [0, T)
  // is a ValueError when the graph runs.
  Value AddNoise(Value sample, Value noise, Value timesteps) const;
  Value Velocity(Value sample, Value noise, Value timesteps) const;
  Value Target(Value sample, Value noise, Value timesteps) const;

 private:
  Tensor Mix(std::string_view what, const Tensor& a, const Tensor& b, const Tensor& timesteps,
             bool velocity) const;
  // table[timesteps] with the shape [B, 1, ...] that broadcasts over `like`.
  Value Coefficient(const Tensor& table, Value timesteps, Value like) const;

  std::vector<float> alphas_cumprod_;
  PredictionType prediction_type_;
  Tensor signal_, noise_;  // [T]: sqrt(alpha_bar), sqrt(1 - alpha_bar)
};

}  // namespace calotype
