// Scheduler: the interface of the samplers, which walk from noise to a sample in a few steps. A
// sampler chooses the timesteps and turns the model's output at one of them into the sample of the
// next:
//
//   scheduler->SetTimesteps(25);
//   for (int64_t t : scheduler->timesteps()) {
//     Tensor noise = scheduler->NeedsNoise(t) ? random.NormalTensor(x.shape()) : Tensor();
//     x = scheduler->Step(Model(x, t), t, x, noise);
//   }
//
// Coefficients and the arithmetic of a step are double; samples are float32.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/tensor.h"
#include "diffusion/noise_schedule.h"
#include "diffusion/scheduler_config.h"

namespace calotype {

class Scheduler {
 public:
  // Errors: those of Validate.
  explicit Scheduler(const SchedulerConfig& config);
  virtual ~Scheduler() = default;
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  const SchedulerConfig& config() const { return config_; }
  const NoiseSchedule& noise_schedule() const { return noise_schedule_; }

  // Chooses N timesteps in descending order, by config().timestep_spacing (Lin et al. 2023,
  // arXiv:2305.08891, table 2), rounding halves to even:
  //   leading:  i * floor(T / N) + steps_offset for i = N-1..0
  //   linspace: N numbers from T-1 to 0
  //   trailing: T - i * T / N - 1 for i = 0..N-1 (exactly N; for some N, 61 and 103 among them,
  //             rounding makes diffusers append a timestep -1)
  // Errors: ValueError unless 1 <= N <= T, or if steps_offset puts a timestep behind T-1.
  void SetTimesteps(int64_t steps);
  // Errors: ValueError before SetTimesteps.
  const std::vector<int64_t>& timesteps() const;

  // True if Step at `timestep` adds noise. Errors: as Step.
  virtual bool NeedsNoise(int64_t timestep) const = 0;

  // The sample of the timestep behind `timestep`, given the sample at `timestep` and the model's
  // output for it, [B, C, ...] each. `noise`: normal numbers of the sample's shape where
  // NeedsNoise, else undefined. Errors: ValueError before SetTimesteps, for a timestep that is not
  // one of timesteps(), or for noise that is missing or not needed; ShapeError; NumericError where
  // alpha_bar is 0 and the model predicts noise, which says nothing about the sample then.
  virtual Tensor Step(const Tensor& model_output, int64_t timestep, const Tensor& sample,
                      const Tensor& noise = {}) const = 0;

 protected:
  // Position of `timestep` in timesteps().
  size_t IndexOf(int64_t timestep) const;
  void CheckStep(const Tensor& model_output, int64_t timestep, const Tensor& sample,
                 const Tensor& noise) const;
  // The x0 that the output stands for, not limited:
  //   epsilon: (x - sqrt(1 - alpha_bar) o) / sqrt(alpha_bar);  sample: o;
  //   v_prediction: sqrt(alpha_bar) x - sqrt(1 - alpha_bar) o.
  std::vector<double> PredictSample(const Tensor& model_output, int64_t timestep,
                                    const Tensor& sample) const;
  // Dynamic thresholding or clipping, in place, as the config says. Thresholding divides each
  // sample, clamped to [-s, s], by s = the quantile of its |x0|, itself clamped to [1,
  // sample_max_value].
  void LimitSample(std::vector<double>& x0, int64_t batch) const;

 private:
  SchedulerConfig config_;
  NoiseSchedule noise_schedule_;
  std::vector<int64_t> timesteps_;
};

// Options of sampling that are not part of a scheduler_config.json.
struct SamplerOptions {
  // DDIM: noise of each step, 0 (none) to 1 (as much as DDPM). Error for DDPM unless 0.
  double eta = 0;
  // DDIM: derive the noise from the clipped x0 instead of the model's output. Error for DDPM if
  // true.
  bool use_clipped_model_output = false;
};

// The sampler of config.type. Errors: those of Validate and of the sampler.
std::unique_ptr<Scheduler> MakeScheduler(const SchedulerConfig& config,
                                         const SamplerOptions& options = {});

}  // namespace calotype
