// The names under which people know the samplers, and the one that goes into a picture's
// `parameters` text.
#pragma once

#include <string>
#include <string_view>

#include "diffusion/scheduler_config.h"

namespace calotype {

// The config with the class, and where the name says so the options, of the sampler `name`; other
// fields stay. Names: ddim, ddpm, pndm (plms), euler, euler-karras, euler-a (euler-ancestral),
// dpm++-2m, dpm++-2m-karras, dpm++-2m-sde, dpm++-2m-sde-karras; case, blanks, - and _ do not
// count, so "DPM++ 2M Karras" is one of them. A class name of diffusers, such as
// DPMSolverMultistepScheduler, sets the class alone. Errors: ValueError listing the names.
SchedulerConfig WithSampler(SchedulerConfig config, std::string_view name);

// The name that other programs write for the sampler of a config: "DPM++ 2M Karras".
std::string SamplerTitle(const SchedulerConfig& config);

}  // namespace calotype
