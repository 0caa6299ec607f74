#include "diffusion/pndm.h"

#include <cmath>

#include "core/error.h"

namespace calotype {

PndmScheduler::PndmScheduler(const SchedulerConfig& config) : Scheduler(config) {
  Check(config.type == "PNDMScheduler", "PndmScheduler: the config is of class {}", config.type);
}

std::vector<double> PndmScheduler::ChooseTimesteps(int64_t steps) {
  Check(config().skip_prk_steps || steps >= 4,
        "PNDMScheduler: {} steps are fewer than the 4 that Runge-Kutta needs; use more, or "
        "skip_prk_steps",
        steps);
  std::vector<double> plain = Scheduler::ChooseTimesteps(steps);
  const size_t n = plain.size();
  stride_ = noise_schedule().size() / steps;
  prk_.clear(), history_.clear(), group_.clear();
  first_ = Tensor();
  if (config().skip_prk_steps) {
    if (n > 1) plain.insert(plain.begin() + 1, plain[1]);
    return plain;
  }
  // A Runge-Kutta step from t visits t, t - d/2 twice, and t - d; only its first call is at a
  // timestep of the list, the others are counted from the next one of the list.
  const int64_t half = stride_ / 2;
  std::vector<double> timesteps;
  for (size_t k = 0; k < 3; ++k) {
    const double middle = plain[k + 1] + static_cast<double>(half);
    timesteps.insert(timesteps.end(), {plain[k], middle, middle, plain[k + 1]});
  }
  for (double t : timesteps) prk_.push_back(std::llrint(t));
  timesteps.insert(timesteps.end(), plain.begin() + 3, plain.end());
  return timesteps;
}

bool PndmScheduler::NeedsNoise(int64_t i) const {
  CheckIndex(i);
  return false;
}

Tensor PndmScheduler::Transfer(const Tensor& sample, const Tensor& output, int64_t from,
                               int64_t to) const {
  const double a = noise_schedule().AlphaBar(from);
  const double b = to >= 0                      ? noise_schedule().AlphaBar(to)
                   : *config().set_alpha_to_one ? 1.0
                                                : noise_schedule().AlphaBar(0);
  const double factor = (a - b) / (a * std::sqrt(1 - b) + std::sqrt(a * (1 - a) * b));
  const double scale = std::sqrt(b / a);
  if (noise_schedule().prediction_type() == PredictionType::kVelocity) {
    // eps = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x
    return LinearCombination(
        {{scale + factor * std::sqrt(1 - a), sample}, {factor * std::sqrt(a), output}});
  }
  return LinearCombination({{scale, sample}, {factor, output}});
}

Tensor PndmScheduler::Step(const Tensor& model_output, int64_t i, const Tensor& sample,
                           const Tensor& noise) {
  CheckStep(model_output, i, sample, noise);
  const int64_t call = Follow(i), timestep = TimestepAt(i);
  return call < static_cast<int64_t>(prk_.size())
             ? RungeKuttaStep(model_output, call, timestep, sample)
             : MultistepStep(model_output, call, timestep, sample);
}

Tensor PndmScheduler::RungeKuttaStep(const Tensor& model_output, int64_t call, int64_t timestep,
                                     const Tensor& sample) {
  if (call % 4 == 0) {
    history_.push_back(model_output.Clone());
    group_.clear();
    first_ = sample.Clone();
  }
  group_.push_back(model_output.Clone());
  const int64_t from = prk_[static_cast<size_t>(call / 4 * 4)];
  const int64_t to = call % 2 == 0 ? timestep - stride_ / 2 : timestep;
  if (call % 4 < 3) return Transfer(first_, model_output, from, to);
  const Tensor mean = LinearCombination(
      {{1.0 / 6, group_[0]}, {1.0 / 3, group_[1]}, {1.0 / 3, group_[2]}, {1.0 / 6, group_[3]}});
  return Transfer(first_, mean, from, to);
}

Tensor PndmScheduler::MultistepStep(const Tensor& model_output, int64_t call, int64_t timestep,
                                    const Tensor& sample) {
  if (call == 1) {
    // The second half of Heun's step, from the first sample again; its output is not remembered.
    const Tensor mean = LinearCombination({{0.5, model_output}, {0.5, history_.back()}});
    return Transfer(first_, mean, timestep + stride_, timestep);
  }
  if (history_.size() > 3) history_.erase(history_.begin(), history_.end() - 3);
  history_.push_back(model_output.Clone());
  const auto e = [&](size_t k) -> const Tensor& { return history_[history_.size() - k]; };
  Tensor output = model_output;
  switch (history_.size()) {
    case 1:
      first_ = sample.Clone();
      break;
    case 2:
      output = LinearCombination({{1.5, e(1)}, {-0.5, e(2)}});
      break;
    case 3:
      output = LinearCombination({{23.0 / 12, e(1)}, {-16.0 / 12, e(2)}, {5.0 / 12, e(3)}});
      break;
    default:
      output = LinearCombination(
          {{55.0 / 24, e(1)}, {-59.0 / 24, e(2)}, {37.0 / 24, e(3)}, {-9.0 / 24, e(4)}});
  }
  return Transfer(sample, output, timestep, timestep - stride_);
}

}  // namespace calotype
