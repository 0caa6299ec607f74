#include "diffusion/sampler_names.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <vector>

#include "core/error.h"

namespace calotype {
namespace {

struct Sampler {
  std::string_view name, title, type;
  bool karras = false, sde = false;
};
constexpr std::string_view kEuler = "EulerDiscreteScheduler", kDpm = "DPMSolverMultistepScheduler";
constexpr std::array kSamplers{
    Sampler{"ddim", "DDIM", "DDIMScheduler"},
    Sampler{"ddpm", "DDPM", "DDPMScheduler"},
    Sampler{"pndm", "PLMS", "PNDMScheduler"},
    Sampler{"euler", "Euler", kEuler},
    Sampler{"euler-karras", "Euler Karras", kEuler, true},
    Sampler{"euler-a", "Euler a", "EulerAncestralDiscreteScheduler"},
    Sampler{"dpm++-2m", "DPM++ 2M", kDpm},
    Sampler{"dpm++-2m-karras", "DPM++ 2M Karras", kDpm, true},
    Sampler{"dpm++-2m-sde", "DPM++ 2M SDE", kDpm, false, true},
    Sampler{"dpm++-2m-sde-karras", "DPM++ 2M SDE Karras", kDpm, true, true},
};

// Lower case, without blanks, - and _.
std::string Plain(std::string_view name) {
  std::string result;
  for (unsigned char c : name) {
    if (c != ' ' && c != '-' && c != '_') result += static_cast<char>(std::tolower(c));
  }
  return result;
}

}  // namespace

SchedulerConfig WithSampler(SchedulerConfig config, std::string_view name) {
  for (const Sampler& sampler : kSamplers) {
    if (name != sampler.type) continue;
    config.type = sampler.type;
    return config;
  }
  std::string wanted = Plain(name);
  if (wanted == "plms") wanted = "pndm";
  if (wanted == "eulerancestral") wanted = "eulera";
  std::vector<std::string_view> names;
  for (const Sampler& sampler : kSamplers) {
    names.push_back(sampler.name);
    if (Plain(sampler.name) != wanted) continue;
    config.type = sampler.type;
    if (sampler.type == kDpm) {
      config.solver_order = 2;
      config.algorithm_type = sampler.sde ? "sde-dpmsolver++" : "dpmsolver++";
    }
    config.use_karras_sigmas = sampler.karras;
    if (sampler.karras) config.use_exponential_sigmas = config.use_lu_lambdas = false;
    return config;
  }
  Fail("sampler `{}` is unknown; there are {}, and diffusers' class names", name,
       fmt::join(names, ", "));
}

std::string SamplerTitle(const SchedulerConfig& config) {
  const SchedulerConfig resolved = Resolved(config);
  const bool sde = resolved.algorithm_type.starts_with("sde-");
  for (const Sampler& sampler : kSamplers) {
    if (sampler.type == resolved.type && sampler.karras == resolved.use_karras_sigmas &&
        sampler.sde == sde) {
      return std::string(sampler.title);
    }
  }
  return resolved.type;
}

}  // namespace calotype
