// SchedulerConfig: the fields of diffusers' scheduler_config.json for the schedulers that Calotype
// has. The names are diffusers' own, so a file from the Hub, a command-line flag and a designated
// initializer all read alike. The noise schedule and the samplers are built from it.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace calotype {

// Each field says which classes have it; for the others it has no meaning.
struct SchedulerConfig {
  // `_class_name`: DDIMScheduler, DDPMScheduler, PNDMScheduler, EulerDiscreteScheduler,
  // EulerAncestralDiscreteScheduler or DPMSolverMultistepScheduler.
  std::string type = "DDIMScheduler";

  // Noise schedule.
  int64_t num_train_timesteps = 1000;    // T, in [1, 1000000]
  double beta_start = 0.0001;            // in (0, 1)
  double beta_end = 0.02;                // in (0, 1)
  std::string beta_schedule = "linear";  // linear, scaled_linear, squaredcos_cap_v2; DDPM: sigmoid
  std::vector<double> trained_betas;  // T numbers in (0, 1] that replace the schedule; empty: none
  std::string prediction_type = "epsilon";  // epsilon, v_prediction; not PNDM, Euler a: sample
  // Shift and scale the schedule so that alpha_bar of the last timestep is exactly 0 (Lin et al.
  // 2023, arXiv:2305.08891, algorithm 1); 2^-24 for the Euler and DPM solvers. Not PNDM.
  bool rescale_betas_zero_snr = false;

  // Timesteps.
  // leading, linspace, trailing. Empty: the class's default, linspace for the Euler and DPM
  // solvers, else leading.
  std::string timestep_spacing = "";
  int64_t steps_offset = 0;  // added to the timesteps of leading spacing; >= 0

  // DDIM, DDPM: clip the predicted x0, unless thresholding is on, to [-range, range]; > 0.
  bool clip_sample = true;
  double clip_sample_range = 1;
  // DDIM, DDPM, DPM: dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, 2.3) with this
  // quantile of |x0| in a sample, in [0, 1], and the largest threshold, > 0.
  bool thresholding = false;
  double dynamic_thresholding_ratio = 0.995;
  double sample_max_value = 1;
  // DDIM (default true), PNDM (default false): alpha_bar behind the last step is 1; otherwise that
  // of timestep 0.
  std::optional<bool> set_alpha_to_one = std::nullopt;
  // DDPM: fixed_small (the default), fixed_small_log, fixed_large, learned, learned_range. DPM:
  // learned and learned_range mean that the second half of the output is a variance, not used.
  std::string variance_type = "";
  // PNDM: start with the linear multistep method, without the 12 Runge-Kutta calls.
  bool skip_prk_steps = false;

  // Euler: sigma of a timestep between two others, linear or log_linear; the timesteps that the
  // model sees, discrete, or with v_prediction continuous: ln(sigma) / 4.
  std::string interpolation_type = "linear";
  std::string timestep_type = "discrete";
  // Euler: ends of the karras and exponential spacings; none: those of the timesteps.
  std::optional<double> sigma_min = std::nullopt, sigma_max = std::nullopt;
  // Euler, DPM: at most one of them chooses another spacing of the noise levels. Lu: DPM only.
  bool use_karras_sigmas = false;  // Karras et al. 2022, arXiv:2206.00364, equation 5, rho 7
  bool use_exponential_sigmas = false;
  bool use_lu_lambdas = false;
  std::string final_sigmas_type = "zero";  // Euler, DPM: the last noise level, zero or sigma_min

  // DPM.
  int64_t solver_order = 2;  // 1, 2 or 3
  // dpmsolver++, sde-dpmsolver++; with final_sigmas_type sigma_min also dpmsolver, sde-dpmsolver.
  std::string algorithm_type = "dpmsolver++";
  std::string solver_type = "midpoint";  // or heun; of the second order
  bool lower_order_final = true;         // the last steps have a lower order if there are < 15
  bool euler_at_final = false;           // the last step has order 1
  // Timesteps with a smaller ln(alpha / sigma) are left out.
  double lambda_min_clipped = -std::numeric_limits<double>::infinity();

  bool operator==(const SchedulerConfig&) const = default;
};

// The config that the class sees: fields that it does not have are at their defaults, and fields
// whose default depends on the class are set.
SchedulerConfig Resolved(const SchedulerConfig& config);

// Checks every field that the class has. Errors: ValueError naming the field, its value and what is
// allowed; UnsupportedError for what diffusers has and Calotype has not.
void Validate(const SchedulerConfig& config);

// Reads the text of a scheduler_config.json. A missing field takes its default. Fields of other
// diffusers schedulers are accepted and have no meaning here, as when diffusers swaps schedulers
// with from_config. `type`, if not empty, replaces the file's `_class_name`: how DDIM is built from
// a file that says PNDMScheduler; fields listed in `_use_default_values` then take this class's
// defaults. Errors: FileError for text that is not JSON, ValueError naming an unknown field or one
// of a wrong type, UnsupportedError for another class; and those of Validate.
SchedulerConfig ParseSchedulerConfig(std::string_view json, std::string_view type = {});

// The text of a scheduler_config.json that diffusers reads: keys sorted, two spaces, final newline;
// exactly the fields that the class has. ParseSchedulerConfig gives Resolved(config) back.
std::string ToJson(const SchedulerConfig& config);

}  // namespace calotype
