#include "diffusion/scheduler_config.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "core/error.h"

namespace calotype {
namespace {

using nlohmann::json;

constexpr std::array kTypes{"DDIMScheduler", "DDPMScheduler"};

// Constructor arguments of diffusers' schedulers that neither DDIM nor DDPM has. A file may hold
// them because diffusers lets one scheduler load the file of another.
constexpr std::array kForeignFields{
    "skip_prk_steps",
    "interpolation_type",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "flow_shift",
    "sigma_min",
    "sigma_max",
    "timestep_type",
    "final_sigmas_type",
    "solver_order",
    "algorithm_type",
    "solver_type",
    "lower_order_final",
    "euler_at_final",
    "lambda_min_clipped",
    "use_dynamic_shifting",
    "time_shift_type",
    "predict_x0",
    "disable_corrector",
    "solver_p",
    "lower_order_second",
    "_diffusers_version",
    "_class_name",
    "_use_default_values",
};

bool IsOneOf(std::string_view name, const auto& names) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

// Every field with its name; `visit(name, field)`. The one list that reading and writing share.
void VisitFields(auto& config, auto&& visit) {
  visit("num_train_timesteps", config.num_train_timesteps);
  visit("beta_start", config.beta_start);
  visit("beta_end", config.beta_end);
  visit("beta_schedule", config.beta_schedule);
  visit("trained_betas", config.trained_betas);
  visit("prediction_type", config.prediction_type);
  visit("rescale_betas_zero_snr", config.rescale_betas_zero_snr);
  visit("timestep_spacing", config.timestep_spacing);
  visit("steps_offset", config.steps_offset);
  visit("clip_sample", config.clip_sample);
  visit("clip_sample_range", config.clip_sample_range);
  visit("thresholding", config.thresholding);
  visit("dynamic_thresholding_ratio", config.dynamic_thresholding_ratio);
  visit("sample_max_value", config.sample_max_value);
  if (config.type == "DDIMScheduler") visit("set_alpha_to_one", config.set_alpha_to_one);
  if (config.type == "DDPMScheduler") visit("variance_type", config.variance_type);
}

[[noreturn]] void WrongType(const char* name, const json& value, const char* wanted) {
  Fail("scheduler config: {} is {}, expected {}", name, value.dump(), wanted);
}

void Read(const char* name, const json& value, bool& field) {
  if (!value.is_boolean()) WrongType(name, value, "true or false");
  field = value.get<bool>();
}
void Read(const char* name, const json& value, int64_t& field) {
  if (!value.is_number_integer()) WrongType(name, value, "an integer");
  // An unsigned number beyond int64 would wrap around.
  if (value.is_number_unsigned() && value.get<uint64_t>() > uint64_t{INT64_MAX}) {
    WrongType(name, value, "a smaller integer");
  }
  field = value.get<int64_t>();
}
void Read(const char* name, const json& value, double& field) {
  if (!value.is_number()) WrongType(name, value, "a number");
  field = value.get<double>();
}
void Read(const char* name, const json& value, std::string& field) {
  if (!value.is_string()) WrongType(name, value, "a text");
  field = value.get<std::string>();
}
void Read(const char* name, const json& value, std::vector<double>& field) {
  field.clear();
  if (value.is_null()) return;
  if (!value.is_array()) WrongType(name, value, "a list of numbers or null");
  for (const json& element : value) Read(name, element, field.emplace_back());
}

void CheckOneOf(std::string_view field, const std::string& value, const auto& allowed) {
  Check(IsOneOf(value, allowed), "scheduler config: {} is \"{}\", expected one of {}", field, value,
        fmt::join(allowed, ", "));
}

}  // namespace

void Validate(const SchedulerConfig& config) {
  Check<UnsupportedError>(IsOneOf(config.type, kTypes),
                          "scheduler config: class {} is not supported, only {}", config.type,
                          fmt::join(kTypes, " and "));
  const int64_t steps = config.num_train_timesteps;
  Check(steps >= 1 && steps <= 1000000,
        "scheduler config: num_train_timesteps is {}, expected 1 to 1000000", steps);
  if (config.trained_betas.empty()) {
    for (auto [name, beta] :
         {std::pair{"beta_start", config.beta_start}, std::pair{"beta_end", config.beta_end}}) {
      Check(beta > 0 && beta < 1, "scheduler config: {} is {}, expected a number in (0, 1)", name,
            beta);
    }
  } else {
    Check(static_cast<int64_t>(config.trained_betas.size()) == steps,
          "scheduler config: trained_betas has {} numbers, num_train_timesteps is {}; make them "
          "equal",
          config.trained_betas.size(), steps);
    for (double beta : config.trained_betas) {
      Check(beta > 0 && beta <= 1, "scheduler config: trained_betas holds {}, expected (0, 1]",
            beta);
    }
  }
  Check<UnsupportedError>(config.beta_schedule != "laplace",
                          "scheduler config: beta_schedule laplace is not supported");
  CheckOneOf("beta_schedule", config.beta_schedule,
             std::array{"linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"});
  Check<UnsupportedError>(
      config.beta_schedule != "sigmoid" || config.type == "DDPMScheduler",
      "scheduler config: beta_schedule sigmoid exists for DDPMScheduler, not {}", config.type);
  CheckOneOf("prediction_type", config.prediction_type,
             std::array{"epsilon", "sample", "v_prediction"});
  CheckOneOf("timestep_spacing", config.timestep_spacing,
             std::array{"leading", "linspace", "trailing"});
  Check(config.steps_offset >= 0 && config.steps_offset < steps,
        "scheduler config: steps_offset is {}, expected 0 to num_train_timesteps - 1 = {}",
        config.steps_offset, steps - 1);
  Check(config.clip_sample_range > 0,
        "scheduler config: clip_sample_range is {}, expected a number > 0",
        config.clip_sample_range);
  Check(config.dynamic_thresholding_ratio >= 0 && config.dynamic_thresholding_ratio <= 1,
        "scheduler config: dynamic_thresholding_ratio is {}, expected [0, 1]",
        config.dynamic_thresholding_ratio);
  Check(config.sample_max_value >= 1, "scheduler config: sample_max_value is {}, expected >= 1",
        config.sample_max_value);
  // It takes the square root of a logarithm upstream, which is never a number.
  Check<UnsupportedError>(config.variance_type != "fixed_large_log",
                          "scheduler config: variance_type fixed_large_log is not supported; use "
                          "fixed_large");
  CheckOneOf(
      "variance_type", config.variance_type,
      std::array{"fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"});
}

SchedulerConfig ParseSchedulerConfig(std::string_view text, std::string_view type) {
  json file = json::parse(text, nullptr, /*allow_exceptions=*/false);
  Check<FileError>(!file.is_discarded(), "scheduler config: the text is not valid JSON");
  Check<FileError>(file.is_object(), "scheduler config: the text is not a JSON object");

  SchedulerConfig config;
  if (auto name = file.find("_class_name"); name != file.end()) {
    Read("_class_name", *name, config.type);
  }
  if (!type.empty()) config.type = type;
  if (auto defaults = file.find("_use_default_values"); defaults != file.end()) {
    if (!defaults->is_array()) WrongType("_use_default_values", *defaults, "a list of names");
    const json names = *defaults;
    for (const json& element : names) {
      std::string name;
      Read("_use_default_values", element, name);
      file.erase(name);
    }
  }
  VisitFields(config, [&](const char* name, auto& field) {
    if (auto value = file.find(name); value != file.end()) {
      Read(name, *value, field);
      file.erase(value);
    }
  });
  for (const auto& [name, value] : file.items()) {
    // The field that only the other class has is foreign as well.
    const bool foreign = name == "set_alpha_to_one" || name == "variance_type";
    Check(foreign || IsOneOf(name, kForeignFields), "scheduler config: unknown field \"{}\"", name);
  }
  Validate(config);
  return config;
}

std::string ToJson(const SchedulerConfig& config) {
  Validate(config);
  json file;  // nlohmann::json sorts its keys
  file["_class_name"] = config.type;
  VisitFields(config, [&](const char* name, const auto& field) { file[name] = field; });
  if (config.trained_betas.empty()) file["trained_betas"] = nullptr;
  return file.dump(2) + "\n";
}

}  // namespace calotype
