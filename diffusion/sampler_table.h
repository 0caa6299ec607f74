// The samplers that there are, one row each: the one place beside its own file that a new sampler
// is entered. Which fields of SchedulerConfig it has, VisitFields in scheduler_config.cc says.
#pragma once

#include <memory>
#include <span>
#include <string_view>

#include "diffusion/scheduler.h"
#include "diffusion/scheduler_config.h"

namespace calotype {

// One bit for each class, for sets of them.
enum SamplerBit : unsigned {
  kDdim = 1,
  kDdpm = 2,
  kPndm = 4,
  kEuler = 8,
  kAncestral = 16,
  kDpm = 32,
  kAllSamplers = ~0u,
};

// A name under which people know the class with some options.
struct SamplerName {
  std::string_view name, title;  // "dpm++-2m-karras", "DPM++ 2M Karras"
  bool karras = false, sde = false;
};

struct SamplerClass {
  std::string_view type;  // diffusers' class
  unsigned bit;
  const char* timestep_spacing;  // where the config says none
  std::span<const SamplerName> names;
  std::unique_ptr<Scheduler> (*make)(const SchedulerConfig& config, const SamplerOptions& options);
};

std::span<const SamplerClass> SamplerClasses();
// Errors: UnsupportedError listing the classes.
const SamplerClass& SamplerClassOf(std::string_view type);

}  // namespace calotype
