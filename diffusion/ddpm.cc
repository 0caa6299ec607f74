#include "diffusion/ddpm.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace calotype {

DdpmScheduler::DdpmScheduler(const SchedulerConfig& config) : Scheduler(config) {
  Check(config.type == "DDPMScheduler", "DdpmScheduler: the config is of class {}", config.type);
}

bool DdpmScheduler::NeedsNoise(int64_t i) const { return TimestepAt(i) > 0; }

double DdpmScheduler::AlphaBarBehind(int64_t i) const {
  return i + 1 < size() ? noise_schedule().AlphaBar(TimestepAt(i + 1)) : 1.0;
}

double DdpmScheduler::Variance(int64_t i) const {
  const double alpha_bar = noise_schedule().AlphaBar(TimestepAt(i));
  const double behind = AlphaBarBehind(i);
  const double beta = 1 - alpha_bar / behind;
  if (config().variance_type == "fixed_large") return beta;
  return std::max((1 - behind) / (1 - alpha_bar) * beta, 1e-20);
}

Tensor DdpmScheduler::Step(const Tensor& model_output, int64_t i, const Tensor& sample,
                           const Tensor& noise) {
  const bool range = config().variance_type == "learned_range";
  Tensor output = model_output, learned;
  if (range || config().variance_type == "learned") {
    const bool fits = sample.defined() && sample.shape().rank() >= 2 && model_output.defined() &&
                      model_output.dtype() == DType::kF32 &&
                      model_output.shape() == sample.shape().With(1, 2 * sample.shape()[1]);
    Check<ShapeError>(fits,
                      "DDPMScheduler: with variance_type {} the model output must have twice the "
                      "sample's channels",
                      config().variance_type);
    const int64_t C = sample.shape()[1];
    output = SliceChannels(model_output, 0, C);
    learned = SliceChannels(model_output, C, C);
  }
  CheckStep(output, i, sample, noise);

  const double alpha_bar = noise_schedule().AlphaBar(TimestepAt(i));
  const double behind = AlphaBarBehind(i);
  const double alpha = alpha_bar / behind, beta = 1 - alpha;
  const double to_x0 = std::sqrt(behind) * beta / (1 - alpha_bar);
  const double to_x = std::sqrt(alpha) * (1 - behind) / (1 - alpha_bar);
  const double variance = Variance(i);
  const bool noisy = NeedsNoise(i);

  std::vector<double> x0 = PredictSample(output, i, sample);
  LimitSample(x0, sample.shape()[0]);
  Tensor result(sample.shape());
  const float* x = sample.data();
  float* y = result.data();
  for (size_t k = 0; k < x0.size(); ++k) {
    double value = to_x0 * x0[k] + to_x * x[k];
    if (noisy) {
      double v = variance;
      if (learned.defined()) {
        v = learned.data()[k];
        if (range) {
          const double f = (v + 1) / 2;
          v = std::exp(f * std::log(beta) + (1 - f) * std::log(variance));
        }
        Check<NumericError>(v >= 0, "DDPMScheduler: the model predicts variance {} at timestep {}",
                            v, TimestepAt(i));
      }
      value += std::sqrt(v) * noise.data()[k];
    }
    y[k] = static_cast<float>(value);
  }
  return result;
}

}  // namespace calotype
