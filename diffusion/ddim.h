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

  bool NeedsNoise(int64_t timestep) const override;
  Tensor Step(const Tensor& model_output, int64_t timestep, const Tensor& sample,
              const Tensor& noise = {}) const override;

  // sigma^2 at eta 1 of the step from `timestep`. Errors: as Step.
  double Variance(int64_t timestep) const;

 private:
  double AlphaBarBehind(int64_t timestep) const;

  SamplerOptions options_;
};

}  // namespace calotype
