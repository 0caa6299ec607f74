// Learning-rate schedules, the ones of diffusers' get_scheduler that its training scripts use:
// plain functions of the step, so a resumed run needs no state.
#pragma once

#include <cstdint>
#include <string>

namespace calotype {

struct LearningRateSchedule {
  // constant; constant_with_warmup; linear: falls to 0 at total_steps; cosine: half a cosine to 0
  // (Loshchilov & Hutter 2016, arXiv:1608.03983).
  std::string name = "constant";
  double learning_rate = 1e-4;  // the largest, finite and >= 0
  int64_t warmup_steps = 0;     // w: rises linearly from 0; must be 0 for constant
  int64_t total_steps = 0;      // n, for linear and cosine: > 0 and >= w

  // The rate of the update behind `step` = s earlier ones, s = 0, 1, ...: learning_rate times
  //   s < w: s / w, so that the first update of a warm-up changes nothing
  //   linear: max(0, (n - s) / max(1, n - w))
  //   cosine: (1 + cos(pi p)) / 2 with p = min(1, (s - w) / max(1, n - w))
  // Errors: ValueError for a field out of range or s < 0.
  double At(int64_t step) const;
};

}  // namespace calotype
