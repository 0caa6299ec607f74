// Euler's method on the probability-flow ODE, and its ancestral form, which adds noise at each step
// (Karras et al. 2022, arXiv:2206.00364, algorithm 2; k-diffusion's sample_euler and
// sample_euler_ancestral). Samples are x0 + sigma * noise; the model sees them divided by
// sqrt(sigma^2 + 1).
#pragma once

#include "diffusion/scheduler.h"

namespace calotype {

// One step from sigma to the next one, sigma':
//   gamma = min(s_churn / (number of sigmas - 1), sqrt(2) - 1) if s_tmin <= sigma <= s_tmax, else 0
//   s = sigma (1 + gamma);  x += s_noise noise sqrt(s^2 - sigma^2) if gamma > 0
//   x' = x + (x - x0) / s (sigma' - s)
// with x0 = x - s o (epsilon), o (sample), x / (sigma^2 + 1) - o sigma / sqrt(sigma^2 + 1) (v).
// Timesteps of linspace spacing are not rounded; with karras or exponential sigmas they are the
// ones that belong to the sigmas, with timestep_type continuous and v_prediction ln(sigma) / 4.
class EulerDiscreteScheduler : public Scheduler {
 public:
  // Errors: ValueError if config.type is not EulerDiscreteScheduler or an option is out of range.
  explicit EulerDiscreteScheduler(const SchedulerConfig& config,
                                  const SamplerOptions& options = {});

  // The largest sigma, or sqrt(sigma^2 + 1) with leading spacing.
  double init_noise_sigma() const override;
  Tensor ScaleModelInput(const Tensor& sample, int64_t i) const override;
  Tensor AddNoise(const Tensor& sample, const Tensor& noise, int64_t i) const override;
  bool NeedsNoise(int64_t i) const override;  // gamma > 0
  Tensor Step(const Tensor& model_output, int64_t i, const Tensor& sample,
              const Tensor& noise = {}) override;

 protected:
  struct Ancestral {};
  EulerDiscreteScheduler(const SchedulerConfig& config, Ancestral) : Scheduler(config) {}
  double Sigma(int64_t i) const;  // of step i; i = size(): behind the last
  // (x - x0) / s as a combination of x and o, for x whose noise has the level s >= sigma.
  struct Derivative {
    double of_sample, of_output;
  };
  Derivative DerivativeAt(double sigma, double s) const;

 private:
  std::vector<double> ChooseTimesteps(int64_t steps) override;
  double Gamma(int64_t i) const;

  SamplerOptions options_;
};

// x' = x + (x - x0) / sigma (down - sigma) + up noise, where up^2 = sigma'^2 (sigma^2 - sigma'^2) /
// sigma^2 and down^2 = sigma'^2 - up^2. Every step takes noise, also the last one, where up is 0:
// diffusers draws it, and so random streams agree.
class EulerAncestralDiscreteScheduler : public EulerDiscreteScheduler {
 public:
  // Errors: ValueError if config.type is not EulerAncestralDiscreteScheduler.
  explicit EulerAncestralDiscreteScheduler(const SchedulerConfig& config);

  bool NeedsNoise(int64_t i) const override;
  Tensor Step(const Tensor& model_output, int64_t i, const Tensor& sample,
              const Tensor& noise = {}) override;
};

}  // namespace calotype
