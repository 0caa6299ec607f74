// DPM-Solver and DPM-Solver++: multistep solvers of order 1 to 3 for the diffusion ODE, and of the
// SDE (Lu et al. 2022, arXiv:2206.00927 and arXiv:2211.01095).
#pragma once

#include "diffusion/scheduler.h"

namespace calotype {

// With alpha = 1 / sqrt(sigma^2 + 1), s = sigma alpha and lambda = ln(alpha / s), a step from
// sigma_0 to the next sigma has the length h = lambda' - lambda_0. Predictions m0 (the latest), m1,
// m2 are x0 (dpmsolver++, sde-dpmsolver++) or eps (dpmsolver, sde-dpmsolver), and
//   D0 = m0, D1 and D2 = the first and second divided differences in lambda, in units of h
//   x' = a x + b0 D0 + b1 D1 + b2 D2 + c noise
// dpmsolver++, order 1: x' = s' / s_0 x - alpha' (e^-h - 1) D0; the other forms are in the source.
// Order: config().solver_order, but 1 for the first step, 1 for the last one (final_sigmas_type
// zero, euler_at_final, or lower_order_final with fewer than 15 steps), and at most 2 for the
// second and (lower_order_final with fewer than 15 steps) the last but one.
// Timesteps leave out the one of the final sigma: linspace and leading take the first N of N + 1.
// With karras, exponential or lu spacing over the whole schedule they are the nearest ones.
class DpmSolverMultistepScheduler : public Scheduler {
 public:
  // Errors: ValueError if config.type is not DPMSolverMultistepScheduler.
  explicit DpmSolverMultistepScheduler(const SchedulerConfig& config);

  Tensor AddNoise(const Tensor& sample, const Tensor& noise, int64_t i) const override;
  bool NeedsNoise(int64_t i) const override;  // the sde algorithms
  Tensor Step(const Tensor& model_output, int64_t i, const Tensor& sample,
              const Tensor& noise = {}) override;

 private:
  struct Level {
    double alpha, s, lambda;
  };
  struct Coefficients {
    double a, b0, b1, b2, c;
  };
  // Errors: ValueError if two steps have the same noise level.
  std::vector<double> ChooseTimesteps(int64_t steps) override;
  Level LevelAt(int64_t i) const;
  // x0 or eps, whichever the algorithm uses.
  Tensor Convert(const Tensor& model_output, int64_t i, const Tensor& sample) const;
  int64_t OrderOf(int64_t i, int64_t call) const;
  Coefficients CoefficientsOf(int64_t order, const Level& from, const Level& to) const;

  std::vector<Tensor> history_;  // converted outputs, latest first
};

}  // namespace calotype
