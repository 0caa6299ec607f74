#include "diffusion/ddpm.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace calotype {
namespace {

// Channels [first, first + count) of x [B, C, ...].
Tensor SliceChannels(const Tensor& x, int64_t first, int64_t count) {
  const int64_t B = x.shape()[0], C = x.shape()[1], inner = x.elements() / (B * C);
  Tensor y(x.shape().With(1, count));
  for (int64_t b = 0; b < B; ++b) {
    const float* source = x.data() + (b * C + first) * inner;
    std::copy(source, source + count * inner, y.data() + b * count * inner);
  }
  return y;
}

}  // namespace

DdpmScheduler::DdpmScheduler(const SchedulerConfig& config) : Scheduler(config) {
  Check(config.type == "DDPMScheduler", "DdpmScheduler: the config is of class {}", config.type);
}

bool DdpmScheduler::NeedsNoise(int64_t timestep) const {
  IndexOf(timestep);  // checks it
  return timestep > 0;
}

double DdpmScheduler::AlphaBarBehind(int64_t timestep) const {
  const size_t next = IndexOf(timestep) + 1;
  return next < timesteps().size() ? noise_schedule().AlphaBar(timesteps()[next]) : 1.0;
}

double DdpmScheduler::Variance(int64_t timestep) const {
  const double alpha_bar = noise_schedule().AlphaBar(timestep);
  const double behind = AlphaBarBehind(timestep);
  const double beta = 1 - alpha_bar / behind;
  if (config().variance_type == "fixed_large") return beta;
  return std::max((1 - behind) / (1 - alpha_bar) * beta, 1e-20);
}

Tensor DdpmScheduler::Step(const Tensor& model_output, int64_t timestep, const Tensor& sample,
                           const Tensor& noise) const {
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
  CheckStep(output, timestep, sample, noise);

  const double alpha_bar = noise_schedule().AlphaBar(timestep);
  const double behind = AlphaBarBehind(timestep);
  const double alpha = alpha_bar / behind, beta = 1 - alpha;
  const double to_x0 = std::sqrt(behind) * beta / (1 - alpha_bar);
  const double to_x = std::sqrt(alpha) * (1 - behind) / (1 - alpha_bar);
  const double variance = Variance(timestep);
  const bool noisy = NeedsNoise(timestep);

  std::vector<double> x0 = PredictSample(output, timestep, sample);
  LimitSample(x0, sample.shape()[0]);
  Tensor result(sample.shape());
  const float* x = sample.data();
  float* y = result.data();
  for (size_t i = 0; i < x0.size(); ++i) {
    double value = to_x0 * x0[i] + to_x * x[i];
    if (noisy) {
      double v = variance;
      if (learned.defined()) {
        v = learned.data()[i];
        if (range) {
          const double f = (v + 1) / 2;
          v = std::exp(f * std::log(beta) + (1 - f) * std::log(variance));
        }
        Check<NumericError>(v >= 0, "DDPMScheduler: the model predicts variance {} at timestep {}",
                            v, timestep);
      }
      value += std::sqrt(v) * noise.data()[i];
    }
    y[i] = static_cast<float>(value);
  }
  return result;
}

}  // namespace calotype
