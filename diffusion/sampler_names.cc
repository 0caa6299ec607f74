#include "diffusion/sampler_names.h"

#include <fmt/ranges.h>

#include <cctype>
#include <vector>

#include "core/error.h"
#include "diffusion/sampler_table.h"

namespace calotype {
namespace {

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
  std::string wanted = Plain(name);
  if (wanted == "plms") wanted = "pndm";
  if (wanted == "eulerancestral") wanted = "eulera";
  std::vector<std::string_view> names;
  for (const SamplerClass& c : SamplerClasses()) {
    if (name == c.type) {
      config.type = c.type;
      return config;
    }
    for (const SamplerName& sampler : c.names) {
      names.push_back(sampler.name);
      if (Plain(sampler.name) != wanted) continue;
      config.type = c.type;
      if (c.bit == kDpm) {
        config.solver_order = 2;
        config.algorithm_type = sampler.sde ? "sde-dpmsolver++" : "dpmsolver++";
      }
      config.use_karras_sigmas = sampler.karras;
      if (sampler.karras) config.use_exponential_sigmas = config.use_lu_lambdas = false;
      return config;
    }
  }
  Fail("sampler `{}` is unknown; there are {}, and diffusers' class names", name,
       fmt::join(names, ", "));
}

std::string SamplerTitle(const SchedulerConfig& config) {
  const SchedulerConfig resolved = Resolved(config);
  const bool sde = resolved.algorithm_type.starts_with("sde-");
  for (const SamplerName& sampler : SamplerClassOf(resolved.type).names) {
    if (sampler.karras == resolved.use_karras_sigmas && sampler.sde == sde) {
      return std::string(sampler.title);
    }
  }
  return resolved.type;
}

}  // namespace calotype
