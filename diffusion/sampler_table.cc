#include "diffusion/sampler_table.h"

#include <fmt/ranges.h>

#include <array>
#include <type_traits>
#include <vector>

#include "core/error.h"
#include "diffusion/ddim.h"
#include "diffusion/ddpm.h"
#include "diffusion/dpm_solver.h"
#include "diffusion/euler.h"
#include "diffusion/pndm.h"

namespace calotype {
namespace {

constexpr std::array kDdimNames{SamplerName{"ddim", "DDIM"}};
constexpr std::array kDdpmNames{SamplerName{"ddpm", "DDPM"}};
constexpr std::array kPndmNames{SamplerName{"pndm", "PLMS"}};
constexpr std::array kEulerNames{SamplerName{"euler", "Euler"},
                                 SamplerName{"euler-karras", "Euler Karras", true}};
constexpr std::array kAncestralNames{SamplerName{"euler-a", "Euler a"}};
constexpr std::array kDpmNames{
    SamplerName{"dpm++-2m", "DPM++ 2M"}, SamplerName{"dpm++-2m-karras", "DPM++ 2M Karras", true},
    SamplerName{"dpm++-2m-sde", "DPM++ 2M SDE", false, true},
    SamplerName{"dpm++-2m-sde-karras", "DPM++ 2M SDE Karras", true, true}};

template <class S>
std::unique_ptr<Scheduler> Make(const SchedulerConfig& config, const SamplerOptions& options) {
  if constexpr (std::is_constructible_v<S, SchedulerConfig, SamplerOptions>) {
    return std::make_unique<S>(config, options);
  } else {
    return std::make_unique<S>(config);
  }
}

constexpr std::array kClasses{
    SamplerClass{"DDIMScheduler", kDdim, "leading", kDdimNames, Make<DdimScheduler>},
    SamplerClass{"DDPMScheduler", kDdpm, "leading", kDdpmNames, Make<DdpmScheduler>},
    SamplerClass{"PNDMScheduler", kPndm, "leading", kPndmNames, Make<PndmScheduler>},
    SamplerClass{"EulerDiscreteScheduler", kEuler, "linspace", kEulerNames,
                 Make<EulerDiscreteScheduler>},
    SamplerClass{"EulerAncestralDiscreteScheduler", kAncestral, "linspace", kAncestralNames,
                 Make<EulerAncestralDiscreteScheduler>},
    SamplerClass{"DPMSolverMultistepScheduler", kDpm, "linspace", kDpmNames,
                 Make<DpmSolverMultistepScheduler>},
};

}  // namespace

std::span<const SamplerClass> SamplerClasses() { return kClasses; }

const SamplerClass& SamplerClassOf(std::string_view type) {
  std::vector<std::string_view> types;
  for (const SamplerClass& c : kClasses) {
    if (c.type == type) return c;
    types.push_back(c.type);
  }
  Fail<UnsupportedError>("scheduler config: class {} is not supported, only {}", type,
                         fmt::join(types, ", "));
}

std::unique_ptr<Scheduler> MakeScheduler(const SchedulerConfig& config,
                                         const SamplerOptions& options) {
  const SamplerClass& sampler = SamplerClassOf(config.type);
  Validate(config);
  const SamplerOptions defaults;
  Check(sampler.bit == kDdim || options.eta == 0, "{}: eta is {}, but only DDIM has it",
        config.type, options.eta);
  Check(sampler.bit == kDdim || !options.use_clipped_model_output,
        "{}: use_clipped_model_output is set, but only DDIM has it", config.type);
  Check(sampler.bit == kEuler || (options.s_churn == 0 && options.s_tmin == 0 &&
                                  options.s_tmax == defaults.s_tmax && options.s_noise == 1),
        "{}: s_churn, s_tmin, s_tmax or s_noise is set, but only EulerDiscreteScheduler has them",
        config.type);
  return sampler.make(config, options);
}

}  // namespace calotype
