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

bool DdimScheduler::NeedsNoise(int64_t i) const {
  CheckIndex(i);
  return options_.eta > 0;
}

double DdimScheduler::AlphaBarBehind(int64_t i) const {
  // As the source does, also where the next timestep of the list is another one.
  const int64_t behind = TimestepAt(i) - noise_schedule().size() / size();
  if (behind >= 0) return noise_schedule().AlphaBar(behind);
  return *config().set_alpha_to_one ? 1.0 : noise_schedule().AlphaBar(0);
}

double DdimScheduler::Variance(int64_t i) const {
  const double alpha_bar = noise_schedule().AlphaBar(TimestepAt(i));
  const double behind = AlphaBarBehind(i);
  return (1 - behind) / (1 - alpha_bar) * (1 - alpha_bar / behind);
}

Tensor DdimScheduler::Step(const Tensor& model_output, int64_t i, const Tensor& sample,
                           const Tensor& noise) {
  CheckStep(model_output, i, sample, noise);
  const double alpha_bar = noise_schedule().AlphaBar(TimestepAt(i));
  const double behind = AlphaBarBehind(i);
  const double sigma = options_.eta > 0 ? options_.eta * std::sqrt(Variance(i)) : 0;
  const double signal = std::sqrt(alpha_bar), spread = std::sqrt(1 - alpha_bar);
  const double to_x0 = std::sqrt(behind);
  // Rounding may take this below 0 at eta 1.
  const double to_eps = std::sqrt(std::max(0.0, 1 - behind - sigma * sigma));

  std::vector<double> x0 = PredictSample(model_output, i, sample);
  // eps before x0 is limited: epsilon: o; sample: (x - signal o) / spread; v: signal o + spread x.
  const float *x = sample.data(), *o = model_output.data();
  std::vector<double> eps(x0.size());
  double cx = 0, co = 1;
  if (noise_schedule().prediction_type() == PredictionType::kSample) {
    cx = 1 / spread, co = -signal / spread;
  } else if (noise_schedule().prediction_type() == PredictionType::kVelocity) {
    cx = spread, co = signal;
  }
  for (size_t k = 0; k < eps.size(); ++k) eps[k] = cx * x[k] + co * o[k];

  LimitSample(x0, sample.shape()[0]);
  if (options_.use_clipped_model_output) {
    for (size_t k = 0; k < eps.size(); ++k) eps[k] = (x[k] - signal * x0[k]) / spread;
  }

  Tensor result(sample.shape());
  float* y = result.data();
  for (size_t k = 0; k < x0.size(); ++k) {
    double value = to_x0 * x0[k] + to_eps * eps[k];
    if (sigma > 0) value += sigma * noise.data()[k];
    y[k] = static_cast<float>(value);
  }
  return result;
}

}  // namespace calotype
