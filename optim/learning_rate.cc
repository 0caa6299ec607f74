#include "optim/learning_rate.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/error.h"

namespace calotype {

double LearningRateSchedule::At(int64_t step) const {
  const bool decays = name == "linear" || name == "cosine";
  Check(decays || name == "constant" || name == "constant_with_warmup",
        "learning rate: schedule \"{}\" is unknown; expected constant, constant_with_warmup, "
        "linear or "
        "cosine",
        name);
  Check(std::isfinite(learning_rate) && learning_rate >= 0,
        "learning rate: {} is not a number >= 0", learning_rate);
  Check(warmup_steps >= 0, "learning rate: warmup_steps is {}, expected >= 0", warmup_steps);
  Check(
      name != "constant" || warmup_steps == 0,
      "learning rate: the constant schedule has no warm-up, got {} steps; use constant_with_warmup",
      warmup_steps);
  Check(!decays || (total_steps > 0 && total_steps >= warmup_steps),
        "learning rate: {} needs total_steps > 0 and >= warmup_steps = {}, got {}", name,
        warmup_steps, total_steps);
  Check(step >= 0, "learning rate: step is {}, expected >= 0", step);
  if (step < warmup_steps) {
    return learning_rate * static_cast<double>(step) / static_cast<double>(warmup_steps);
  }
  const double length = static_cast<double>(std::max<int64_t>(1, total_steps - warmup_steps));
  if (name == "linear") {
    return learning_rate * std::max(0.0, static_cast<double>(total_steps - step) / length);
  }
  if (name == "cosine") {
    // Clamped: behind the end the source's cosine would rise again.
    const double p = std::min(1.0, static_cast<double>(step - warmup_steps) / length);
    return learning_rate * 0.5 * (1 + std::cos(std::numbers::pi * p));
  }
  return learning_rate;
}

}  // namespace calotype
