#include "diffusion/dpm_solver.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "diffusion/sigmas.h"

namespace calotype {
namespace {

// phi_1(x) = (e^x - 1) / x - 1 and phi_2(x) = phi_1(x) / x - 1/2, by their series near 0.
double Phi1(double x) {
  if (std::fabs(x) < 1e-3) return x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5)));
  return std::expm1(x) / x - 1;
}
double Phi2(double x) {
  if (std::fabs(x) < 1e-3) return x / 6 * (1 + x / 4 * (1 + x / 5));
  return Phi1(x) / x - 0.5;
}

}  // namespace

DpmSolverMultistepScheduler::DpmSolverMultistepScheduler(const SchedulerConfig& config)
    : Scheduler(config) {
  Check(config.type == "DPMSolverMultistepScheduler",
        "DpmSolverMultistepScheduler: the config is of class {}", config.type);
}

std::vector<double> DpmSolverMultistepScheduler::ChooseTimesteps(int64_t steps) {
  const SchedulerConfig& c = config();
  const std::vector<float> table = SigmaTable(noise_schedule());
  // Without the timesteps whose lambda = -ln(sigma) is below the bound.
  int64_t last = 0;
  while (last < static_cast<int64_t>(table.size()) &&
         -std::log(double{table[static_cast<size_t>(last)]}) >= c.lambda_min_clipped) {
    ++last;
  }
  Check(last >= 1, "DPMSolverMultistepScheduler: lambda_min_clipped {} leaves no timestep",
        c.lambda_min_clipped);

  std::vector<double> timesteps, sigmas;
  const double n = static_cast<double>(steps), T = static_cast<double>(table.size());
  const double first = static_cast<double>(last);
  if (c.timestep_spacing == "linspace") {
    for (int64_t i = steps; i > 0; --i)
      timesteps.push_back(std::nearbyint(static_cast<double>(i) * ((first - 1) / n)));
  } else if (c.timestep_spacing == "leading") {
    const int64_t stride = last / (steps + 1);
    for (int64_t i = steps; i > 0; --i)
      timesteps.push_back(static_cast<double>(i * stride + c.steps_offset));
  } else {
    for (int64_t i = 0; i < steps && i * static_cast<int64_t>(table.size()) < last * steps; ++i)
      timesteps.push_back(std::nearbyint(first - static_cast<double>(i) * (T / n)) - 1);
  }
  if (c.use_karras_sigmas) {
    sigmas = KarrasSigmas(table.back(), table.front(), steps);
  } else if (c.use_exponential_sigmas || c.use_lu_lambdas) {
    sigmas = ExponentialSigmas(table.back(), table.front(), steps);  // both uniform in lambda
  } else {
    for (double t : timesteps) sigmas.push_back(InterpolateSigma(table, t));
  }
  if (c.use_karras_sigmas || c.use_exponential_sigmas || c.use_lu_lambdas) {
    const bool round = !c.use_exponential_sigmas && c.beta_schedule != "squaredcos_cap_v2";
    timesteps.clear();
    for (double sigma : sigmas) {
      const double t = TimestepOfSigma(table, sigma);
      timesteps.push_back(round ? std::nearbyint(t) : std::floor(t));
    }
  }
  sigmas.push_back(c.final_sigmas_type == "zero" ? 0 : table.front());
  sigmas_.assign(sigmas.begin(), sigmas.end());
  for (size_t i = 0; i + 2 < sigmas_.size(); ++i) {
    Check(sigmas_[i] > sigmas_[i + 1],
          "DPMSolverMultistepScheduler: steps {} and {} of {} have the same noise level {}; use "
          "fewer steps",
          i, i + 1, steps, sigmas_[i]);
  }
  history_.clear();
  return timesteps;
}

DpmSolverMultistepScheduler::Level DpmSolverMultistepScheduler::LevelAt(int64_t i) const {
  const double sigma = sigmas_[static_cast<size_t>(i)];
  const double alpha = 1 / std::sqrt(sigma * sigma + 1);
  return {alpha, sigma * alpha, -std::log(sigma)};
}

Tensor DpmSolverMultistepScheduler::AddNoise(const Tensor& sample, const Tensor& noise,
                                             int64_t i) const {
  CheckIndex(i);
  const Level level = LevelAt(i);
  return LinearCombination({{level.alpha, sample}, {level.s, noise}});
}

bool DpmSolverMultistepScheduler::NeedsNoise(int64_t i) const {
  CheckIndex(i);
  return config().algorithm_type.starts_with("sde");
}

Tensor DpmSolverMultistepScheduler::Convert(const Tensor& o, int64_t i, const Tensor& x) const {
  const auto [alpha, s, lambda] = LevelAt(i);
  const PredictionType type = noise_schedule().prediction_type();
  const bool to_x0 = config().algorithm_type.ends_with("++");
  if (!to_x0 && !config().thresholding) {
    switch (type) {
      case PredictionType::kEpsilon:
        return o.Clone();
      case PredictionType::kSample:
        return LinearCombination({{1 / s, x}, {-alpha / s, o}});
      case PredictionType::kVelocity:
        return LinearCombination({{s, x}, {alpha, o}});
    }
  }
  Tensor x0 = type == PredictionType::kEpsilon
                  ? LinearCombination({{1 / alpha, x}, {-s / alpha, o}})
              : type == PredictionType::kSample ? o.Clone()
                                                : LinearCombination({{alpha, x}, {-s, o}});
  if (config().thresholding) {
    std::vector<double> values(x0.values().begin(), x0.values().end());
    LimitSample(values, x.shape()[0]);
    std::transform(values.begin(), values.end(), x0.data(),
                   [](double v) { return static_cast<float>(v); });
  }
  return to_x0 ? x0 : LinearCombination({{1 / s, x}, {-alpha / s, x0}});
}

int64_t DpmSolverMultistepScheduler::OrderOf(int64_t i, int64_t call) const {
  const SchedulerConfig& c = config();
  const bool lower = c.lower_order_final && size() < 15;
  if (i == size() - 1 && (c.euler_at_final || lower || c.final_sigmas_type == "zero")) return 1;
  const int64_t order = std::min(c.solver_order, call + 1);
  return i == size() - 2 && lower ? std::min<int64_t>(order, 2) : order;
}

DpmSolverMultistepScheduler::Coefficients DpmSolverMultistepScheduler::CoefficientsOf(
    int64_t order, const Level& from, const Level& to) const {
  const double h = to.lambda - from.lambda;  // infinite where the last sigma is 0
  const std::string& algorithm = config().algorithm_type;
  // The midpoint form of order 2 evaluates D1 in the middle; heun and order 3 integrate it.
  const bool midpoint = order == 2 && config().solver_type == "midpoint";
  Coefficients r;
  if (algorithm == "dpmsolver++") {
    r.a = to.s / from.s;
    r.b0 = -to.alpha * std::expm1(-h);
    r.b1 = midpoint ? r.b0 / 2 : -to.alpha * Phi1(-h);
    r.b2 = -to.alpha * Phi2(-h);
    r.c = 0;
  } else if (algorithm == "dpmsolver") {
    r.a = to.alpha / from.alpha;
    r.b0 = -to.s * std::expm1(h);
    r.b1 = midpoint ? r.b0 / 2 : -to.s * Phi1(h);
    r.b2 = -to.s * Phi2(h);
    r.c = 0;
  } else if (algorithm == "sde-dpmsolver++") {
    r.a = to.s / from.s * std::exp(-h);
    r.b0 = -to.alpha * std::expm1(-2 * h);
    r.b1 = midpoint ? r.b0 / 2 : -to.alpha * Phi1(-2 * h);
    r.b2 = -to.alpha * (Phi2(-2 * h) + 1);  // the 1 is a slip of the source that files rely on
    r.c = to.s * std::sqrt(-std::expm1(-2 * h));
  } else {  // sde-dpmsolver, which has no order 3
    r.a = to.alpha / from.alpha;
    r.b0 = -2 * to.s * std::expm1(h);
    r.b1 = midpoint ? r.b0 / 2 : -2 * to.s * Phi1(h);
    r.b2 = 0;
    r.c = to.s * std::sqrt(std::expm1(2 * h));
  }
  return r;
}

Tensor DpmSolverMultistepScheduler::Step(const Tensor& model_output, int64_t i,
                                         const Tensor& sample, const Tensor& noise) {
  Tensor output = model_output;
  if (config().variance_type.starts_with("learned") && sample.defined() && output.defined() &&
      output.shape().rank() >= 2 && sample.shape().rank() >= 2 &&
      output.shape()[1] == 2 * sample.shape()[1]) {
    output = SliceChannels(output, 0, sample.shape()[1]);
  }
  CheckStep(output, i, sample, noise);
  const int64_t order = OrderOf(i, Follow(i));
  history_.insert(history_.begin(), Convert(output, i, sample));
  if (static_cast<int64_t>(history_.size()) > config().solver_order) history_.pop_back();

  const Level to = LevelAt(i + 1), from = LevelAt(i);
  const Coefficients r = CoefficientsOf(order, from, to);
  // x' = a x + b0 m0 + d0 (m0 - m1) + d1 (m1 - m2) + c noise
  double d0 = 0, d1 = 0;
  Tensor m1, m2;
  const double h = to.lambda - from.lambda;
  if (order >= 2) {
    const double h0 = from.lambda - LevelAt(i - 1).lambda;
    m1 = history_[1];
    d0 = r.b1 * h / h0;
    if (order == 3) {
      const double h1 = LevelAt(i - 1).lambda - LevelAt(i - 2).lambda;
      m2 = history_[2];
      const double second = (r.b1 * h0 + r.b2 * h) / (h0 + h1);  // of both first differences
      d0 += second * h / h0;
      d1 = -second * h / h1;
    }
  }
  return LinearCombination(
      {{r.a, sample}, {r.b0 + d0, history_[0]}, {d1 - d0, m1}, {-d1, m2}, {r.c, noise}});
}

}  // namespace calotype
