// DDPM: ancestral sampling, which adds noise at each step (Ho et al. 2020, arXiv:2006.11239).
#pragma once

#include "diffusion/scheduler.h"

namespace calotype {

// One step, equation 7, from timestep t to the next one t' of timesteps() (alpha_bar' = 1 behind
// the last), with alpha = alpha_bar / alpha_bar' and beta = 1 - alpha:
//   mu = sqrt(alpha_bar') beta / (1 - alpha_bar) x0 + sqrt(alpha) (1 - alpha_bar') / (1 -
//   alpha_bar) x x' = mu + sqrt(variance) noise if t > 0, mu if t = 0
// variance_type: fixed_small and fixed_small_log: small = (1 - alpha_bar') / (1 - alpha_bar) beta,
// at least 1e-20; fixed_large: beta; learned and learned_range: the model has 2C output channels,
// the second half v gives the variance itself, or exp(f ln(beta) + (1 - f) ln(small)) with f = (v +
// 1) / 2 (Nichol & Dhariwal 2021, arXiv:2102.09672).
class DdpmScheduler : public Scheduler {
 public:
  // Errors: ValueError if config.type is not DDPMScheduler.
  explicit DdpmScheduler(const SchedulerConfig& config);

  bool NeedsNoise(int64_t i) const override;  // timestep > 0
  Tensor Step(const Tensor& model_output, int64_t i, const Tensor& sample,
              const Tensor& noise = {}) override;

  // The variance of step i if variance_type is not learned. Errors: as Step.
  double Variance(int64_t i) const;

 private:
  double AlphaBarBehind(int64_t i) const;
};

}  // namespace calotype
