#include "diffusion/scheduler.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace calotype {
namespace {

// torch.quantile: linear interpolation between the two neighbours of position q (n - 1).
double Quantile(std::vector<double> values, double q) {
  const double position = q * static_cast<double>(values.size() - 1);
  const size_t low = static_cast<size_t>(position);
  const auto at = [&](size_t i) {
    std::nth_element(values.begin(), values.begin() + i, values.end());
    return values[i];
  };
  const double a = at(low), b = at(std::min(low + 1, values.size() - 1));
  return a + (b - a) * (position - static_cast<double>(low));
}

}  // namespace

Scheduler::Scheduler(const SchedulerConfig& config)
    : config_(Resolved(config)), noise_schedule_(config_) {}

void Scheduler::SetTimesteps(int64_t steps) {
  const int64_t T = noise_schedule_.size();
  Check(steps >= 1 && steps <= T,
        "scheduler: {} sampling steps asked, expected 1 to num_train_timesteps = {}", steps, T);
  timesteps_.clear();
  first_ = next_ = -1;
  std::vector<double> timesteps = ChooseTimesteps(steps);
  Check(timesteps.front() < static_cast<double>(T),
        "scheduler: steps_offset {} moves the first of {} timesteps to {}, but the last training "
        "timestep is {}; use fewer steps or no offset",
        config_.steps_offset, steps, timesteps.front(), T - 1);
  timesteps_ = std::move(timesteps);
}

void Scheduler::SetCustomTimesteps(std::span<const int64_t> timesteps) {
  Check<UnsupportedError>(config_.type == "DDPMScheduler",
                          "scheduler: {} takes no list of timesteps, DDPMScheduler does",
                          config_.type);
  Check(!timesteps.empty(), "scheduler: the list of timesteps is empty");
  int64_t behind = noise_schedule_.size();
  for (int64_t t : timesteps) {
    Check(t >= 0 && t < behind,
          "scheduler: timestep {} of the list must be in [0, {}): they descend, from {} at most", t,
          behind, noise_schedule_.size() - 1);
    behind = t;
  }
  first_ = next_ = -1;
  timesteps_.assign(timesteps.begin(), timesteps.end());
}

std::vector<double> Scheduler::ChooseTimesteps(int64_t steps) {
  const int64_t T = noise_schedule_.size();
  std::vector<double> timesteps(static_cast<size_t>(steps));
  const double n = static_cast<double>(steps), last = static_cast<double>(T - 1);
  const int64_t stride = T / steps;
  for (int64_t i = 0; i < steps; ++i) {
    const double x = static_cast<double>(i);
    double t;
    if (config_.timestep_spacing == "leading") {
      t = static_cast<double>((steps - 1 - i) * stride + config_.steps_offset);
    } else if (config_.timestep_spacing == "linspace") {
      const double step = steps > 1 ? last / (n - 1) : 0;
      t = std::nearbyint((n - 1 - x) * step);
    } else {
      t = std::nearbyint(static_cast<double>(T) - x * (static_cast<double>(T) / n)) - 1;
    }
    timesteps[static_cast<size_t>(i)] = t;
  }
  return timesteps;
}

const std::vector<double>& Scheduler::timesteps() const {
  Check(!timesteps_.empty(), "scheduler: call SetTimesteps first");
  return timesteps_;
}

void Scheduler::CheckIndex(int64_t i) const {
  Check(i >= 0 && i < size(), "scheduler: step {} is outside [0, {})", i, size());
}

int64_t Scheduler::TimestepAt(int64_t i) const {
  CheckIndex(i);
  return std::llrint(timesteps_[static_cast<size_t>(i)]);
}

Tensor Scheduler::ScaleModelInput(const Tensor& sample, int64_t i) const {
  CheckIndex(i);
  return sample;
}

Tensor Scheduler::AddNoise(const Tensor& sample, const Tensor& noise, int64_t i) const {
  return noise_schedule_.AddNoise(sample, noise, Tensor::From({1}, std::vector{TimestepAt(i)}));
}

int64_t Scheduler::Follow(int64_t i) {
  CheckIndex(i);
  if (next_ < 0) first_ = next_ = i;
  Check(
      i == next_,
      "scheduler: step {} was asked, but {} follows the last one; {} remembers earlier outputs, so "
      "call SetTimesteps to start again",
      i, next_, config_.type);
  return next_++ - first_;
}

void Scheduler::CheckStep(const Tensor& model_output, int64_t i, const Tensor& sample,
                          const Tensor& noise) const {
  Check<ShapeError>(sample.defined() && sample.dtype() == DType::kF32 &&
                        sample.shape().rank() >= 2 && sample.elements() > 0,
                    "scheduler: the sample must be f32 [B, C, ...] and not empty, got {}",
                    sample.defined() ? ToString(sample.type()) : "an undefined tensor");
  Check<ShapeError>(model_output.defined() && model_output.type() == sample.type(),
                    "scheduler: the model output is {}, the sample {}; they must be equal",
                    model_output.defined() ? ToString(model_output.type()) : "undefined",
                    sample.type());
  if (NeedsNoise(i)) {
    Check(noise.defined(), "scheduler: step {} needs noise; see NeedsNoise", i);
    Check<ShapeError>(noise.type() == sample.type(), "scheduler: the noise is {}, the sample {}",
                      noise.type(), sample.type());
  } else {
    Check(!noise.defined(), "scheduler: step {} takes no noise; see NeedsNoise", i);
  }
}

std::vector<double> Scheduler::PredictSample(const Tensor& model_output, int64_t i,
                                             const Tensor& sample) const {
  const int64_t timestep = TimestepAt(i);
  const double alpha_bar = noise_schedule_.AlphaBar(timestep);
  const double signal = std::sqrt(alpha_bar), noise = std::sqrt(1 - alpha_bar);
  double cx = 0, co = 0;  // x0 = cx x + co o
  switch (noise_schedule_.prediction_type()) {
    case PredictionType::kEpsilon:
      Check<NumericError>(alpha_bar > 0,
                          "scheduler: alpha_bar is 0 at timestep {}, so predicted noise does not "
                          "determine the sample; use prediction_type v_prediction or sample",
                          timestep);
      cx = 1 / signal, co = -noise / signal;
      break;
    case PredictionType::kSample:
      cx = 0, co = 1;
      break;
    case PredictionType::kVelocity:
      cx = signal, co = -noise;
      break;
  }
  std::vector<double> x0(sample.elements());
  const float *x = sample.data(), *o = model_output.data();
  for (size_t k = 0; k < x0.size(); ++k) x0[k] = cx * x[k] + co * o[k];
  return x0;
}

void Scheduler::LimitSample(std::span<double> x0, int64_t batch) const {
  if (config_.thresholding) {
    const size_t size = x0.size() / static_cast<size_t>(batch);
    for (auto first = x0.begin(); first != x0.end(); first += size) {
      std::vector<double> magnitudes(first, first + size);
      for (double& m : magnitudes) m = std::fabs(m);
      const double quantile = Quantile(std::move(magnitudes), config_.dynamic_thresholding_ratio);
      const double s = std::min(std::max(quantile, 1.0), config_.sample_max_value);
      for (auto x = first; x != first + size; ++x) *x = std::clamp(*x, -s, s) / s;
    }
  } else if (config_.clip_sample) {
    const double range = config_.clip_sample_range;
    for (double& x : x0) x = std::clamp(x, -range, range);
  }
}

Tensor LinearCombination(std::initializer_list<Term> terms) {
  std::vector<double> sum;
  Shape shape;
  for (const Term& term : terms) {
    if (!term.x.defined()) {
      Check<InternalError>(term.factor == 0, "linear combination: a term is undefined");
      continue;
    }
    if (sum.empty()) sum.resize(static_cast<size_t>(term.x.elements())), shape = term.x.shape();
    Check<ShapeError>(term.x.shape() == shape, "scheduler: the tensors are {} and {}", shape,
                      term.x.shape());
    const float* x = term.x.data();
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += term.factor * x[i];
  }
  Tensor result(shape);
  std::transform(sum.begin(), sum.end(), result.data(),
                 [](double v) { return static_cast<float>(v); });
  return result;
}

Tensor SliceChannels(const Tensor& x, int64_t first, int64_t count) {
  const int64_t B = x.shape()[0], C = x.shape()[1], inner = x.elements() / (B * C);
  Tensor y(x.shape().With(1, count));
  for (int64_t b = 0; b < B; ++b) {
    const float* source = x.data() + (b * C + first) * inner;
    std::copy(source, source + count * inner, y.data() + b * count * inner);
  }
  return y;
}

}  // namespace calotype
