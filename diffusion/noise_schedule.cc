#include "diffusion/noise_schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/error.h"
#include "graph/functions.h"

namespace calotype {
namespace {

// torch.linspace in float32: counted from both ends, so that both are met exactly, and each number
// rounded once, as by a fused multiply-add.
std::vector<float> Linspace(double start, double end, int64_t steps) {
  const float first = static_cast<float>(start), last = static_cast<float>(end);
  std::vector<float> values(steps, first);
  if (steps == 1) return values;
  const double step = (last - first) / static_cast<float>(steps - 1);
  for (int64_t i = 0; i < steps; ++i) {
    values[i] =
        static_cast<float>(i < steps / 2 ? first + step * static_cast<double>(i)
                                         : last - step * static_cast<double>(steps - 1 - i));
  }
  return values;
}

// alpha_bar: running product of 1 - beta, accumulated in double and rounded at each step, as
// torch.cumprod.
std::vector<float> CumulativeProduct(const std::vector<float>& betas) {
  std::vector<float> products(betas.size());
  double product = 1;
  for (size_t t = 0; t < betas.size(); ++t) {
    product *= 1.0f - betas[t];
    products[t] = static_cast<float>(product);
  }
  return products;
}

std::vector<float> AlphasCumprod(const SchedulerConfig& config) {
  std::vector<float> products = CumulativeProduct(Betas(config));
  // The Euler and DPM solvers divide by it.
  const bool divides = config.type.starts_with("Euler") || config.type.starts_with("DPMSolver");
  if (config.rescale_betas_zero_snr && divides) products.back() = 0x1p-24f;
  return products;
}

void RescaleToZeroSnr(std::vector<float>& betas) {
  std::vector<float> roots = CumulativeProduct(betas);
  for (float& root : roots) root = std::sqrt(root);
  const float first = roots.front(), last = roots.back();
  Check(first > last,
        "scheduler config: rescale_betas_zero_snr needs a noise schedule that decreases; it has {} "
        "timesteps from alpha_bar {} to {}",
        betas.size(), first * first, last * last);
  const float scale = first / (first - last);
  float previous = 1;  // alpha_bar of the timestep before
  for (size_t t = 0; t < betas.size(); ++t) {
    const float root = (roots[t] - last) * scale;
    const float alpha_bar = root * root;
    betas[t] = 1.0f - alpha_bar / previous;
    previous = alpha_bar;
  }
}

std::vector<float> SquareRoots(std::span<const float> alphas_cumprod, bool complement) {
  std::vector<float> roots;
  for (float alpha_bar : alphas_cumprod) {
    roots.push_back(std::sqrt(complement ? 1.0f - alpha_bar : alpha_bar));
  }
  return roots;
}

// T: Tensor or Value.
template <class T>
T TargetOf(const NoiseSchedule& schedule, T sample, T noise, T timesteps) {
  switch (schedule.prediction_type()) {
    case PredictionType::kEpsilon:
      return noise;
    case PredictionType::kSample:
      return sample;
    case PredictionType::kVelocity:
      return schedule.Velocity(sample, noise, timesteps);
  }
  Fail<InternalError>("unknown prediction type");
}

}  // namespace

std::vector<float> Betas(const SchedulerConfig& given) {
  Validate(given);
  const SchedulerConfig config = Resolved(given);
  const int64_t T = config.num_train_timesteps;
  const double first = config.beta_start, last = config.beta_end;
  std::vector<float> betas;
  if (!config.trained_betas.empty()) {
    betas.assign(config.trained_betas.begin(), config.trained_betas.end());
  } else if (config.beta_schedule == "linear") {
    betas = Linspace(first, last, T);
  } else if (config.beta_schedule == "scaled_linear") {
    betas = Linspace(std::sqrt(first), std::sqrt(last), T);
    for (float& beta : betas) beta *= beta;
  } else if (config.beta_schedule == "squaredcos_cap_v2") {
    // Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17, with beta capped at 0.999.
    auto alpha_bar = [](double t) {
      const double c = std::cos((t + 0.008) / 1.008 * std::numbers::pi / 2);
      return c * c;
    };
    for (int64_t i = 0; i < T; ++i) {
      const double t0 = static_cast<double>(i) / T, t1 = static_cast<double>(i + 1) / T;
      betas.push_back(static_cast<float>(std::min(1 - alpha_bar(t1) / alpha_bar(t0), 0.999)));
    }
  } else if (config.beta_schedule == "sigmoid") {
    betas = Linspace(-6, 6, T);
    for (float& beta : betas) {
      beta = 1.0f / (1.0f + std::exp(-beta)) * static_cast<float>(last - first) +
             static_cast<float>(first);
    }
  } else {
    Fail<InternalError>("beta_schedule {} passed Validate", config.beta_schedule);
  }
  if (config.rescale_betas_zero_snr) RescaleToZeroSnr(betas);
  return betas;
}

NoiseSchedule::NoiseSchedule(const SchedulerConfig& config)
    : alphas_cumprod_(AlphasCumprod(config)),
      prediction_type_(config.prediction_type == "epsilon"  ? PredictionType::kEpsilon
                       : config.prediction_type == "sample" ? PredictionType::kSample
                                                            : PredictionType::kVelocity),
      signal_(Tensor::From({size()}, SquareRoots(alphas_cumprod_, false))),
      noise_(Tensor::From({size()}, SquareRoots(alphas_cumprod_, true))) {}

double NoiseSchedule::AlphaBar(int64_t timestep) const {
  Check(timestep >= 0 && timestep < size(), "noise schedule: timestep {} is outside [0, {})",
        timestep, size());
  return alphas_cumprod_[timestep];
}

// signal * a + noise * b, or with `velocity` signal * b - noise * a.
Tensor NoiseSchedule::Mix(std::string_view what, const Tensor& a, const Tensor& b,
                          const Tensor& timesteps, bool velocity) const {
  Check<ShapeError>(a.defined() && b.defined() && timesteps.defined(),
                    "{}: an argument is undefined", what);
  Check<ShapeError>(a.type() == b.type() && a.dtype() == DType::kF32 && a.shape().rank() >= 1,
                    "{}: sample {} and noise {} must be f32 of one shape [B, ...]", what, a.type(),
                    b.type());
  const int64_t B = a.shape()[0];
  Check<ShapeError>(timesteps.dtype() == DType::kI64 && timesteps.shape().rank() == 1 &&
                        (timesteps.elements() == B || timesteps.elements() == 1),
                    "{}: timesteps are {}, expected i64[{}] or i64[1]", what, timesteps.type(), B);
  Tensor result(a.shape());
  if (B == 0) return result;
  const int64_t size_of_one = a.elements() / B;
  const float *x = a.data(), *n = b.data();
  float* y = result.data();
  for (int64_t i = 0; i < B; ++i) {
    const int64_t t = timesteps.data<int64_t>()[timesteps.elements() == 1 ? 0 : i];
    AlphaBar(t);  // checks the range
    const float s = signal_.data()[t], r = noise_.data()[t];
    for (int64_t j = i * size_of_one; j < (i + 1) * size_of_one; ++j) {
      y[j] = velocity ? s * n[j] - r * x[j] : s * x[j] + r * n[j];
    }
  }
  return result;
}

Tensor NoiseSchedule::AddNoise(const Tensor& sample, const Tensor& noise,
                               const Tensor& timesteps) const {
  return Mix("add noise", sample, noise, timesteps, /*velocity=*/false);
}

Tensor NoiseSchedule::Velocity(const Tensor& sample, const Tensor& noise,
                               const Tensor& timesteps) const {
  return Mix("velocity", sample, noise, timesteps, /*velocity=*/true);
}

Tensor NoiseSchedule::Target(const Tensor& sample, const Tensor& noise,
                             const Tensor& timesteps) const {
  return TargetOf(*this, sample, noise, timesteps);
}

Value NoiseSchedule::Coefficient(const Tensor& table, Value timesteps, Value like) const {
  Check<ShapeError>(timesteps.rank() == 1 && like.rank() >= 1 &&
                        (timesteps.dim(0) == like.dim(0) || timesteps.dim(0) == 1),
                    "noise schedule: timesteps are {} for samples {}, expected [B] or [1]",
                    timesteps.type(), like.type());
  std::vector<int64_t> dims(like.rank(), 1);
  dims[0] = timesteps.dim(0);
  return Reshape(Gather(timesteps.graph->Constant(table), timesteps), Shape(dims));
}

Value NoiseSchedule::AddNoise(Value sample, Value noise, Value timesteps) const {
  return Coefficient(signal_, timesteps, sample) * sample +
         Coefficient(noise_, timesteps, sample) * noise;
}

Value NoiseSchedule::Velocity(Value sample, Value noise, Value timesteps) const {
  return Coefficient(signal_, timesteps, sample) * noise -
         Coefficient(noise_, timesteps, sample) * sample;
}

Value NoiseSchedule::Target(Value sample, Value noise, Value timesteps) const {
  return TargetOf(*this, sample, noise, timesteps);
}

}  // namespace calotype
