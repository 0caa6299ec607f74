// Learning-rate schedules, those of diffusers' get_scheduler: plain functions of the step, so a
// resumed run needs no state.
#pragma once

#include <cstdint>
#include <string>

namespace calotype {

struct LearningRateSchedule {
  // constant; constant_with_warmup; linear: falls to 0 at total_steps; cosine: half a cosine to 0,
  // cosine_with_restarts: several (Loshchilov & Hutter 2016, arXiv:1608.03983); polynomial: falls
  // to end_learning_rate; piecewise_constant: by step_rules.
  std::string name = "constant";
  double learning_rate = 1e-4;  // the largest, finite and >= 0
  // w: rises linearly from 0; must be 0 for constant and piecewise_constant.
  int64_t warmup_steps = 0;
  // n, for linear and the cosines: > 0 and >= w; polynomial: > w.
  int64_t total_steps = 0;
  int64_t num_cycles = 1;           // c, cosine_with_restarts: >= 1
  double power = 1;                 // polynomial: > 0
  double end_learning_rate = 1e-7;  // e, polynomial: in [0, learning_rate)
  // piecewise_constant: "1:10,0.1:20,0.01" is a factor of 1 before step 10, 0.1 before step 20, and
  // 0.01 from there on.
  std::string step_rules = "";

  // The rate of the update behind `step` = s earlier ones, s = 0, 1, ...: learning_rate times
  //   s < w: s / w, so that the first update of a warm-up changes nothing
  //   linear: max(0, (n - s) / max(1, n - w))
  //   cosine: (1 + cos(pi p)) / 2 with p = min(1, (s - w) / max(1, n - w))
  //   cosine_with_restarts: the same with the fraction of c p, and 0 for p = 1
  //   polynomial: not the factor but the rate: (learning_rate - e) (1 - p)^power + e
  // Errors: ValueError for a field out of range or s < 0.
  double At(int64_t step) const;
};

}  // namespace calotype
