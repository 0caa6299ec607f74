#include "diffusion/ddim.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace calotype {

DdimScheduler::DdimScheduler(const SchedulerConfig& config, const SamplerOptions& options)
    : Scheduler(config), options_(options) {
  Check(config.type == "DDIMScheduler", "DdimScheduler: the config is of class {}", config.type);
  Check(options.eta >= 0 && options.eta <= 1, "DDIMScheduler: eta is {}, expected [0, 1]",
        options.eta);
}

bool DdimScheduler::NeedsNoise(int64_t timestep) const {
  IndexOf(timestep);  // checks it
  return options_.eta > 0;
}

double DdimScheduler::AlphaBarBehind(int64_t timestep) const {
  // As the source does, also where the next timestep of the list is another one.
  const int64_t behind =
      timestep - noise_schedule().size() / static_cast<int64_t>(timesteps().size());
  if (behind >= 0) return noise_schedule().AlphaBar(behind);
  return config().set_alpha_to_one ? 1.0 : noise_schedule().AlphaBar(0);
}

double DdimScheduler::Variance(int64_t timestep) const {
  IndexOf(timestep);
  const double alpha_bar = noise_schedule().AlphaBar(timestep);
  const double behind = AlphaBarBehind(timestep);
  return (1 - behind) / (1 - alpha_bar) * (1 - alpha_bar / behind);
}

Tensor DdimScheduler::Step(const Tensor& model_output, int64_t timestep, const Tensor& sample,
                           const Tensor& noise) const {
  CheckStep(model_output, timestep, sample, noise);
  const double alpha_bar = noise_schedule().AlphaBar(timestep);
  const double behind = AlphaBarBehind(timestep);
  const double sigma = options_.eta > 0 ? options_.eta * std::sqrt(Variance(timestep)) : 0;
  const double signal = std::sqrt(alpha_bar), spread = std::sqrt(1 - alpha_bar);
  const double to_x0 = std::sqrt(behind);
  // Rounding may take this below 0 at eta 1.
  const double to_eps = std::sqrt(std::max(0.0, 1 - behind - sigma * sigma));

  std::vector<double> x0 = PredictSample(model_output, timestep, sample);
  // eps before x0 is limited: epsilon: o; sample: (x - signal o) / spread; v: signal o + spread x.
  const float *x = sample.data(), *o = model_output.data();
  std::vector<double> eps(x0.size());
  double cx = 0, co = 1;
  if (noise_schedule().prediction_type() == PredictionType::kSample) {
    cx = 1 / spread, co = -signal / spread;
  } else if (noise_schedule().prediction_type() == PredictionType::kVelocity) {
    cx = spread, co = signal;
  }
  for (size_t i = 0; i < eps.size(); ++i) eps[i] = cx * x[i] + co * o[i];

  LimitSample(x0, sample.shape()[0]);
  if (options_.use_clipped_model_output) {
    for (size_t i = 0; i < eps.size(); ++i) eps[i] = (x[i] - signal * x0[i]) / spread;
  }

  Tensor result(sample.shape());
  float* y = result.data();
  for (size_t i = 0; i < x0.size(); ++i) {
    double value = to_x0 * x0[i] + to_eps * eps[i];
    if (sigma > 0) value += sigma * noise.data()[i];
    y[i] = static_cast<float>(value);
  }
  return result;
}

}  // namespace calotype
