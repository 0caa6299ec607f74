#include "diffusion/scheduler_config.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/json.h"
#include "diffusion/sampler_table.h"

namespace calotype {
namespace {

using nlohmann::json;

bool IsOneOf(std::string_view name, const auto& names) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

unsigned BitOf(const std::string& type) { return SamplerClassOf(type).bit; }

// Every field: `visit(name, member, classes that have it)`. The one list that reading, writing and
// Resolved share.
void VisitFields(auto&& visit) {
  using C = SchedulerConfig;
  visit("num_train_timesteps", &C::num_train_timesteps, kAllSamplers);
  visit("beta_start", &C::beta_start, kAllSamplers);
  visit("beta_end", &C::beta_end, kAllSamplers);
  visit("beta_schedule", &C::beta_schedule, kAllSamplers);
  visit("trained_betas", &C::trained_betas, kAllSamplers);
  visit("prediction_type", &C::prediction_type, kAllSamplers);
  visit("rescale_betas_zero_snr", &C::rescale_betas_zero_snr, kAllSamplers & ~kPndm);
  visit("timestep_spacing", &C::timestep_spacing, kAllSamplers);
  visit("steps_offset", &C::steps_offset, kAllSamplers);
  visit("clip_sample", &C::clip_sample, kDdim | kDdpm);
  visit("clip_sample_range", &C::clip_sample_range, kDdim | kDdpm);
  visit("thresholding", &C::thresholding, kDdim | kDdpm | kDpm);
  visit("dynamic_thresholding_ratio", &C::dynamic_thresholding_ratio, kDdim | kDdpm | kDpm);
  visit("sample_max_value", &C::sample_max_value, kDdim | kDdpm | kDpm);
  visit("set_alpha_to_one", &C::set_alpha_to_one, kDdim | kPndm);
  visit("variance_type", &C::variance_type, kDdpm | kDpm);
  visit("skip_prk_steps", &C::skip_prk_steps, kPndm);
  visit("interpolation_type", &C::interpolation_type, kEuler);
  visit("timestep_type", &C::timestep_type, kEuler);
  visit("sigma_min", &C::sigma_min, kEuler);
  visit("sigma_max", &C::sigma_max, kEuler);
  visit("use_karras_sigmas", &C::use_karras_sigmas, kEuler | kDpm);
  visit("use_exponential_sigmas", &C::use_exponential_sigmas, kEuler | kDpm);
  visit("use_lu_lambdas", &C::use_lu_lambdas, kDpm);
  visit("final_sigmas_type", &C::final_sigmas_type, kEuler | kDpm);
  visit("solver_order", &C::solver_order, kDpm);
  visit("algorithm_type", &C::algorithm_type, kDpm);
  visit("solver_type", &C::solver_type, kDpm);
  visit("lower_order_final", &C::lower_order_final, kDpm);
  visit("euler_at_final", &C::euler_at_final, kDpm);
  visit("lambda_min_clipped", &C::lambda_min_clipped, kDpm);
}

// Constructor arguments of diffusers' classes that Calotype supports at this value only.
struct FixedField {
  const char* name;
  unsigned classes;
  json value;
};
const std::vector<FixedField>& FixedFields() {
  static const std::vector<FixedField> fields{
      {"use_beta_sigmas", kEuler | kDpm, false},
      {"use_flow_sigmas", kDpm, false},
      {"flow_shift", kDpm, 1.0},
      {"use_dynamic_shifting", kDpm, false},
      {"time_shift_type", kDpm, "exponential"},
  };
  return fields;
}

// Constructor arguments that only other schedulers of diffusers have, and what diffusers adds to a
// file. A file may hold them because diffusers lets one scheduler load the file of another.
constexpr std::array kForeignFields{
    "predict_x0",
    "disable_corrector",
    "solver_p",
    "lower_order_second",
    "noise_sampler_seed",
    "shift_terminal",
    "original_inference_steps",
    "timestep_scaling",
    "predictor_order",
    "corrector_order",
    "tau_func",
    "_class_name",
    "_diffusers_version",
    "_use_default_values",
};

// JSON has no infinite numbers; diffusers writes lambda_min_clipped as -Infinity all the same. Such
// words become texts (`quoted`), or the texts such words.
constexpr std::array kInfinities{"-Infinity", "Infinity"};

std::string QuoteInfinities(std::string_view text) {
  std::string result;
  bool in_text = false;
  for (size_t i = 0; i < text.size();) {
    std::string_view rest = text.substr(i), word = rest.substr(0, 1);
    if (in_text && word == "\\") {
      word = rest.substr(0, 2);
    } else if (word == "\"") {
      in_text = !in_text;
    } else if (!in_text) {
      for (std::string_view infinity : kInfinities) {
        if (rest.starts_with(infinity)) word = infinity;
      }
    }
    const bool infinity = word.size() > 2;
    if (infinity) result += '"';
    result += word;
    if (infinity) result += '"';
    i += word.size();
  }
  return result;
}

void UnquoteInfinities(std::string& text) {
  for (std::string_view infinity : kInfinities) {
    const std::string quoted = fmt::format("\"{}\"", infinity);
    for (size_t i; (i = text.find(quoted)) != std::string::npos;) {
      text.replace(i, quoted.size(), infinity);
    }
  }
}

[[noreturn]] void WrongType(const char* name, const json& value, const char* wanted) {
  Fail("scheduler config: {} is {}, expected {}", name, JsonText(value), wanted);
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
  if (value == kInfinities[0] || value == kInfinities[1]) {
    field = value == kInfinities[0] ? -INFINITY : INFINITY;
    return;
  }
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
template <class T>
void Read(const char* name, const json& value, std::optional<T>& field) {
  field.reset();
  if (!value.is_null()) Read(name, value, field.emplace());
}

json Written(double field) {
  if (std::isinf(field)) return kInfinities[field < 0 ? 0 : 1];
  return field;
}
template <class T>
json Written(const T& field) {
  return field;
}
template <class T>
json Written(const std::optional<T>& field) {
  return field ? json(*field) : json();
}
json Written(const std::vector<double>& field) { return field.empty() ? json() : json(field); }

void CheckOneOf(std::string_view field, const std::string& value, const auto& allowed) {
  Check(IsOneOf(value, allowed), "scheduler config: {} is \"{}\", expected one of {}", field, value,
        fmt::join(allowed, ", "));
}

void ValidateSigmas(const SchedulerConfig& config) {
  const int spacings =
      config.use_karras_sigmas + config.use_exponential_sigmas + config.use_lu_lambdas;
  Check(spacings <= 1,
        "scheduler config: {} of use_karras_sigmas, use_exponential_sigmas and use_lu_lambdas are "
        "true, expected at most one",
        spacings);
  CheckOneOf("interpolation_type", config.interpolation_type, std::array{"linear", "log_linear"});
  CheckOneOf("timestep_type", config.timestep_type, std::array{"discrete", "continuous"});
  CheckOneOf("final_sigmas_type", config.final_sigmas_type, std::array{"zero", "sigma_min"});
  for (auto [name, sigma] :
       {std::pair{"sigma_min", config.sigma_min}, std::pair{"sigma_max", config.sigma_max}}) {
    Check(!sigma || (*sigma > 0 && std::isfinite(*sigma)),
          "scheduler config: {} is {}, expected a number > 0", name, sigma.value_or(0));
  }
  Check(!config.sigma_min || !config.sigma_max || *config.sigma_min < *config.sigma_max,
        "scheduler config: sigma_min is {}, sigma_max {}; expected a smaller sigma_min",
        config.sigma_min.value_or(0), config.sigma_max.value_or(0));
}

void ValidateDpmSolver(const SchedulerConfig& config) {
  Check(config.solver_order >= 1 && config.solver_order <= 3,
        "scheduler config: solver_order is {}, expected 1, 2 or 3", config.solver_order);
  CheckOneOf("algorithm_type", config.algorithm_type,
             std::array{"dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"});
  CheckOneOf("solver_type", config.solver_type, std::array{"midpoint", "heun"});
  Check(
      config.algorithm_type.ends_with("++") || config.final_sigmas_type == "sigma_min",
      "scheduler config: algorithm_type {} divides by the last noise level; use final_sigmas_type "
      "sigma_min or algorithm_type {}++",
      config.algorithm_type, config.algorithm_type);
  Check<UnsupportedError>(
      config.algorithm_type != "sde-dpmsolver" || config.solver_order < 3,
      "scheduler config: algorithm_type sde-dpmsolver has no solver_order 3; use 2 or "
      "sde-dpmsolver++");
  Check(!std::isnan(config.lambda_min_clipped),
        "scheduler config: lambda_min_clipped is not a number");
}

}  // namespace

SchedulerConfig Resolved(const SchedulerConfig& config) {
  const unsigned type = BitOf(config.type);
  SchedulerConfig result;
  result.type = config.type;
  VisitFields([&](const char*, auto member, unsigned classes) {
    if (classes & type) result.*member = config.*member;
  });
  if (result.timestep_spacing.empty()) {
    result.timestep_spacing = SamplerClassOf(config.type).timestep_spacing;
  }
  if (type & (kDdim | kPndm) && !result.set_alpha_to_one) result.set_alpha_to_one = type == kDdim;
  if (type == kDdpm && result.variance_type.empty()) result.variance_type = "fixed_small";
  // As when diffusers builds the class from the file of DEIS or UniPC.
  if (result.algorithm_type == "deis") result.algorithm_type = "dpmsolver++";
  if (IsOneOf(result.solver_type, std::array{"logrho", "bh1", "bh2"}))
    result.solver_type = "midpoint";
  return result;
}

void Validate(const SchedulerConfig& given) {
  const SchedulerConfig config = Resolved(given);
  const unsigned type = BitOf(config.type);
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
  Check<UnsupportedError>(config.prediction_type != "sample" || !(type & (kPndm | kAncestral)),
                          "scheduler config: {} does not support prediction_type sample",
                          config.type);
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
  Check(config.sample_max_value > 0, "scheduler config: sample_max_value is {}, expected > 0",
        config.sample_max_value);
  ValidateSigmas(config);
  ValidateDpmSolver(config);
  if (type != kDdpm) return;
  // It takes the square root of a logarithm upstream, which is never a number.
  Check<UnsupportedError>(config.variance_type != "fixed_large_log",
                          "scheduler config: variance_type fixed_large_log is not supported; use "
                          "fixed_large");
  CheckOneOf(
      "variance_type", config.variance_type,
      std::array{"fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"});
}

SchedulerConfig ParseSchedulerConfig(std::string_view text, std::string_view type) {
  json file = ParseJsonObject(QuoteInfinities(text), "scheduler config");

  SchedulerConfig config;
  if (auto name = file.find("_class_name"); name != file.end()) {
    Read("_class_name", *name, config.type);
  }
  if (!type.empty()) config.type = type;
  const unsigned bit = BitOf(config.type);
  if (auto defaults = file.find("_use_default_values"); defaults != file.end()) {
    if (!defaults->is_array()) WrongType("_use_default_values", *defaults, "a list of names");
    const json names = *defaults;
    for (const json& element : names) {
      std::string name;
      Read("_use_default_values", element, name);
      file.erase(name);
    }
  }
  // What is left at the end is unknown; fields of other classes are dropped unread.
  VisitFields([&](const char* name, auto member, unsigned classes) {
    auto value = file.find(name);
    if (value == file.end()) return;
    const bool absent = value->is_null() && name == std::string_view("variance_type");
    if (classes & bit && !absent) Read(name, *value, config.*member);
    file.erase(value);
  });
  for (const FixedField& field : FixedFields()) {
    auto value = file.find(field.name);
    if (value == file.end()) continue;
    // flow_shift and time_shift_type have an effect with the flags beside them only.
    Check<UnsupportedError>(!(field.classes & bit) || !value->is_boolean() || *value == field.value,
                            "scheduler config: {} is {}, which {} does not support here",
                            field.name, JsonText(*value), config.type);
    file.erase(value);
  }
  for (const auto& [name, value] : file.items())
    Check(IsOneOf(name, kForeignFields), "scheduler config: unknown field \"{}\"", name);
  Validate(config);
  return config;
}

std::string ToJson(const SchedulerConfig& given) {
  Validate(given);
  const SchedulerConfig config = Resolved(given);
  const unsigned type = BitOf(config.type);
  json file;  // nlohmann::json sorts its keys
  file["_class_name"] = config.type;
  VisitFields([&](const char* name, auto member, unsigned classes) {
    if (classes & type) file[name] = Written(config.*member);
  });
  for (const FixedField& field : FixedFields()) {
    if (field.classes & type) file[field.name] = field.value;
  }
  if (config.variance_type.empty() && type == kDpm) file["variance_type"] = nullptr;
  std::string text = JsonFile(file);
  UnquoteInfinities(text);
  return text;
}

}  // namespace calotype
