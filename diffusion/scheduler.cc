#include "diffusion/scheduler.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "diffusion/ddim.h"
#include "diffusion/ddpm.h"

namespace calotype {
namespace {

// torch.quantile: linear interpolation between the two neighbours of position q (n - 1).
double Quantile(std::vector<double> values, double q) {
  const double position = q * static_cast<double>(values.size() - 1);
  const size_t low = static_cast<size_t>(position);
  const auto at = [&](size_t i) {
    std::nth_element(values.begin(), values.begin() + i, values.end());
    return values[i];
  };
  const double a = at(low), b = at(std::min(low + 1, values.size() - 1));
  return a + (b - a) * (position - static_cast<double>(low));
}

}  // namespace

Scheduler::Scheduler(const SchedulerConfig& config) : config_(config), noise_schedule_(config) {}

void Scheduler::SetTimesteps(int64_t steps) {
  const int64_t T = noise_schedule_.size();
  Check(steps >= 1 && steps <= T,
        "scheduler: {} sampling steps asked, expected 1 to num_train_timesteps = {}", steps, T);
  std::vector<int64_t> timesteps(steps);
  const double n = static_cast<double>(steps);
  for (int64_t i = 0; i < steps; ++i) {
    const double x = static_cast<double>(i);
    if (config_.timestep_spacing == "leading") {
      timesteps[i] = (steps - 1 - i) * (T / steps) + config_.steps_offset;
    } else if (config_.timestep_spacing == "linspace") {
      const double step = steps > 1 ? static_cast<double>(T - 1) / (n - 1) : 0;
      timesteps[i] = std::llrint((n - 1 - x) * step);
    } else {
      timesteps[i] = std::llrint(static_cast<double>(T) - x * (static_cast<double>(T) / n)) - 1;
    }
  }
  Check(timesteps.front() < T,
        "scheduler: steps_offset {} moves the first of {} timesteps to {}, but the last training "
        "timestep is {}; use fewer steps or no offset",
        config_.steps_offset, steps, timesteps.front(), T - 1);
  timesteps_ = std::move(timesteps);
}

const std::vector<int64_t>& Scheduler::timesteps() const {
  Check(!timesteps_.empty(), "scheduler: call SetTimesteps first");
  return timesteps_;
}

size_t Scheduler::IndexOf(int64_t timestep) const {
  const auto& list = timesteps();
  const auto found = std::find(list.begin(), list.end(), timestep);
  Check(found != list.end(),
        "scheduler: timestep {} is not one of the {} of SetTimesteps ({} to {})", timestep,
        list.size(), list.front(), list.back());
  return static_cast<size_t>(found - list.begin());
}

void Scheduler::CheckStep(const Tensor& model_output, int64_t timestep, const Tensor& sample,
                          const Tensor& noise) const {
  Check<ShapeError>(sample.defined() && sample.dtype() == DType::kF32 &&
                        sample.shape().rank() >= 2 && sample.elements() > 0,
                    "scheduler: the sample must be f32 [B, C, ...] and not empty, got {}",
                    sample.defined() ? ToString(sample.type()) : "an undefined tensor");
  Check<ShapeError>(model_output.defined() && model_output.type() == sample.type(),
                    "scheduler: the model output is {}, the sample {}; they must be equal",
                    model_output.defined() ? ToString(model_output.type()) : "undefined",
                    sample.type());
  if (NeedsNoise(timestep)) {
    Check(noise.defined(), "scheduler: the step at timestep {} needs noise; see NeedsNoise",
          timestep);
    Check<ShapeError>(noise.type() == sample.type(), "scheduler: the noise is {}, the sample {}",
                      noise.type(), sample.type());
  } else {
    Check(!noise.defined(), "scheduler: the step at timestep {} takes no noise; see NeedsNoise",
          timestep);
  }
}

std::vector<double> Scheduler::PredictSample(const Tensor& model_output, int64_t timestep,
                                             const Tensor& sample) const {
  const double alpha_bar = noise_schedule_.AlphaBar(timestep);
  const double signal = std::sqrt(alpha_bar), noise = std::sqrt(1 - alpha_bar);
  double cx = 0, co = 0;  // x0 = cx x + co o
  switch (noise_schedule_.prediction_type()) {
    case PredictionType::kEpsilon:
      Check<NumericError>(alpha_bar > 0,
                          "scheduler: alpha_bar is 0 at timestep {}, so predicted noise does not "
                          "determine the sample; use prediction_type v_prediction or sample",
                          timestep);
      cx = 1 / signal, co = -noise / signal;
      break;
    case PredictionType::kSample:
      cx = 0, co = 1;
      break;
    case PredictionType::kVelocity:
      cx = signal, co = -noise;
      break;
  }
  std::vector<double> x0(sample.elements());
  const float *x = sample.data(), *o = model_output.data();
  for (size_t i = 0; i < x0.size(); ++i) x0[i] = cx * x[i] + co * o[i];
  return x0;
}

void Scheduler::LimitSample(std::vector<double>& x0, int64_t batch) const {
  if (config_.thresholding) {
    const size_t size = x0.size() / static_cast<size_t>(batch);
    for (auto first = x0.begin(); first != x0.end(); first += size) {
      std::vector<double> magnitudes(first, first + size);
      for (double& m : magnitudes) m = std::fabs(m);
      const double quantile = Quantile(std::move(magnitudes), config_.dynamic_thresholding_ratio);
      const double s = std::clamp(quantile, 1.0, config_.sample_max_value);
      for (auto x = first; x != first + size; ++x) *x = std::clamp(*x, -s, s) / s;
    }
  } else if (config_.clip_sample) {
    const double range = config_.clip_sample_range;
    for (double& x : x0) x = std::clamp(x, -range, range);
  }
}

std::unique_ptr<Scheduler> MakeScheduler(const SchedulerConfig& config,
                                         const SamplerOptions& options) {
  if (config.type == "DDPMScheduler") {
    Check(options.eta == 0, "DDPMScheduler: eta is {}, but only DDIM has it", options.eta);
    Check(!options.use_clipped_model_output,
          "DDPMScheduler: use_clipped_model_output is set, but only DDIM has it");
    return std::make_unique<DdpmScheduler>(config);
  }
  Validate(config);  // names an unsupported class
  return std::make_unique<DdimScheduler>(config, options);
}

}  // namespace calotype
