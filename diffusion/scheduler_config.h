// SchedulerConfig: the fields of diffusers' scheduler_config.json for the schedulers that Calotype
// has. The names are diffusers' own, so a file from the Hub, a command-line flag and a designated
// initializer all read alike. The noise schedule and the samplers are built from it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace calotype {

struct SchedulerConfig {
  std::string type = "DDIMScheduler";  // `_class_name`: DDIMScheduler or DDPMScheduler

  // Noise schedule.
  int64_t num_train_timesteps = 1000;    // T, in [1, 1000000]
  double beta_start = 0.0001;            // in (0, 1)
  double beta_end = 0.02;                // in (0, 1)
  std::string beta_schedule = "linear";  // linear, scaled_linear, squaredcos_cap_v2; DDPM: sigmoid
  std::vector<double> trained_betas;  // T numbers in (0, 1] that replace the schedule; empty: none
  std::string prediction_type = "epsilon";  // epsilon, sample, v_prediction
  // Shift and scale the schedule so that alpha_bar of the last timestep is exactly 0 (Lin et al.
  // 2023, arXiv:2305.08891, algorithm 1).
  bool rescale_betas_zero_snr = false;

  // Sampling.
  std::string timestep_spacing = "leading";  // leading, linspace, trailing
  int64_t steps_offset = 0;                  // added to the timesteps of leading spacing; >= 0
  bool clip_sample = true;                   // clip the predicted x0, unless thresholding is on
  double clip_sample_range = 1;              // to [-range, range]; > 0
  bool thresholding = false;  // dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, 2.3)
  double dynamic_thresholding_ratio = 0.995;  // quantile of |x0| in a sample; in [0, 1]
  double sample_max_value = 1;                // largest threshold; >= 1
  // DDIM only: alpha_bar behind the last step is 1; otherwise that of timestep 0.
  bool set_alpha_to_one = true;
  // DDPM only: fixed_small, fixed_small_log, fixed_large, learned, learned_range.
  std::string variance_type = "fixed_small";

  bool operator==(const SchedulerConfig&) const = default;
};

// Checks every field. Errors: ValueError naming the field, its value and what is allowed;
// UnsupportedError for what diffusers has and Calotype has not.
void Validate(const SchedulerConfig& config);

// Reads the text of a scheduler_config.json. A missing field takes its default. Fields of other
// diffusers schedulers are accepted and have no meaning here, as when diffusers swaps schedulers
// with from_config. `type`, if not empty, replaces the file's `_class_name`: how DDIM is built from
// a file that says PNDMScheduler; fields listed in `_use_default_values` then take this class's
// defaults. Errors: FileError for text that is not JSON, ValueError naming an unknown field or one
// of a wrong type, UnsupportedError for another class; and those of Validate.
SchedulerConfig ParseSchedulerConfig(std::string_view json, std::string_view type = {});

// The text of a scheduler_config.json that diffusers reads: keys sorted, two spaces, final newline;
// exactly the fields that the class has. ParseSchedulerConfig gives the same config back.
std::string ToJson(const SchedulerConfig& config);

}  // namespace calotype
