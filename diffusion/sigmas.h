// Noise levels as the Euler and DPM solvers count them: sigma = sqrt((1 - alpha_bar) / alpha_bar),
// the standard deviation of the noise beside a sample of scale 1. Tables are rounded as diffusers
// rounds them.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "diffusion/noise_schedule.h"

namespace calotype {

// sigma of each timestep 0..T-1 in float32, ascending.
std::vector<float> SigmaTable(const NoiseSchedule& noise_schedule);

// sigma at a timestep between two others, by linear interpolation; the ends beyond them.
double InterpolateSigma(std::span<const float> table, double timestep);

// The timestep of a sigma: linear interpolation over ln(sigma), in [0, T-1].
double TimestepOfSigma(std::span<const float> table, double sigma);

// `steps` noise levels from `first` down to `last`: uniform in sigma^(1/7) (Karras et al. 2022,
// arXiv:2206.00364, equation 5), or in ln(sigma). One level is `first`.
std::vector<double> KarrasSigmas(double first, double last, int64_t steps);
std::vector<double> ExponentialSigmas(double first, double last, int64_t steps);

}  // namespace calotype
