// DDIM: deterministic sampling, or with eta > 0 stochastic (Song et al. 2020, arXiv:2010.02502).
#pragma once

#include "diffusion/scheduler.h"

namespace calotype {

// One step, equations 12 and 16, from timestep t to t' = t - floor(T / N):
//   x' = sqrt(alpha_bar') x0 + sqrt(1 - alpha_bar' - sigma^2) eps + sigma noise
//   sigma = eta sqrt((1 - alpha_bar') / (1 - alpha_bar) (1 - alpha_bar / alpha_bar'))
// where x0 and eps come from the model's output, and alpha_bar' for t' < 0 is 1 or, without
// set_alpha_to_one, alpha_bar of timestep 0.
class DdimScheduler : public Scheduler {
 public:
  // Errors: ValueError if config.type is not DDIMScheduler or eta is outside [0, 1].
  explicit DdimScheduler(const SchedulerConfig& config, const SamplerOptions& options = {});

  bool NeedsNoise(int64_t i) const override;
  Tensor Step(const Tensor& model_output, int64_t i, const Tensor& sample,
              const Tensor& noise = {}) override;

  // sigma^2 of step i at eta 1. Errors: as Step.
  double Variance(int64_t i) const;

 private:
  double AlphaBarBehind(int64_t i) const;

  SamplerOptions options_;
};

}  // namespace calotype
