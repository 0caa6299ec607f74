#include "diffusion/euler.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/error.h"
#include "diffusion/sigmas.h"

namespace calotype {

EulerDiscreteScheduler::EulerDiscreteScheduler(const SchedulerConfig& config,
                                               const SamplerOptions& options)
    : Scheduler(config), options_(options) {
  Check(config.type == "EulerDiscreteScheduler",
        "EulerDiscreteScheduler: the config is of class {}", config.type);
  for (auto [name, value] :
       {std::pair{"s_churn", options.s_churn}, std::pair{"s_tmin", options.s_tmin},
        std::pair{"s_tmax", options.s_tmax}, std::pair{"s_noise", options.s_noise}}) {
    Check(value >= 0, "EulerDiscreteScheduler: {} is {}, expected a number >= 0", name, value);
  }
}

std::vector<double> EulerDiscreteScheduler::ChooseTimesteps(int64_t steps) {
  const std::vector<float> table = SigmaTable(noise_schedule());
  std::vector<double> timesteps;
  if (config().timestep_spacing == "linspace") {
    const double last = static_cast<double>(table.size() - 1);
    const double step = steps > 1 ? last / static_cast<double>(steps - 1) : 0;
    for (int64_t i = steps - 1; i >= 0; --i)
      timesteps.push_back(static_cast<float>(static_cast<double>(i) * step));
  } else {
    timesteps = Scheduler::ChooseTimesteps(steps);
  }

  std::vector<double> sigmas;
  if (config().interpolation_type == "log_linear") {
    // One more than there are steps, so that the last one leads to the smallest sigma, not to 0.
    sigmas = ExponentialSigmas(table.back(), table.front(), steps + 1);
  } else {
    for (double t : timesteps) sigmas.push_back(InterpolateSigma(table, t));
  }
  if (config().use_karras_sigmas || config().use_exponential_sigmas) {
    const double first = config().sigma_max.value_or(sigmas.front());
    const double last = config().sigma_min.value_or(sigmas.back());
    sigmas = config().use_karras_sigmas ? KarrasSigmas(first, last, steps)
                                        : ExponentialSigmas(first, last, steps);
    timesteps.clear();
    for (double sigma : sigmas)
      timesteps.push_back(static_cast<float>(TimestepOfSigma(table, sigma)));
  }
  sigmas.push_back(config().final_sigmas_type == "zero" ? 0 : table.front());
  sigmas_.assign(sigmas.begin(), sigmas.end());
  if (config().timestep_type == "continuous" && config().prediction_type == "v_prediction") {
    for (size_t i = 0; i < timesteps.size(); ++i)
      timesteps[i] = static_cast<float>(0.25 * std::log(double{sigmas_[i]}));
  }
  return timesteps;
}

double EulerDiscreteScheduler::Sigma(int64_t i) const { return sigmas_[static_cast<size_t>(i)]; }

double EulerDiscreteScheduler::init_noise_sigma() const {
  CheckIndex(0);
  const double largest = *std::max_element(sigmas_.begin(), sigmas_.end());
  return config().timestep_spacing == "leading" ? std::sqrt(largest * largest + 1) : largest;
}

Tensor EulerDiscreteScheduler::ScaleModelInput(const Tensor& sample, int64_t i) const {
  CheckIndex(i);
  return LinearCombination({{1 / std::sqrt(Sigma(i) * Sigma(i) + 1), sample}});
}

Tensor EulerDiscreteScheduler::AddNoise(const Tensor& sample, const Tensor& noise,
                                        int64_t i) const {
  CheckIndex(i);
  return LinearCombination({{1, sample}, {Sigma(i), noise}});
}

double EulerDiscreteScheduler::Gamma(int64_t i) const {
  CheckIndex(i);
  if (Sigma(i) < options_.s_tmin || Sigma(i) > options_.s_tmax) return 0;
  return std::min(options_.s_churn / static_cast<double>(sigmas_.size() - 1),
                  std::numbers::sqrt2 - 1);
}

bool EulerDiscreteScheduler::NeedsNoise(int64_t i) const { return Gamma(i) > 0; }

EulerDiscreteScheduler::Derivative EulerDiscreteScheduler::DerivativeAt(double sigma,
                                                                        double s) const {
  switch (noise_schedule().prediction_type()) {
    case PredictionType::kEpsilon:
      return {0, 1};
    case PredictionType::kSample:
      return {1 / s, -1 / s};
    case PredictionType::kVelocity: {
      const double variance = sigma * sigma + 1;
      return {(1 - 1 / variance) / s, sigma / std::sqrt(variance) / s};
    }
  }
  Fail<InternalError>("unknown prediction type");
}

Tensor EulerDiscreteScheduler::Step(const Tensor& model_output, int64_t i, const Tensor& sample,
                                    const Tensor& noise) {
  CheckStep(model_output, i, sample, noise);
  const double sigma = Sigma(i), s = sigma * (1 + Gamma(i));
  const double step = Sigma(i + 1) - s;
  const Derivative d = DerivativeAt(sigma, s);
  const double of_sample = 1 + d.of_sample * step;
  const double of_noise = options_.s_noise * std::sqrt(s * s - sigma * sigma);
  return LinearCombination({{of_sample, sample},
                            {d.of_output * step, model_output},
                            {noise.defined() ? of_sample * of_noise : 0, noise}});
}

EulerAncestralDiscreteScheduler::EulerAncestralDiscreteScheduler(const SchedulerConfig& config)
    : EulerDiscreteScheduler(config, Ancestral{}) {
  Check(config.type == "EulerAncestralDiscreteScheduler",
        "EulerAncestralDiscreteScheduler: the config is of class {}", config.type);
}

bool EulerAncestralDiscreteScheduler::NeedsNoise(int64_t i) const {
  CheckIndex(i);
  return true;
}

Tensor EulerAncestralDiscreteScheduler::Step(const Tensor& model_output, int64_t i,
                                             const Tensor& sample, const Tensor& noise) {
  CheckStep(model_output, i, sample, noise);
  const double from = Sigma(i), to = Sigma(i + 1);
  const double variance = to * to * (from * from - to * to) / (from * from);
  const double up = std::sqrt(variance), down = std::sqrt(to * to - variance);
  const Derivative d = DerivativeAt(from, from);
  const double step = down - from;
  return LinearCombination(
      {{1 + d.of_sample * step, sample}, {d.of_output * step, model_output}, {up, noise}});
}

}  // namespace calotype
