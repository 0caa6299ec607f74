// PNDM: pseudo numerical methods for diffusion models (Liu et al. 2022, arXiv:2202.09778), the
// sampler that Stable Diffusion's files name: a linear multistep method over the last four
// predictions.
#pragma once

#include "diffusion/scheduler.h"

namespace calotype {

// All updates are the transfer of equation 11 from timestep t to t', with alpha_bar' for t' < 0 as
// in DDIM:
//   x' = sqrt(alpha_bar' / alpha_bar) x - (alpha_bar' - alpha_bar) eps
//        / (alpha_bar sqrt(1 - alpha_bar') + sqrt(alpha_bar (1 - alpha_bar) alpha_bar'))
// Multistep (e1 the latest prediction, d = floor(T / N)): first a step of Heun's method, which
// calls the model twice at the second timestep, so size() is N + 1; then eps = (3 e1 - e2) / 2,
// (23 e1 - 16 e2 + 5 e3) / 12 and (55 e1 - 59 e2 + 37 e3 - 9 e4) / 24.
// Without skip_prk_steps the first three steps are Runge-Kutta steps of four calls each, eps =
// (e1 + 2 e2 + 2 e3 + e4) / 6, and size() is N + 9.
class PndmScheduler : public Scheduler {
 public:
  // Errors: ValueError if config.type is not PNDMScheduler.
  explicit PndmScheduler(const SchedulerConfig& config);

  bool NeedsNoise(int64_t i) const override;  // never
  Tensor Step(const Tensor& model_output, int64_t i, const Tensor& sample,
              const Tensor& noise = {}) override;

 private:
  // Errors: ValueError for fewer than 4 steps without skip_prk_steps.
  std::vector<double> ChooseTimesteps(int64_t steps) override;
  Tensor RungeKuttaStep(const Tensor& model_output, int64_t call, int64_t timestep,
                        const Tensor& sample);
  Tensor MultistepStep(const Tensor& model_output, int64_t call, int64_t timestep,
                       const Tensor& sample);
  // `output`: a combination of model outputs, converted to eps where the model predicts v.
  Tensor Transfer(const Tensor& sample, const Tensor& output, int64_t from, int64_t to) const;

  int64_t stride_ = 0;           // d
  std::vector<int64_t> prk_;     // timesteps of the Runge-Kutta calls
  std::vector<Tensor> history_;  // predictions, latest last
  std::vector<Tensor> group_;    // outputs of the Runge-Kutta step so far
  Tensor first_;                 // sample at the start of the Runge-Kutta or Heun step
};

}  // namespace calotype
