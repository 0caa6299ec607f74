// PNDM, Euler, Euler ancestral and DPM solvers: whole runs computed with diffusers 0.42.1, the sums
// of its own test loops, equalities between samplers, and the state of a walk; PyTorch's random
// numbers against PyTorch 2.15.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/json.h"
#include "core/torch_random.h"
#include "diffusion/ddpm.h"
#include "diffusion/dpm_solver.h"
#include "diffusion/euler.h"
#include "diffusion/pndm.h"
#include "diffusion/sampler_names.h"
#include "diffusion/scheduler.h"
#include "tests/temp_folder.h"

namespace calotype {
namespace {

constexpr const char *pndm = "PNDMScheduler", *euler = "EulerDiscreteScheduler",
                     *ancestral = "EulerAncestralDiscreteScheduler",
                     *dpm = "DPMSolverMultistepScheduler";

template <class F>
Tensor Fill(const Shape& shape, F&& f) {
  Tensor x(shape);
  for (int64_t i = 0; i < x.elements(); ++i) x.data()[i] = static_cast<float>(f(i));
  return x;
}

// --- Runs of fixtures/schedulers/runs.json: the sample 1.5 sin(.37 i), [2, 3, 2, 2], times the
// first sigma, or from step `first` on mixed with the noise cos(.9 i); the model 0.9 tanh(its
// input, channels reversed) + 0.1 cos(.23 i) + t / 10^4; the k-th noise sin(1.7 i + 1 + k).
// Expected: elements 0, 5, 13, 23 of the result, the sum of y_i cos(.5 i), the number of calls, the
// sum of (call + 1) * timestep, the first sigma.

TEST(Samplers, RunsEqualDiffusers) {
  const Shape shape{2, 3, 2, 2};
  const auto runs =
      ParseJson(test::ReadText(CALOTYPE_TEST_DATA "/fixtures/schedulers/runs.json")).at("runs");
  EXPECT_GE(runs.size(), 48u);
  for (const auto& run : runs) {
    SCOPED_TRACE(run.at("name").get<std::string>());
    const auto o = run.value("options", nlohmann::json::object());
    const SamplerOptions defaults, options{.s_churn = o.value("s_churn", 0.0),
                                           .s_tmin = o.value("s_tmin", 0.0),
                                           .s_tmax = o.value("s_tmax", defaults.s_tmax),
                                           .s_noise = o.value("s_noise", 1.0)};
    const int64_t first = run.value("first", 0), calls = run.at("calls");
    const auto values = run.at("values").get<std::vector<double>>();
    auto scheduler = MakeScheduler(
        ParseSchedulerConfig(JsonText(run.at("config")), run.at("type").get<std::string>()),
        options);
    scheduler->SetTimesteps(run.at("steps"));
    ASSERT_EQ(scheduler->size(), calls);
    double timesteps = 0;
    for (int64_t i = 0; i < calls; ++i)
      timesteps += static_cast<double>(i + 1) * scheduler->timesteps()[i];
    const double expected_timesteps = run.at("timesteps"), sigma = run.at("init_noise_sigma");
    EXPECT_NEAR(timesteps, expected_timesteps, 2e-6 * std::fabs(expected_timesteps));
    EXPECT_NEAR(scheduler->init_noise_sigma(), sigma, 1e-6 * sigma);

    Tensor x = Fill(shape, [](int64_t i) { return 1.5 * std::sin(0.37 * i); });
    if (first > 0) {
      x = scheduler->AddNoise(x, Fill(shape, [](int64_t i) { return std::cos(0.9 * i); }), first);
    } else {
      x = LinearCombination({{scheduler->init_noise_sigma(), x}});
    }
    int draws = 0;
    for (int64_t i = first; i < calls; ++i) {
      const Tensor input = scheduler->ScaleModelInput(x, i);
      const double t = scheduler->timesteps()[i];
      const Tensor output = Fill(shape, [&](int64_t k) {
        const int64_t reversed = k / 12 * 12 + (2 - k / 4 % 3) * 4 + k % 4;
        return 0.9 * std::tanh(double{input.data()[reversed]}) + 0.1 * std::cos(0.23 * k) + t / 1e4;
      });
      Tensor noise;
      if (scheduler->NeedsNoise(i)) {
        noise = Fill(shape, [&](int64_t k) { return std::sin(1.7 * k + 1 + draws); });
        ++draws;
      }
      x = scheduler->Step(output, i, x, noise);
    }
    // diffusers' arithmetic is float32.
    double largest = 1, sum = 0;
    for (float v : x.values()) largest = std::max(largest, std::fabs(double{v}));
    for (int64_t k = 0; k < x.elements(); ++k) sum += x.data()[k] * std::cos(0.5 * k);
    const int indices[] = {0, 5, 13, 23};
    for (int k = 0; k < 4; ++k)
      EXPECT_NEAR(x.data()[indices[k]], values[k], 1e-5 * largest) << indices[k];
    EXPECT_NEAR(sum, run.at("sum").get<double>(), 3e-5 * largest);
  }
}

// --- Whole loops of diffusers' own tests, with its model(x, t) = x t / (t + 1).

Tensor LoopSample(bool reversed = false) {
  // arange(768) / 768, or reversed, as [3, 8, 8, 4], permuted to [4, 3, 8, 8].
  return Fill({4, 3, 8, 8}, [&](int64_t i) {
    const int64_t b = i / 192, rest = i % 192, flat = rest * 4 + b;
    return static_cast<float>(reversed ? 767 - flat : flat) / 768.0f;
  });
}

// The sum of |x| after the steps from `first` on. The loops go on with the scaled input.
double LoopSum(const SchedulerConfig& config, int64_t first = 0) {
  auto scheduler = MakeScheduler(config);
  scheduler->SetTimesteps(10);
  TorchRandom random(0);
  Tensor x = first == 0 ? LinearCombination({{scheduler->init_noise_sigma(), LoopSample()}})
                        : scheduler->AddNoise(LoopSample(), LoopSample(/*reversed=*/true), first);
  for (int64_t i = first; i < scheduler->size(); ++i) {
    const double t = scheduler->timesteps()[i];
    x = scheduler->ScaleModelInput(x, i);
    const Tensor output = LinearCombination({{t / (t + 1), x}});
    x = scheduler->Step(output, i, x,
                        scheduler->NeedsNoise(i) ? random.NormalTensor(x.shape()) : Tensor());
  }
  double sum = 0;
  for (float v : x.values()) sum += std::fabs(v);
  return sum;
}

TEST(Samplers, LoopsOfDiffusers) {
  const std::string v = "v_prediction";
  EXPECT_NEAR(LoopSum({.type = pndm}), 198.1318, 1e-2);
  EXPECT_NEAR(LoopSum({.type = pndm, .prediction_type = v}), 67.3986, 1e-2);
  EXPECT_NEAR(LoopSum({.type = pndm, .beta_start = 0.01, .set_alpha_to_one = true}), 230.0399,
              1e-2);
  EXPECT_NEAR(LoopSum({.type = pndm, .beta_start = 0.01, .set_alpha_to_one = false}), 186.9482,
              1e-2);

  SchedulerConfig config{.type = euler, .num_train_timesteps = 1100};
  EXPECT_NEAR(LoopSum(config), 10.0807, 1e-2);
  config.use_karras_sigmas = true;
  EXPECT_NEAR(LoopSum(config), 124.523, 1e-2);
  EXPECT_NEAR(LoopSum({.type = euler, .num_train_timesteps = 1100, .prediction_type = v}), 0.0002,
              1e-2);
  EXPECT_NEAR(LoopSum({.type = ancestral, .num_train_timesteps = 1100}), 152.3192, 1e-2);
  EXPECT_NEAR(LoopSum({.type = ancestral, .num_train_timesteps = 1100, .prediction_type = v}),
              108.4439, 1e-2);

  config = {.type = dpm, .final_sigmas_type = "sigma_min", .lower_order_final = false};
  EXPECT_NEAR(LoopSum(config) / 768, 0.3301, 1e-3);
  EXPECT_NEAR(LoopSum(config, 5), 318.4111, 1e-2);
  SchedulerConfig limited = config;
  limited.thresholding = true;
  limited.dynamic_thresholding_ratio = 0.87;
  limited.sample_max_value = 0.5;
  EXPECT_NEAR(LoopSum(limited) / 768, 1.1364, 1e-3);
  config.prediction_type = v;
  EXPECT_NEAR(LoopSum(config) / 768, 0.2251, 1e-3);
  config.use_karras_sigmas = true;
  EXPECT_NEAR(LoopSum(config) / 768, 0.2096, 1e-3);
  config.use_karras_sigmas = false;
  config.use_lu_lambdas = true;
  EXPECT_NEAR(LoopSum(config) / 768, 0.1554, 1e-3);
}

// --- Equalities between samplers, for the best model of data N(0, 1/4), disturbed.

// The result of a walk from `x` (times the first sigma), with noise of one seed.
Tensor Walk(const SchedulerConfig& config, int64_t steps, bool ancestral_noise = false) {
  auto scheduler = MakeScheduler(config);
  scheduler->SetTimesteps(steps);
  TorchRandom random(3);
  Tensor x =
      LinearCombination({{scheduler->init_noise_sigma(), random.NormalTensor({2, 3, 4, 4})}});
  for (int64_t i = 0; i < scheduler->size(); ++i) {
    const Tensor input = scheduler->ScaleModelInput(x, i);
    const double t = scheduler->timesteps()[i];
    const double alpha_bar = scheduler->noise_schedule().AlphaBar(std::llrint(t));
    const double signal = std::sqrt(alpha_bar), spread = std::sqrt(1 - alpha_bar);
    const double factor =
        (config.prediction_type == "epsilon" ? 1 : 0.75 * signal) * spread / (1 - 0.75 * alpha_bar);
    const Tensor output = Fill(x.shape(), [&](int64_t k) {
      const double v = input.data()[k];
      return factor * v + 0.05 * std::sin(3 * v + t / 100);
    });
    // Both draw at each step, so that they have equal noise, also where only one uses it.
    const Tensor noise = ancestral_noise ? random.NormalTensor(x.shape()) : Tensor();
    x = scheduler->Step(output, i, x, scheduler->NeedsNoise(i) ? noise : Tensor());
  }
  return x;
}

void ExpectEqual(const Tensor& a, const Tensor& b) {
  double largest = 0, difference = 0;
  for (int64_t k = 0; k < a.elements(); ++k) {
    largest = std::max(largest, std::fabs(double{a.data()[k]}));
    difference = std::max(difference, std::fabs(double{a.data()[k]} - b.data()[k]));
  }
  EXPECT_GT(largest, 0.1);
  EXPECT_LE(difference, 5e-7 * largest);
}

SchedulerConfig StableDiffusion(const char* type, const char* prediction, const char* spacing) {
  return {.type = type,
          .beta_start = 0.00085,
          .beta_end = 0.012,
          .beta_schedule = "scaled_linear",
          .prediction_type = prediction,
          .timestep_spacing = spacing,
          .steps_offset = 1,
          .clip_sample = false,
          .set_alpha_to_one = true};
}

TEST(Samplers, Equalities) {
  for (const char* prediction : {"epsilon", "v_prediction"}) {
    for (int64_t steps : {10, 25}) {
      SCOPED_TRACE(fmt::format("{} {}", prediction, steps));
      // Euler is DDIM in other coordinates, its ancestral form DDPM.
      ExpectEqual(Walk(StableDiffusion(euler, prediction, "leading"), steps),
                  Walk(StableDiffusion("DDIMScheduler", prediction, "leading"), steps));
      ExpectEqual(Walk(StableDiffusion(ancestral, prediction, "leading"), steps, true),
                  Walk(StableDiffusion("DDPMScheduler", prediction, "leading"), steps, true));
      // DPM-Solver++ of order 1 is DDIM; trailing spacing gives both the same timesteps.
      SchedulerConfig first_order = StableDiffusion(dpm, prediction, "trailing");
      first_order.solver_order = 1;
      ExpectEqual(Walk(first_order, steps),
                  Walk(StableDiffusion("DDIMScheduler", prediction, "trailing"), steps));
    }
  }
}

// --- The state of a walk.

template <class F>
std::string MessageOf(F&& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "(no error)";
}

TEST(Samplers, StepsFollowEachOther) {
  const Tensor x = Tensor::Full({1, 2, 3, 3}, 0.5), o = Tensor::Full({1, 2, 3, 3}, 0.25);
  for (const char* type : {pndm, dpm}) {
    SCOPED_TRACE(type);
    auto scheduler = MakeScheduler({.type = type, .skip_prk_steps = true});
    EXPECT_NE(MessageOf([&] { scheduler->Step(o, 0, x); }).find("SetTimesteps"), std::string::npos);
    scheduler->SetTimesteps(10);
    const Tensor first = scheduler->Step(o, 0, x);
    EXPECT_NE(MessageOf([&] { scheduler->Step(o, 0, x); }).find("SetTimesteps"), std::string::npos);
    EXPECT_THROW(scheduler->Step(o, 2, x), ValueError);
    Tensor y = scheduler->Step(o, 1, first);
    // What a caller does to tensors of earlier steps has no effect.
    auto again = MakeScheduler({.type = type, .skip_prk_steps = true});
    again->SetTimesteps(10);
    Tensor sample = x.Clone(), output = o.Clone();
    again->Step(output, 0, sample);
    for (Tensor* t : {&sample, &output}) std::fill_n(t->data(), t->elements(), NAN);
    EXPECT_EQ(again->Step(o, 1, first).data()[0], y.data()[0]);
    // Another walk starts from scratch, anywhere.
    scheduler->SetTimesteps(10);
    EXPECT_EQ(scheduler->Step(o, 0, x).data()[0], first.data()[0]);
    scheduler->SetTimesteps(10);
    scheduler->Step(o, 6, x);
    scheduler->Step(o, 7, x);
    EXPECT_THROW(scheduler->Step(o, 6, x), ValueError);
  }
  auto churn = MakeScheduler({.type = euler}, {.s_churn = 5, .s_tmin = 1});
  churn->SetTimesteps(10);
  EXPECT_TRUE(churn->NeedsNoise(0));
  EXPECT_FALSE(churn->NeedsNoise(9));
  EXPECT_THROW(churn->Step(o, 0, x), ValueError);
  EXPECT_THROW(churn->Step(o, 9, x, x), ValueError);
}

TEST(Samplers, TooManyOrTooFewSteps) {
  auto runge_kutta = MakeScheduler({.type = pndm});
  EXPECT_NE(MessageOf([&] { runge_kutta->SetTimesteps(3); }).find("skip_prk_steps"),
            std::string::npos);
  runge_kutta->SetTimesteps(4);
  EXPECT_EQ(runge_kutta->size(), 13);
  auto solver = MakeScheduler({.type = dpm});
  solver->SetTimesteps(500);
  EXPECT_NE(MessageOf([&] { solver->SetTimesteps(1000); }).find("same noise level"),
            std::string::npos);
  EXPECT_THROW(solver->timesteps(), ValueError);  // the failed call left nothing behind
  EXPECT_THROW(MakeScheduler({.type = dpm, .lambda_min_clipped = 20})->SetTimesteps(5), ValueError);
}

// With karras sigmas the initial noise has the largest one; leading spacing keeps the variance.
TEST(Samplers, FirstSigma) {
  EulerDiscreteScheduler trailing({.type = euler, .timestep_spacing = "trailing"});
  EXPECT_THROW(trailing.init_noise_sigma(), ValueError);
  trailing.SetTimesteps(5);
  EXPECT_EQ(trailing.init_noise_sigma(), double{trailing.sigmas()[0]});
  EXPECT_EQ(trailing.sigmas().size(), 6u);
  EXPECT_EQ(trailing.sigmas()[5], 0);
}

// --- Names.

TEST(SamplerNames, SetClassAndOptions) {
  SchedulerConfig base{.prediction_type = "v_prediction", .timestep_spacing = "trailing"};
  SchedulerConfig karras = WithSampler(base, "DPM++ 2M Karras");
  EXPECT_EQ(karras.type, dpm);
  EXPECT_TRUE(karras.use_karras_sigmas);
  EXPECT_EQ(karras.prediction_type, "v_prediction");
  EXPECT_EQ(karras.timestep_spacing, "trailing");
  EXPECT_EQ(WithSampler(base, "dpm++_2m_karras"), karras);
  EXPECT_EQ(WithSampler(karras, "dpm++-2m").use_karras_sigmas, false);
  EXPECT_EQ(WithSampler(base, "dpm++-2m-sde").algorithm_type, "sde-dpmsolver++");
  EXPECT_EQ(WithSampler(base, "Euler a").type, ancestral);
  EXPECT_EQ(WithSampler(base, "euler-ancestral").type, ancestral);
  EXPECT_EQ(WithSampler(base, "PLMS").type, pndm);
  SchedulerConfig own = karras;
  own.solver_order = 3;
  EXPECT_EQ(WithSampler(own, dpm), own);  // the class alone
  EXPECT_NE(MessageOf([&] { WithSampler(base, "heun"); }).find("dpm++-2m-karras"),
            std::string::npos);
  for (const char* name : {"DDIM", "DDPM", "PLMS", "Euler", "Euler Karras", "Euler a", "DPM++ 2M",
                           "DPM++ 2M Karras", "DPM++ 2M SDE", "DPM++ 2M SDE Karras"}) {
    EXPECT_EQ(SamplerTitle(WithSampler(base, name)), name);
    EXPECT_EQ(SamplerTitle(WithSampler(karras, name)), name);
  }
}

// --- PyTorch's random numbers: the bits that PyTorch 2.15 draws.

template <class T>
std::vector<T> List(const Tensor& x) {
  return {x.values<T>().begin(), x.values<T>().end()};
}

TEST(TorchRandom, Normal) {
  TorchRandom random(0);
  // torch.randn(5), torch.randn(2): pairs across calls.
  EXPECT_EQ(List<float>(random.NormalTensor({5})),
            (std::vector<float>{0x1.8a7eb8p+0f, -0x1.2c78ap-2f, -0x1.16e292p+1f, 0x1.23096cp-1f,
                                -0x1.15a342p+0f}));
  EXPECT_EQ(List<float>(random.NormalTensor({2})),
            (std::vector<float>{-0x1.660a5ap+0f, 0x1.9d06f4p-2f}));
  // torch.randn(17): the last 16 are drawn again.
  EXPECT_EQ(List<float>(TorchRandom(0).NormalTensor({17})),
            (std::vector<float>{-0x1.20370ap+0f, -0x1.b2288cp+0f, 0x1.222008p-1f, 0x1.9646bap-1f,
                                0x1.329b16p-1f, -0x1.8e1ab6p+0f, -0x1.5d8d94p-2f, 0x1.da5e9cp+0f,
                                0x1.df54aap-2f, -0x1.2bc656p-1f, -0x1.631dd6p-3f, 0x1.77c348p-3f,
                                0x1.63ad8p+0f, 0x1.961ap+0f, 0x1.e48138p-1f, -0x1.aff666p-1f,
                                0x1.dd186p-1f}));
  // A half pair waits while blocks are drawn.
  TorchRandom waits(3);
  waits.NormalTensor({3});
  EXPECT_EQ(waits.NormalTensor({4, 4}).data()[0], 0x1.35f1dap-1f);
  EXPECT_EQ(List<float>(waits.NormalTensor({2})),
            (std::vector<float>{-0x1.3a394p-1f, -0x1.bab184p-1f}));
  // In float64 the platform's own functions decide the last bit.
  const Tensor wide = TorchRandom(0).NormalTensor({16}, DType::kF64);
  EXPECT_NEAR(wide.data<double>()[0], -0x1.27bb92e9262dcp+1, 1e-15);
  EXPECT_NEAR(wide.data<double>()[15], 0x1.5a213bee53bb6p-2, 1e-15);
}

// FNV-1a over the bits of torch.randn(160000) of seed 0.
TEST(TorchRandom, ManyNormals) {
  const Tensor x = TorchRandom(0).NormalTensor({160000});
  uint64_t hash = 0xcbf29ce484222325;
  const auto* bytes = static_cast<const unsigned char*>(x.raw());
  for (int64_t i = 0; i < x.bytes(); ++i) hash = (hash ^ bytes[i]) * 0x100000001b3;
  EXPECT_EQ(hash, 0xe789d16f0f0bcdfdu);
}

TEST(TorchRandom, UniformAndIntegers) {
  TorchRandom random(7);
  EXPECT_EQ(List<float>(random.UniformTensor({4})),
            (std::vector<float>{0x1.11e15ep-1f, 0x1.97262p-3f, 0x1.518432p-1f, 0x1.5053ecp-1f}));
  EXPECT_EQ(
      List<double>(random.UniformTensor({3}, 0, 1, DType::kF64)),
      (std::vector<double>{0x1.b9643fa6cd0d3p-1, 0x1.5039774a13667p-1, 0x1.d855c4ed9ecb9p-1}));
  EXPECT_EQ(List<float>(TorchRandom(7).UniformTensor({4}, -0.3, 0.7)),
            (std::vector<float>{0x1.e11f1p-3f, -0x1.9e809p-4f, 0x1.6fd53p-2f, 0x1.6d74a4p-2f}));
  random = TorchRandom(7);
  EXPECT_EQ(List<int64_t>(random.IntegerTensor(0, 10, {8})),
            (std::vector<int64_t>{5, 2, 1, 6, 3, 7, 7, 9}));
  EXPECT_EQ(List<int64_t>(random.IntegerTensor(-5, 1000, {3})),
            (std::vector<int64_t>{308, 141, 578}));
  EXPECT_EQ(List<int64_t>(TorchRandom(7).IntegerTensor(0, int64_t{1} << 27, {3})),
            (std::vector<int64_t>{59306159, 36889796, 128500249}));
  EXPECT_EQ(List<int64_t>(TorchRandom(7).IntegerTensor(0, int64_t{1} << 28, {3})),
            (std::vector<int64_t>{171107524, 27798006, 174903507}));
  EXPECT_EQ(List<int64_t>(TorchRandom(7).IntegerTensor(0, int64_t{1} << 40, {2})),
            (std::vector<int64_t>{752595690692, 108744157686}));
  // Only the low 32 bits of a seed count.
  EXPECT_EQ(TorchRandom((uint64_t{1} << 32) + 5).Next(), TorchRandom(5).Next());
  EXPECT_EQ(TorchRandom(~uint64_t{0}).UniformTensor({1}).data()[0], 0x1.fcd346p-1f);
  EXPECT_THROW(random.UniformTensor({1}, 1, 0), ValueError);
  EXPECT_THROW(random.IntegerTensor(3, 3, {1}), ValueError);
  EXPECT_THROW(random.NormalTensor({1}, DType::kI64), ShapeError);
}

}  // namespace
}  // namespace calotype
