#include "optim/learning_rate.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numbers>
#include <string_view>

#include "core/error.h"

namespace calotype {
namespace {

template <class T>
T ParseRule(std::string_view text, std::string_view rules) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  Check(error == std::errc() && end == text.data() + text.size() && value >= 0,
        "learning rate: step_rules \"{}\" holds \"{}\", expected \"factor:step,...,factor\" like "
        "\"1:10,0.1:20,0.01\"",
        rules, text);
  return value;
}

// The factor of a step.
double PiecewiseConstant(std::string_view rules, int64_t step) {
  double factor = -1;
  int64_t before = 0;
  std::string_view rest = rules;
  for (size_t comma; (comma = rest.find(',')) != std::string_view::npos;) {
    const std::string_view rule = rest.substr(0, comma);
    const size_t colon = std::min(rule.find(':'), rule.size());
    const double value = ParseRule<double>(rule.substr(0, colon), rules);
    const auto until = ParseRule<int64_t>(rule.substr(std::min(colon + 1, rule.size())), rules);
    Check(until > before,
          "learning rate: step_rules \"{}\" has step {} behind {}, expected them to "
          "rise",
          rules, until, before);
    if (factor < 0 && step < until) factor = value;
    before = until;
    rest.remove_prefix(comma + 1);
  }
  const double last = ParseRule<double>(rest, rules);
  return factor < 0 ? last : factor;
}

}  // namespace

double LearningRateSchedule::At(int64_t step) const {
  const bool restarts = name == "cosine_with_restarts", polynomial = name == "polynomial";
  const bool piecewise = name == "piecewise_constant";
  const bool decays = name == "linear" || name == "cosine" || restarts || polynomial;
  Check(
      decays || piecewise || name == "constant" || name == "constant_with_warmup",
      "learning rate: schedule \"{}\" is unknown; expected constant, constant_with_warmup, linear, "
      "cosine, cosine_with_restarts, polynomial or piecewise_constant",
      name);
  Check(std::isfinite(learning_rate) && learning_rate >= 0,
        "learning rate: {} is not a number >= 0", learning_rate);
  Check(warmup_steps >= 0, "learning rate: warmup_steps is {}, expected >= 0", warmup_steps);
  Check((name != "constant" && !piecewise) || warmup_steps == 0,
        "learning rate: the {} schedule has no warm-up, got {} steps; use constant_with_warmup",
        name, warmup_steps);
  Check(!decays || (total_steps > 0 && total_steps >= warmup_steps + polynomial),
        "learning rate: {} needs total_steps > 0 and {} warmup_steps = {}, got {}", name,
        polynomial ? ">" : ">=", warmup_steps, total_steps);
  Check(num_cycles >= 1 && (restarts || num_cycles == 1),
        "learning rate: num_cycles is {} for {}, expected >= 1 for cosine_with_restarts, else 1",
        num_cycles, name);
  Check(power > 0 && (polynomial || power == 1),
        "learning rate: power is {} for {}, expected > 0 for polynomial, else 1", power, name);
  Check(!polynomial || (end_learning_rate >= 0 && end_learning_rate < learning_rate),
        "learning rate: end_learning_rate is {}, expected [0, learning_rate = {})",
        end_learning_rate, learning_rate);
  Check(piecewise || step_rules.empty(),
        "learning rate: step_rules are for piecewise_constant, not "
        "{}",
        name);
  Check(step >= 0, "learning rate: step is {}, expected >= 0", step);
  if (piecewise) return learning_rate * PiecewiseConstant(step_rules, step);
  if (step < warmup_steps) {
    return learning_rate * static_cast<double>(step) / static_cast<double>(warmup_steps);
  }
  if (!decays) return learning_rate;
  const double length = static_cast<double>(std::max<int64_t>(1, total_steps - warmup_steps));
  if (name == "linear") {
    return learning_rate * std::max(0.0, static_cast<double>(total_steps - step) / length);
  }
  // Clamped: behind the end the source's cosine would rise again.
  double p = std::min(1.0, static_cast<double>(step - warmup_steps) / length);
  if (polynomial) {
    return (learning_rate - end_learning_rate) * std::pow(1 - p, power) + end_learning_rate;
  }
  if (restarts && p < 1) p = std::fmod(static_cast<double>(num_cycles) * p, 1.0);
  return learning_rate * 0.5 * (1 + std::cos(std::numbers::pi * p));
}

}  // namespace calotype
