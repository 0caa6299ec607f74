// Scheduler: the interface of the samplers, which walk from noise to a sample in a few steps. A
// sampler chooses the timesteps and turns the model's output at one of them into the sample of the
// next:
//
//   scheduler->SetTimesteps(25);
//   Tensor x = the noise times scheduler->init_noise_sigma();
//   for (int64_t i = 0; i < scheduler->size(); ++i) {
//     Tensor output = Model(scheduler->ScaleModelInput(x, i), scheduler->timesteps()[i]);
//     Tensor noise = scheduler->NeedsNoise(i) ? random.NormalTensor(x.shape()) : Tensor();
//     x = scheduler->Step(output, i, x, noise);
//   }
//
// To start from a picture: x = AddNoise(picture, noise, i), and the loop from that i on. Steps are
// counted, because some samplers call the model twice at one timestep. Coefficients and the
// arithmetic of a step are double; samples are float32.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <span>
#include <string_view>
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

  const SchedulerConfig& config() const { return config_; }  // Resolved
  const NoiseSchedule& noise_schedule() const { return noise_schedule_; }

  // Chooses the timesteps of N steps in descending order and forgets the walk before. By
  // config().timestep_spacing (Lin et al. 2023, arXiv:2305.08891, table 2), rounding halves to
  // even:
  //   leading:  i * floor(T / N) + steps_offset for i = N-1..0
  //   linspace: N numbers from T-1 to 0
  //   trailing: T - i * T / N - 1 for i = 0..N-1 (exactly N; for some N, 61 and 103 among them,
  //             rounding makes diffusers append a timestep -1)
  // The classes say where they differ. Errors: ValueError unless 1 <= N <= T, or if steps_offset
  // puts a timestep behind T-1; after that one there are no timesteps, as before the first call.
  void SetTimesteps(int64_t steps);
  // These timesteps instead, DDPM only; forgets the walk before, too. Errors: UnsupportedError for
  // another class; ValueError unless they descend, within [0, T): then nothing changes.
  void SetCustomTimesteps(std::span<const int64_t> timesteps);
  // One for each call of the model; float32 numbers. Errors: ValueError before SetTimesteps.
  const std::vector<double>& timesteps() const;
  int64_t size() const { return static_cast<int64_t>(timesteps().size()); }
  // Noise level of each step and behind the last: Euler and DPM solvers; empty for the others.
  std::span<const float> sigmas() const { return sigmas_; }

  // Standard deviation of the first sample. Errors: ValueError before SetTimesteps.
  virtual double init_noise_sigma() const { return 1; }
  // What the model receives for the sample of step i. Errors: ValueError for an i outside
  // [0, size()).
  virtual Tensor ScaleModelInput(const Tensor& sample, int64_t i) const;
  // The sample of step i for a clean one: alpha * sample + sigma * noise with the class's alpha and
  // sigma. Errors: as ScaleModelInput; ShapeError.
  virtual Tensor AddNoise(const Tensor& sample, const Tensor& noise, int64_t i) const;
  // True if step i takes noise. Errors: as ScaleModelInput.
  virtual bool NeedsNoise(int64_t i) const = 0;

  // The sample of step i + 1, given the sample of step i and the model's output for it, [B, C, ...]
  // each. `noise`: normal numbers of the sample's shape where NeedsNoise, else undefined. PNDM and
  // the DPM solver remember earlier outputs: there a walk may start anywhere, and then takes every
  // step in order. Errors: as ScaleModelInput; ValueError for noise that is missing or not needed
  // and for steps out of order; ShapeError; NumericError where alpha_bar is 0 and the model
  // predicts noise, which says nothing about the sample then.
  virtual Tensor Step(const Tensor& model_output, int64_t i, const Tensor& sample,
                      const Tensor& noise = {}) = 0;

 protected:
  // The timesteps of N steps as SetTimesteps says; a class with others overrides it, and sets
  // sigmas_ and its own state there.
  virtual std::vector<double> ChooseTimesteps(int64_t steps);
  // The i-th timestep of the classes whose timesteps are whole numbers.
  int64_t TimestepAt(int64_t i) const;
  void CheckIndex(int64_t i) const;
  void CheckStep(const Tensor& model_output, int64_t i, const Tensor& sample,
                 const Tensor& noise) const;
  // Checks that step i starts a walk or follows the last one, and returns its number in the walk.
  int64_t Follow(int64_t i);
  // The x0 that the output stands for at this alpha_bar, not limited:
  //   epsilon: (x - sqrt(1 - alpha_bar) o) / sqrt(alpha_bar);  sample: o;
  //   v_prediction: sqrt(alpha_bar) x - sqrt(1 - alpha_bar) o.
  std::vector<double> PredictSample(const Tensor& model_output, int64_t i,
                                    const Tensor& sample) const;
  // Dynamic thresholding or clipping, in place, as the config says. Thresholding divides each
  // sample, clamped to [-s, s], by s = the quantile of its |x0|, at least 1, but at most
  // sample_max_value.
  void LimitSample(std::span<double> x0, int64_t batch) const;

  std::vector<float> sigmas_;

 private:
  SchedulerConfig config_;
  NoiseSchedule noise_schedule_;
  std::vector<double> timesteps_;
  int64_t first_ = -1, next_ = -1;  // steps of the walk
};

// The sum of factor * x over the terms, in double, rounded once. Terms of factor 0 may be
// undefined.
struct Term {
  double factor;
  const Tensor& x;
};
Tensor LinearCombination(std::initializer_list<Term> terms);

// Channels [first, first + count) of x, f32 [B, C, ...].
Tensor SliceChannels(const Tensor& x, int64_t first, int64_t count);

// Options of sampling that are not part of a scheduler_config.json. One that the class does not
// have is an error unless it is at its default.
struct SamplerOptions {
  // DDIM: noise of each step, 0 (none) to 1 (as much as DDPM).
  double eta = 0;
  // DDIM: derive the noise from the clipped x0 instead of the model's output.
  bool use_clipped_model_output = false;
  // Euler: noise added before each step whose sigma is in [s_tmin, s_tmax] (Karras et al. 2022,
  // arXiv:2206.00364, algorithm 2); >= 0.
  double s_churn = 0, s_tmin = 0, s_tmax = std::numeric_limits<double>::infinity(), s_noise = 1;
};

// The sampler of config.type. Errors: those of Validate and of the sampler; ValueError for an
// option that the class does not have.
std::unique_ptr<Scheduler> MakeScheduler(const SchedulerConfig& config,
                                         const SamplerOptions& options = {});

}  // namespace calotype
