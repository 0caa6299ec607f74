#include "diffusion/sigmas.h"

#include <algorithm>
#include <cmath>

namespace calotype {
namespace {

// `steps` values of f from f(first) to f(last), uniform in between.
template <class F>
std::vector<double> Spaced(double first, double last, int64_t steps, F&& f) {
  std::vector<double> values;
  for (int64_t i = 0; i < steps; ++i) {
    const double ramp = steps > 1 ? static_cast<double>(i) / static_cast<double>(steps - 1) : 0;
    values.push_back(f(first + ramp * (last - first)));
  }
  return values;
}

}  // namespace

std::vector<float> SigmaTable(const NoiseSchedule& noise_schedule) {
  std::vector<float> table;
  for (float alpha_bar : noise_schedule.alphas_cumprod())
    table.push_back(std::sqrt((1.0f - alpha_bar) / alpha_bar));
  return table;
}

double InterpolateSigma(std::span<const float> table, double timestep) {
  const double last = static_cast<double>(table.size() - 1);
  if (timestep <= 0) return table.front();
  if (timestep >= last) return table.back();
  const auto low = static_cast<size_t>(timestep);
  const double slope = double{table[low + 1]} - table[low];
  return slope * (timestep - static_cast<double>(low)) + table[low];
}

double TimestepOfSigma(std::span<const float> table, double sigma) {
  if (table.size() == 1) return 0;
  const double log_sigma = std::log(std::max(sigma, 1e-10));
  const auto log_at = [&](size_t i) {
    return double{static_cast<float>(std::log(double{table[i]}))};
  };
  size_t low = 0;  // the last one that is not above
  while (low + 1 < table.size() && log_at(low + 1) <= log_sigma) ++low;
  low = std::min(low, table.size() - 2);
  const double a = log_at(low), b = log_at(low + 1);
  const double w = std::clamp((a - log_sigma) / (a - b), 0.0, 1.0);
  return (1 - w) * static_cast<double>(low) + w * static_cast<double>(low + 1);
}

std::vector<double> KarrasSigmas(double first, double last, int64_t steps) {
  constexpr double rho = 7;
  return Spaced(std::pow(first, 1 / rho), std::pow(last, 1 / rho), steps,
                [](double root) { return std::pow(root, rho); });
}

std::vector<double> ExponentialSigmas(double first, double last, int64_t steps) {
  return Spaced(std::log(first), std::log(last), steps, [](double x) { return std::exp(x); });
}

}  // namespace calotype
