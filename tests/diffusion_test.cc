// Noise schedule, DDIM, DDPM, guidance and configuration against diffusers: the sums of its own
// test loops, and single steps computed with diffusers 0.42.1. (The golden fixtures:
// conformance_test; the other samplers: scheduler_test.)
#include <gtest/gtest.h>

#include <cmath>
#include <memory>

#include "core/error.h"
#include "core/random.h"
#include "core/torch_random.h"
#include "diffusion/ddim.h"
#include "diffusion/ddpm.h"
#include "diffusion/guidance.h"
#include "diffusion/noise_schedule.h"
#include "diffusion/scheduler.h"
#include "graph/functions.h"
#include "graph/interpreter.h"

namespace calotype {
namespace {

template <class F>
Tensor Fill(const Shape& shape, F&& f) {
  Tensor x(shape);
  for (int64_t i = 0; i < x.elements(); ++i) x.data()[i] = static_cast<float>(f(i));
  return x;
}

std::string MessageOf(auto&& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "(no error)";
}

Tensor Timesteps(std::vector<int64_t> timesteps) {
  return Tensor::From({static_cast<int64_t>(timesteps.size())}, timesteps);
}

// --- Tables.

// alphas_cumprod of DDPMScheduler(beta_start=.00085, beta_end=.012) at seven timesteps, and their
// sum.
struct TableCase {
  const char* beta_schedule;
  bool zero_snr;
  double values[7];
  double sum;
};
constexpr TableCase kTables[] = {
    {"linear",
     false,
     {0.999149978, 0.998289526, 0.867344201, 0.568788052, 0.160771623, 0.0225192253, 0.00157896278},
     309.075445},
    {"linear",
     true,
     {0.999149978, 0.998254001, 0.862088621, 0.553568006, 0.141512632, 0.0132009471, 0},
     297.63943},
    {"scaled_linear",
     false,
     {0.999149978, 0.998296022, 0.894223154, 0.673792303, 0.276332468, 0.0561698042, 0.00466009509},
     373.376471},
    {"scaled_linear",
     true,
     {0.999149978, 0.998233497, 0.886761069, 0.65245676, 0.241018638, 0.03279908, 0},
     352.179224},
    {"squaredcos_cap_v2",
     false,
     {0.999958694, 0.99991256, 0.971575618, 0.845888019, 0.492285043, 0.143178657, 2.42873499e-09},
     495.577484},
    {"squaredcos_cap_v2",
     true,
     {0.999958873, 0.999912739, 0.971574426, 0.845881224, 0.492265046, 0.143155605, 0},
     495.564242},
    {"sigmoid",
     false,
     {0.999122441, 0.998245299, 0.912771642, 0.773602128, 0.341532677, 0.0304141417, 0.00157066691},
     407.634188},
    {"sigmoid",
     true,
     {0.999122441, 0.998209059, 0.909290314, 0.7649104, 0.321792811, 0.0196921509, 0},
     397.402125},
};

TEST(NoiseSchedule, TablesOfAllSchedules) {
  for (const TableCase& c : kTables) {
    SCOPED_TRACE(fmt::format("{} zero_snr={}", c.beta_schedule, c.zero_snr));
    NoiseSchedule schedule({.type = "DDPMScheduler",
                            .beta_start = 0.00085,
                            .beta_end = 0.012,
                            .beta_schedule = c.beta_schedule,
                            .rescale_betas_zero_snr = c.zero_snr});
    ASSERT_EQ(schedule.size(), 1000);
    const int timesteps[] = {0, 1, 100, 250, 500, 750, 999};
    for (int i = 0; i < 7; ++i) {
      EXPECT_NEAR(schedule.AlphaBar(timesteps[i]), c.values[i], 1e-7 + 1e-6 * c.values[i]);
    }
    EXPECT_EQ(schedule.AlphaBar(999) == 0, c.zero_snr);
    double sum = 0;
    for (float a : schedule.alphas_cumprod()) sum += a;
    EXPECT_NEAR(sum, c.sum, 1e-6 * c.sum);
  }
}

TEST(NoiseSchedule, TrainedBetas) {
  NoiseSchedule schedule({.num_train_timesteps = 3, .trained_betas = {0.5, 0.25, 1}});
  EXPECT_EQ(schedule.AlphaBar(0), 0.5);
  EXPECT_EQ(schedule.AlphaBar(1), 0.375);
  EXPECT_EQ(schedule.AlphaBar(2), 0);
  EXPECT_THROW(schedule.AlphaBar(3), ValueError);
  EXPECT_THROW(schedule.AlphaBar(-1), ValueError);
  EXPECT_THROW(NoiseSchedule({.trained_betas = {0.5}}), ValueError);
  EXPECT_THROW(NoiseSchedule({.num_train_timesteps = 1, .rescale_betas_zero_snr = true}),
               ValueError);
}

TEST(NoiseSchedule, ForwardProcessAndTargets) {
  Random random(1);
  const Tensor x0 = random.NormalTensor({3, 2, 4, 5}), n = random.NormalTensor({3, 2, 4, 5});
  const Tensor timesteps = Timesteps({0, 999, 421});
  for (const char* prediction : {"epsilon", "sample", "v_prediction"}) {
    NoiseSchedule schedule({.prediction_type = prediction});
    const Tensor noisy = schedule.AddNoise(x0, n, timesteps);
    const Tensor velocity = schedule.Velocity(x0, n, timesteps);
    for (int64_t i = 0; i < x0.elements(); ++i) {
      const double a = schedule.AlphaBar(timesteps.data<int64_t>()[i / 40]);
      const double x = x0.data()[i], e = n.data()[i];
      EXPECT_NEAR(noisy.data()[i], std::sqrt(a) * x + std::sqrt(1 - a) * e, 1e-6);
      EXPECT_NEAR(velocity.data()[i], std::sqrt(a) * e - std::sqrt(1 - a) * x, 1e-6);
    }
    const Tensor target = schedule.Target(x0, n, timesteps);
    const Tensor& wanted = prediction == std::string_view("epsilon")  ? n
                           : prediction == std::string_view("sample") ? x0
                                                                      : velocity;
    EXPECT_TRUE(
        std::equal(target.values().begin(), target.values().end(), wanted.values().begin()));

    // One timestep for all samples.
    const Tensor one = schedule.AddNoise(x0, n, Timesteps({421}));
    EXPECT_EQ(one.data()[119], noisy.data()[119]);
    EXPECT_NE(one.data()[0], noisy.data()[0]);
  }
}

// The nodes give the tensor functions' bits, with a timestep for each sample and with one for all.
TEST(NoiseSchedule, GraphEqualsTensors) {
  Random random(2);
  const Shape shape{3, 2, 4, 5};
  const Tensor x0 = random.NormalTensor(shape), n = random.NormalTensor(shape);
  for (const char* prediction : {"epsilon", "sample", "v_prediction"}) {
    for (const Tensor& timesteps : {Timesteps({7, 999, 421}), Timesteps({421})}) {
      NoiseSchedule schedule({.beta_schedule = "scaled_linear", .prediction_type = prediction});
      ComputationGraph graph;
      Value a = graph.Input("sample", shape), b = graph.Input("noise", shape);
      Value t = graph.Input("timesteps", timesteps.type());
      graph.Output("noisy", schedule.AddNoise(a, b, t));
      graph.Output("velocity", schedule.Velocity(a, b, t));
      graph.Output("target", schedule.Target(a, b, t));
      Interpreter interpreter(graph);
      const std::vector<Tensor> inputs{x0, n, timesteps};
      const std::vector<Tensor> results = interpreter.Run(inputs);
      const Tensor expected[] = {schedule.AddNoise(x0, n, timesteps),
                                 schedule.Velocity(x0, n, timesteps),
                                 schedule.Target(x0, n, timesteps)};
      for (int i = 0; i < 3; ++i) {
        EXPECT_TRUE(std::equal(results[i].values().begin(), results[i].values().end(),
                               expected[i].values().begin()))
            << prediction << " output " << i;
      }
      const std::vector<Tensor> bad{
          x0, n, Tensor::From(timesteps.shape(), std::vector<int64_t>(timesteps.elements(), 1000))};
      EXPECT_THROW(interpreter.Run(bad), ValueError);
    }
  }
}

TEST(NoiseSchedule, BadArguments) {
  NoiseSchedule schedule({});
  const Tensor x = Tensor::Zeros({2, 3}), t = Timesteps({1, 2});
  EXPECT_THROW(schedule.AddNoise(x, Tensor::Zeros({2, 4}), t), ShapeError);
  EXPECT_THROW(schedule.AddNoise(x, x, Timesteps({1, 2, 3})), ShapeError);
  EXPECT_THROW(schedule.AddNoise(x, x, Tensor::Zeros({2})), ShapeError);
  EXPECT_THROW(schedule.AddNoise(x, Tensor(), t), ShapeError);
  EXPECT_THROW(schedule.AddNoise(x, x, Timesteps({1, 1000})), ValueError);
  EXPECT_THROW(schedule.Velocity(x, x, Timesteps({-1})), ValueError);
}

// --- Timesteps.

// The step at a timestep.
int64_t At(const Scheduler& scheduler, double timestep) {
  const auto& list = scheduler.timesteps();
  const auto found = std::find(list.begin(), list.end(), timestep);
  EXPECT_NE(found, list.end()) << timestep;
  return found - list.begin();
}

TEST(Scheduler, TimestepsOfAllSpacings) {
  using List = std::vector<double>;
  auto timesteps = [](const char* spacing, int64_t steps, int64_t offset = 0) {
    DdimScheduler scheduler({.timestep_spacing = spacing, .steps_offset = offset});
    scheduler.SetTimesteps(steps);
    return scheduler.timesteps();
  };
  EXPECT_EQ(timesteps("leading", 5, 1), (List{801, 601, 401, 201, 1}));
  EXPECT_EQ(timesteps("leading", 7), (List{852, 710, 568, 426, 284, 142, 0}));
  EXPECT_EQ(timesteps("linspace", 1), (List{0}));
  EXPECT_EQ(timesteps("linspace", 3), (List{999, 500, 0}));  // 499.5 rounds to even
  EXPECT_EQ(timesteps("linspace", 16),
            (List{999, 932, 866, 799, 733, 666, 599, 533, 466, 400, 333, 266, 200, 133, 67, 0}));
  EXPECT_EQ(timesteps("trailing", 1), (List{999}));
  EXPECT_EQ(timesteps("trailing", 7), (List{999, 856, 713, 570, 428, 285, 142}));
  EXPECT_EQ(timesteps("trailing", 16),
            (List{999, 937, 874, 811, 749, 687, 624, 561, 499, 437, 374, 311, 249, 187, 124, 61}));
  for (const char* spacing : {"leading", "linspace", "trailing"}) {
    for (int64_t steps = 1; steps <= 1000; ++steps) {
      const List list = timesteps(spacing, steps);
      ASSERT_EQ(list.size(), static_cast<size_t>(steps));
      ASSERT_TRUE(list.front() < 1000 && list.back() >= 0);
      for (size_t i = 1; i < list.size(); ++i) ASSERT_LT(list[i], list[i - 1]) << spacing << steps;
    }
  }
}

TEST(Scheduler, BadCalls) {
  DdimScheduler scheduler({.steps_offset = 1});
  const Tensor x = Tensor::Zeros({1, 2, 3, 3});
  EXPECT_THROW(scheduler.timesteps(), ValueError);
  EXPECT_NE(MessageOf([&] { scheduler.Step(x, 0, x); }).find("SetTimesteps"), std::string::npos);
  EXPECT_THROW(scheduler.SetTimesteps(0), ValueError);
  EXPECT_THROW(scheduler.SetTimesteps(1001), ValueError);
  EXPECT_THROW(scheduler.SetTimesteps(1000), ValueError);  // the offset leads to timestep 1000
  scheduler.SetTimesteps(10);
  scheduler.Step(x, 0, x);
  EXPECT_THROW(scheduler.Step(x, -1, x), ValueError);
  EXPECT_THROW(scheduler.Step(x, 10, x), ValueError);
  EXPECT_THROW(scheduler.ScaleModelInput(x, 10), ValueError);
  EXPECT_THROW(scheduler.AddNoise(x, x, 10), ValueError);
  EXPECT_THROW(scheduler.Step(x, 0, x, x), ValueError);  // takes no noise
  EXPECT_THROW(scheduler.Step(Tensor::Zeros({1, 2, 3, 4}), 0, x), ShapeError);
  EXPECT_THROW(scheduler.Step(x, 0, Tensor()), ShapeError);
  EXPECT_THROW(scheduler.Step(Tensor(), 0, x), ShapeError);
  DdimScheduler noisy({}, {.eta = 0.5});
  noisy.SetTimesteps(10);
  EXPECT_TRUE(noisy.NeedsNoise(0));
  EXPECT_THROW(noisy.Step(x, 0, x), ValueError);
  EXPECT_THROW(noisy.Step(x, 0, x, Tensor::Zeros({1, 2})), ShapeError);
  EXPECT_THROW(DdimScheduler({}, {.eta = -0.1}), ValueError);
  EXPECT_THROW(DdimScheduler({}, {.eta = std::nan("")}), ValueError);
  EXPECT_THROW(MakeScheduler({.type = "DDPMScheduler"}, {.eta = 0.5}), ValueError);
  EXPECT_THROW(MakeScheduler({.type = "DDPMScheduler"}, {.use_clipped_model_output = true}),
               ValueError);
  EXPECT_THROW(MakeScheduler({}, {.s_churn = 1}), ValueError);
  EXPECT_THROW(MakeScheduler({.type = "EulerDiscreteScheduler"}, {.s_churn = -1}), ValueError);
  EXPECT_THROW(MakeScheduler({.type = "UniPCMultistepScheduler"}), UnsupportedError);
  EXPECT_NE(dynamic_cast<DdpmScheduler*>(MakeScheduler({.type = "DDPMScheduler"}).get()), nullptr);
  // Noise prediction says nothing where no signal is left.
  DdimScheduler zero({.rescale_betas_zero_snr = true, .timestep_spacing = "trailing"});
  zero.SetTimesteps(10);
  EXPECT_THROW(zero.Step(x, 0, x), NumericError);
  zero.Step(x, 1, x);
}

TEST(Scheduler, Variances) {
  DdimScheduler ddim({});
  ddim.SetTimesteps(50);
  EXPECT_NEAR(ddim.Variance(At(ddim, 0)), 0, 1e-5);
  EXPECT_NEAR(ddim.Variance(At(ddim, 420)), 0.14771, 1e-5);
  EXPECT_NEAR(ddim.Variance(At(ddim, 980)), 0.32460, 1e-5);
  DdpmScheduler ddpm({.type = "DDPMScheduler"});
  ddpm.SetTimesteps(1000);
  EXPECT_NEAR(ddpm.Variance(At(ddpm, 0)), 0, 1e-5);
  EXPECT_NEAR(ddpm.Variance(At(ddpm, 487)), 0.00979, 1e-5);
  EXPECT_NEAR(ddpm.Variance(At(ddpm, 999)), 0.02, 1e-5);
  EXPECT_FALSE(ddpm.NeedsNoise(999));
  EXPECT_TRUE(ddpm.NeedsNoise(998));
}

// --- Single steps: sample 1.5 sin(.37 i), output cos(.23 i), noise sin(1.7 i + 1), [2, 3, 2, 2];
// expected elements 0, 5, 13, 23 and the sum of y_i cos(.5 i), from diffusers 0.42.1.

struct StepCase {
  const char* name;
  SchedulerConfig config;
  SamplerOptions options;
  int64_t steps, timestep;
  double values[4];
  double sum;
};

std::vector<StepCase> StepCases() {
  const std::string ddpm = "DDPMScheduler";
  return {
      {"eps clip", {}, {}, 10, 500, {0.4580453, 0.8067954, -1.327683, 0.9303051}, -5.61435},
      {"eta .7",
       {.clip_sample = false},
       {.eta = 0.7},
       10,
       500,
       {-0.3470898, 1.920632, -2.043801, 1.794453},
       -16.2001},
      {"eta 1 sample trailing",
       {.prediction_type = "sample", .timestep_spacing = "trailing", .clip_sample = false},
       {.eta = 1},
       30,
       499,
       {0.533011, 1.188875, -1.789016, 1.381101},
       -8.203949},
      {"v linspace",
       {.beta_schedule = "squaredcos_cap_v2",
        .prediction_type = "v_prediction",
        .timestep_spacing = "linspace",
        .clip_sample_range = 0.5},
       {.eta = 0.3},
       7,
       666,
       {0.1642069, 1.274238, -1.357538, 1.129702},
       -9.12162},
      {"clipped output",
       {.clip_sample_range = 0.8},
       {.use_clipped_model_output = true},
       10,
       900,
       {-0.01791829, 1.458938, -1.509854, 1.205823},
       -10.90635},
      {"threshold",
       {.thresholding = true, .dynamic_thresholding_ratio = 0.9, .sample_max_value = 3},
       {},
       10,
       700,
       {0.8272352, 0.56313, -1.135711, 0.698897},
       -2.097167},
      {"last not one",
       {.steps_offset = 1, .clip_sample = false, .set_alpha_to_one = false},
       {},
       10,
       1,
       {-0.004830473, 1.440026, -1.488174, 1.186074},
       -10.68409},
      {"zero snr sample",
       {.prediction_type = "sample",
        .rescale_betas_zero_snr = true,
        .timestep_spacing = "trailing"},
       {},
       4,
       999,
       {0.0518606, 1.461157, -1.542117, 1.215358},
       -10.67363},
      {"ddpm small",
       {.type = ddpm},
       {},
       10,
       500,
       {0.3232052, 1.030345, -1.760333, 1.432307},
       -8.673687},
      {"ddpm small linspace v",
       {.type = ddpm,
        .prediction_type = "v_prediction",
        .timestep_spacing = "linspace",
        .clip_sample = false},
       {},
       7,
       832,
       {0.7062454, 0.2991899, -1.183315, 0.9292032},
       -1.919336},
      {"ddpm small log sample",
       {.type = ddpm, .prediction_type = "sample", .variance_type = "fixed_small_log"},
       {},
       10,
       500,
       {0.8938922, 0.8615605, -1.757061, 1.302767},
       -5.102132},
      {"ddpm large",
       {.type = ddpm, .beta_schedule = "sigmoid", .variance_type = "fixed_large"},
       {},
       10,
       500,
       {0.02331036, 1.069815, -1.787621, 1.514725},
       -10.063},
      {"ddpm last", {.type = ddpm}, {}, 10, 0, {-0.01000133, 1, -1, 1}, -8.229543},
      {"ddpm offset last",
       {.type = ddpm, .steps_offset = 1},
       {},
       10,
       1,
       {-0.01483204, 1, -1, 1},
       -8.243603},
      {"ddpm threshold",
       {.type = ddpm, .thresholding = true, .sample_max_value = 2},
       {},
       10,
       800,
       {0.676629, 0.6704739, -1.54917, 1.213235},
       -4.771648},
      {"ddpm learned",
       {.type = ddpm, .variance_type = "learned"},
       {},
       10,
       500,
       {0.548068, 1.037358, -1.986068, 1.616997},
       -8.404568},
      {"ddpm learned_range",
       {.type = ddpm, .variance_type = "learned_range"},
       {},
       10,
       500,
       {0.3235944, 1.027738, -1.804118, 1.432408},
       -8.710512},
  };
}

void ExpectValues(const Tensor& y, const double (&values)[4], double sum) {
  const int indices[] = {0, 5, 13, 23};
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(y.data()[indices[i]], values[i], 4e-6) << indices[i];
  double total = 0;
  for (int64_t i = 0; i < y.elements(); ++i) total += y.data()[i] * std::cos(0.5 * i);
  EXPECT_NEAR(total, sum, 3e-5);
}

TEST(Scheduler, StepsEqualDiffusers) {
  const Shape shape{2, 3, 2, 2};
  const Tensor x = Fill(shape, [](int64_t i) { return 1.5 * std::sin(0.37 * i); });
  const Tensor o = Fill(shape, [](int64_t i) { return std::cos(0.23 * i); });
  const Tensor n = Fill(shape, [](int64_t i) { return std::sin(1.7 * i + 1); });
  for (const StepCase& c : StepCases()) {
    SCOPED_TRACE(c.name);
    auto scheduler = MakeScheduler(c.config, c.options);
    scheduler->SetTimesteps(c.steps);
    Tensor output = o;
    if (c.config.variance_type.starts_with("learned")) {
      // The second half of the channels: sin(.9 k) of the flat index of [2, 6, 2, 2], or its
      // magnitude.
      output = Fill({2, 6, 2, 2}, [&](int64_t i) {
        if (i % 24 < 12) return static_cast<double>(o.data()[i / 24 * 12 + i % 24]);
        return c.config.variance_type == "learned" ? std::fabs(std::sin(0.9 * i))
                                                   : std::sin(0.9 * i);
      });
    }
    const int64_t i = At(*scheduler, static_cast<double>(c.timestep));
    const Tensor noise = scheduler->NeedsNoise(i) ? n : Tensor();
    ExpectValues(scheduler->Step(output, i, x, noise), c.values, c.sum);
  }
}

TEST(Scheduler, LearnedVarianceNeedsTwiceTheChannels) {
  DdpmScheduler scheduler({.type = "DDPMScheduler", .variance_type = "learned"});
  scheduler.SetTimesteps(10);
  const Tensor x = Tensor::Zeros({1, 2, 2, 2}), output = Tensor::Full({1, 4, 2, 2}, -1);
  EXPECT_THROW(scheduler.Step(x, 0, x, x), ShapeError);
  EXPECT_THROW(scheduler.Step(output, 0, x, x), NumericError);  // a negative variance
}

// --- Whole loops of diffusers' own tests, with its model(x, t) = x t / (t + 1).

Tensor LoopSample(bool reversed) {
  // arange(768) / 768, or reversed, as [3, 8, 8, 4], permuted to [4, 3, 8, 8].
  return Fill({4, 3, 8, 8}, [&](int64_t i) {
    const int64_t b = i / 192, rest = i % 192, flat = rest * 4 + b;
    return static_cast<float>(reversed ? 767 - flat : flat) / 768.0f;
  });
}

template <class Noise>
double LoopSum(Scheduler& scheduler, Tensor x, Noise&& noise, int64_t first = 0) {
  for (int64_t i = first; i < scheduler.size(); ++i) {
    const float t = static_cast<float>(scheduler.timesteps()[i]);
    const Tensor output = Fill(x.shape(), [&](int64_t j) { return x.data()[j] * t / (t + 1); });
    x = scheduler.Step(output, i, x, scheduler.NeedsNoise(i) ? noise() : Tensor());
  }
  double sum = 0;
  for (float v : x.values()) sum += std::fabs(v);
  return sum;
}

TEST(Scheduler, DdimLoops) {
  auto no_noise = [] { return Tensor(); };
  auto sum = [&](const SchedulerConfig& config) {
    DdimScheduler scheduler(config);
    scheduler.SetTimesteps(10);
    return LoopSum(scheduler, LoopSample(false), no_noise);
  };
  EXPECT_NEAR(sum({}), 172.0067, 1e-3);
  EXPECT_NEAR(sum({.prediction_type = "v_prediction"}), 52.5302, 1e-3);
  EXPECT_NEAR(sum({.beta_start = 0.01, .set_alpha_to_one = true}), 149.8295, 1e-3);
  EXPECT_NEAR(sum({.beta_start = 0.01, .set_alpha_to_one = false}), 149.0784, 1e-3);

  DdimScheduler scheduler({});
  scheduler.SetTimesteps(10);
  const Tensor noisy = scheduler.AddNoise(LoopSample(false), LoopSample(true), 8);
  EXPECT_NEAR(LoopSum(scheduler, noisy, no_noise, 8), 354.5418, 1e-3);
}

TEST(Scheduler, DdpmLoops) {
  for (auto [prediction, expected] : {std::pair{"epsilon", 258.9606}, {"v_prediction", 202.0296}}) {
    DdpmScheduler scheduler({.type = "DDPMScheduler", .prediction_type = prediction});
    scheduler.SetTimesteps(1000);
    TorchRandom random(0);
    const double sum = LoopSum(scheduler, LoopSample(false), [&] {
      return random.NormalTensor({4, 3, 8, 8});
    });
    EXPECT_NEAR(sum, expected, 2e-3) << prediction;
  }
}

// diffusers' DDPMScheduler.set_timesteps(timesteps=[...]), with noise of zeros.
TEST(Scheduler, DdpmWithAListOfTimesteps) {
  DdpmScheduler scheduler({.type = "DDPMScheduler"});
  const std::vector<int64_t> timesteps{700, 451, 90, 87, 3};
  scheduler.SetCustomTimesteps(timesteps);
  const double variances[] = {0.83281231, 0.085562199, 0.0052750614, 0.00051635649, 1e-20};
  for (int64_t i = 0; i < 5; ++i) {
    EXPECT_EQ(scheduler.timesteps()[i], timesteps[i]);
    EXPECT_NEAR(scheduler.Variance(i), variances[i], 1e-5 * variances[i]) << i;
  }
  auto zeros = [] { return Tensor::Zeros({4, 3, 8, 8}); };
  EXPECT_NEAR(LoopSum(scheduler, LoopSample(false), zeros), 13.504122, 1e-4);
  for (const std::vector<int64_t>& bad :
       std::vector<std::vector<int64_t>>{{}, {1000, 3}, {5, 5}, {3, 4}, {4, -1}}) {
    EXPECT_THROW(scheduler.SetCustomTimesteps(bad), ValueError);
  }
  EXPECT_EQ(scheduler.size(), 5);
  DdimScheduler ddim({});
  EXPECT_THROW(ddim.SetCustomTimesteps(timesteps), UnsupportedError);
}

// DDIM with eta 1 on all timesteps is DDPM with the small variance.
TEST(Scheduler, DdimWithEtaOneIsDdpm) {
  Random random(5);
  const Tensor x = random.NormalTensor({2, 3, 4, 4}), o = random.NormalTensor({2, 3, 4, 4}),
               n = random.NormalTensor({2, 3, 4, 4});
  DdimScheduler ddim({.clip_sample = false}, {.eta = 1});
  DdpmScheduler ddpm({.type = "DDPMScheduler", .clip_sample = false});
  ddim.SetTimesteps(50);
  ddpm.SetTimesteps(50);
  for (int64_t i : {0, 29, 48}) {
    const Tensor a = ddim.Step(o, i, x, n), b = ddpm.Step(o, i, x, n);
    for (int64_t k = 0; k < a.elements(); ++k) {
      EXPECT_NEAR(a.data()[k], b.data()[k], 1e-6 * (1 + std::fabs(b.data()[k])));
    }
  }
}

// --- Configuration.

TEST(SchedulerConfig, RoundTrip) {
  for (const char* type :
       {"DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"}) {
    SCOPED_TRACE(type);
    SchedulerConfig config{.type = type,
                           .num_train_timesteps = 3,
                           .beta_start = 0.00085,
                           .beta_end = 0.0123456789012345,
                           .beta_schedule = "squaredcos_cap_v2",
                           .trained_betas = {0.1, 0.2, 0.3},
                           .prediction_type = "v_prediction",
                           .rescale_betas_zero_snr = true,
                           .timestep_spacing = "trailing",
                           .steps_offset = 1,
                           .clip_sample = false,
                           .clip_sample_range = 2.5,
                           .thresholding = true,
                           .dynamic_thresholding_ratio = 0.75,
                           .sample_max_value = 1.5,
                           .set_alpha_to_one = type != std::string_view("DDIMScheduler"),
                           .variance_type = "learned",
                           .skip_prk_steps = true,
                           .interpolation_type = "log_linear",
                           .timestep_type = "continuous",
                           .sigma_min = 0.125,
                           .use_karras_sigmas = true,
                           .final_sigmas_type = "sigma_min",
                           .solver_order = 3,
                           .algorithm_type = "dpmsolver",
                           .solver_type = "heun",
                           .lower_order_final = false,
                           .euler_at_final = true,
                           .lambda_min_clipped = -5.1};
    EXPECT_EQ(ParseSchedulerConfig(ToJson(config)), Resolved(config));
    SchedulerConfig defaults{.type = type};
    EXPECT_EQ(ParseSchedulerConfig(ToJson(defaults)), Resolved(defaults));
    // Fields that the class does not have stay out of the file and have no effect.
    const std::string text = ToJson(config);
    EXPECT_EQ(text.find("skip_prk_steps") != std::string::npos,
              type == std::string_view("PNDMScheduler"));
    if (type == std::string_view("PNDMScheduler")) {
      EXPECT_GT(NoiseSchedule(config).AlphaBar(2), 0);  // it has no rescale_betas_zero_snr
    }
  }
}

// What diffusers 0.42.1 writes for DDIMScheduler(), less its version.
TEST(SchedulerConfig, TextIsThatOfDiffusers) {
  EXPECT_EQ(ToJson({.prediction_type = "v_prediction", .rescale_betas_zero_snr = true}), R"({
  "_class_name": "DDIMScheduler",
  "beta_end": 0.02,
  "beta_schedule": "linear",
  "beta_start": 0.0001,
  "clip_sample": true,
  "clip_sample_range": 1.0,
  "dynamic_thresholding_ratio": 0.995,
  "num_train_timesteps": 1000,
  "prediction_type": "v_prediction",
  "rescale_betas_zero_snr": true,
  "sample_max_value": 1.0,
  "set_alpha_to_one": true,
  "steps_offset": 0,
  "thresholding": false,
  "timestep_spacing": "leading",
  "trained_betas": null
}
)");
}

// The same for DPMSolverMultistepScheduler(use_karras_sigmas=True); -Infinity is not JSON.
TEST(SchedulerConfig, TextOfDpmSolver) {
  const std::string text = R"({
  "_class_name": "DPMSolverMultistepScheduler",
  "algorithm_type": "dpmsolver++",
  "beta_end": 0.02,
  "beta_schedule": "linear",
  "beta_start": 0.0001,
  "dynamic_thresholding_ratio": 0.995,
  "euler_at_final": false,
  "final_sigmas_type": "zero",
  "flow_shift": 1.0,
  "lambda_min_clipped": -Infinity,
  "lower_order_final": true,
  "num_train_timesteps": 1000,
  "prediction_type": "epsilon",
  "rescale_betas_zero_snr": false,
  "sample_max_value": 1.0,
  "solver_order": 2,
  "solver_type": "midpoint",
  "steps_offset": 0,
  "thresholding": false,
  "time_shift_type": "exponential",
  "timestep_spacing": "linspace",
  "trained_betas": null,
  "use_beta_sigmas": false,
  "use_dynamic_shifting": false,
  "use_exponential_sigmas": false,
  "use_flow_sigmas": false,
  "use_karras_sigmas": true,
  "use_lu_lambdas": false,
  "variance_type": null
}
)";
  const SchedulerConfig config{.type = "DPMSolverMultistepScheduler", .use_karras_sigmas = true};
  EXPECT_EQ(ToJson(config), text);
  EXPECT_EQ(ParseSchedulerConfig(text), Resolved(config));
  EXPECT_EQ(ParseSchedulerConfig(text, "DDIMScheduler"),
            (SchedulerConfig{.timestep_spacing = "linspace"}));
  EXPECT_THROW(ParseSchedulerConfig(R"({"num_train_timesteps": Infinity})"), ValueError);
}

TEST(SchedulerConfig, FilesOfOtherSchedulers) {
  // The file of Stable Diffusion 1.5.
  const std::string pndm = R"({"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0",
      "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
      "num_train_timesteps": 1000, "set_alpha_to_one": false, "skip_prk_steps": true,
      "steps_offset": 1, "trained_betas": null, "clip_sample": false})";
  const SchedulerConfig own = ParseSchedulerConfig(pndm);
  EXPECT_EQ(own, (SchedulerConfig{.type = "PNDMScheduler",
                                  .beta_start = 0.00085,
                                  .beta_end = 0.012,
                                  .beta_schedule = "scaled_linear",
                                  .steps_offset = 1,
                                  .set_alpha_to_one = false,
                                  .skip_prk_steps = true}));
  EXPECT_EQ(ParseSchedulerConfig(pndm, "DDIMScheduler"),
            (SchedulerConfig{.beta_start = 0.00085,
                             .beta_end = 0.012,
                             .beta_schedule = "scaled_linear",
                             .steps_offset = 1,
                             .clip_sample = false,
                             .set_alpha_to_one = false}));
  EXPECT_EQ(ParseSchedulerConfig(pndm, "DDPMScheduler"),
            (SchedulerConfig{.type = "DDPMScheduler",
                             .beta_start = 0.00085,
                             .beta_end = 0.012,
                             .beta_schedule = "scaled_linear",
                             .steps_offset = 1,
                             .clip_sample = false}));
  // A field that the file does not have takes the default of the class that uses it.
  const SchedulerConfig euler = ParseSchedulerConfig(pndm, "EulerDiscreteScheduler");
  EXPECT_EQ(euler.timestep_spacing, "");
  EXPECT_EQ(Resolved(euler).timestep_spacing, "linspace");
  EXPECT_EQ(Resolved(own).timestep_spacing, "leading");
  EXPECT_EQ(Resolved({.type = "PNDMScheduler"}).set_alpha_to_one, false);
  EXPECT_EQ(Resolved({.type = "DDIMScheduler"}).set_alpha_to_one, true);
  // Values that were defaults of the other class are not taken over.
  EXPECT_EQ(ParseSchedulerConfig(R"({"_class_name": "EulerDiscreteScheduler",
      "timestep_spacing": "linspace", "sigma_min": null, "use_karras_sigmas": true,
      "_use_default_values": ["timestep_spacing", "sigma_min"]})",
                                 "DDIMScheduler"),
            SchedulerConfig{});
  // Fields of LCM and SASolver.
  EXPECT_EQ(ParseSchedulerConfig(R"({"_class_name": "LCMScheduler", "original_inference_steps": 50,
      "timestep_scaling": 10.0, "predictor_order": 2, "corrector_order": 2, "tau_func": null})",
                                 "DDIMScheduler"),
            SchedulerConfig{});
  // Solver names of DEIS and UniPC mean what they mean in diffusers.
  const SchedulerConfig deis = Resolved(ParseSchedulerConfig(
      R"({"_class_name": "DEISMultistepScheduler", "algorithm_type": "deis",
          "solver_type": "logrho", "predict_x0": true})",
      "DPMSolverMultistepScheduler"));
  EXPECT_EQ(deis.algorithm_type, "dpmsolver++");
  EXPECT_EQ(deis.solver_type, "midpoint");
}

TEST(SchedulerConfig, BadSolverFields) {
  auto message = [](const std::string& fields, const char* type) {
    return MessageOf([&] { ParseSchedulerConfig("{" + fields + "}", type); });
  };
  auto names = [&](const std::string& fields, const char* type, const char* part) {
    EXPECT_NE(message(fields, type).find(part), std::string::npos) << message(fields, type);
    EXPECT_EQ(message(fields, "DDPMScheduler"), "(no error)");  // foreign there
  };
  const char *euler = "EulerDiscreteScheduler", *dpm = "DPMSolverMultistepScheduler";
  names(R"("skip_prk_steps": 1)", "PNDMScheduler", "skip_prk_steps");
  names(R"("interpolation_type": "cubic")", euler, "cubic");
  names(R"("timestep_type": "odd")", euler, "odd");
  names(R"("sigma_min": 0)", euler, "sigma_min");
  names(R"("sigma_min": 2, "sigma_max": 1)", euler, "sigma_max");
  names(R"("use_karras_sigmas": true, "use_exponential_sigmas": true)", euler, "at most one");
  names(R"("use_beta_sigmas": true)", euler, "use_beta_sigmas");
  names(R"("final_sigmas_type": "one")", dpm, "final_sigmas_type");
  names(R"("solver_order": 4)", dpm, "solver_order");
  names(R"("solver_order": 0)", dpm, "solver_order");
  names(R"("solver_type": "ralston")", dpm, "ralston");
  names(R"("algorithm_type": "dpm")", dpm, "algorithm_type");
  names(R"("algorithm_type": "dpmsolver")", dpm, "sigma_min");
  names(R"("algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3)",
        dpm, "solver_order 3");
  names(R"("lambda_min_clipped": "low")", dpm, "lambda_min_clipped");
  names(R"("use_flow_sigmas": true)", dpm, "use_flow_sigmas");
  names(R"("use_lu_lambdas": true, "use_karras_sigmas": true)", dpm, "at most one");
  for (const char* type : {"PNDMScheduler", "EulerAncestralDiscreteScheduler"}) {
    EXPECT_THROW(Validate({.type = type, .prediction_type = "sample"}), UnsupportedError);
  }
  EXPECT_THROW(ParseSchedulerConfig(R"({"_class_name": "UniPCMultistepScheduler"})"),
               UnsupportedError);
}

TEST(SchedulerConfig, BadText) {
  auto message = [](const std::string& text) {
    return MessageOf([&] { ParseSchedulerConfig(text); });
  };
  auto names = [&](const std::string& text, const char* part) {
    EXPECT_NE(message(text).find(part), std::string::npos) << message(text);
  };
  names(R"({"beta_strat": 0.1})", "beta_strat");
  names(R"({"beta_start": "0.1"})", "beta_start");
  names(R"({"beta_start": 0})", "beta_start");
  names(R"({"beta_end": 1.5})", "beta_end");
  names(R"({"num_train_timesteps": 10.5})", "num_train_timesteps");
  names(R"({"num_train_timesteps": 0})", "num_train_timesteps");
  names(R"({"num_train_timesteps": 18446744073709551615})", "num_train_timesteps");
  names(R"({"clip_sample": 1})", "clip_sample");
  names(R"({"clip_sample_range": 0})", "clip_sample_range");
  names(R"({"timestep_spacing": "backwards"})", "backwards");
  names(R"({"beta_schedule": "cosine"})", "cosine");
  names(R"({"beta_schedule": "sigmoid"})", "sigmoid");
  names(R"({"prediction_type": "flow"})", "flow");
  names(R"({"_class_name": "DDPMScheduler", "variance_type": "huge"})", "huge");
  names(R"({"trained_betas": [0.1, 0.2]})", "trained_betas");
  names(R"({"trained_betas": 3})", "trained_betas");
  names(R"({"num_train_timesteps": 2, "trained_betas": [0, 0.5]})", "trained_betas");
  names(R"({"steps_offset": -1})", "steps_offset");
  names(R"({"sample_max_value": 0})", "sample_max_value");
  names(R"({"dynamic_thresholding_ratio": 1.5})", "dynamic_thresholding_ratio");
  EXPECT_THROW(ParseSchedulerConfig("{"), FileError);
  EXPECT_THROW(ParseSchedulerConfig("[]"), FileError);
  EXPECT_THROW(ParseSchedulerConfig(R"({"_class_name": "DDPMScheduler",
      "variance_type": "fixed_large_log"})"),
               UnsupportedError);
  EXPECT_THROW(ParseSchedulerConfig(R"({"_class_name": "DDPMScheduler",
      "beta_schedule": "laplace"})"),
               UnsupportedError);
  EXPECT_THROW(Validate({.beta_start = std::nan("")}), ValueError);
  EXPECT_THROW(Validate({.clip_sample_range = std::nan("")}), ValueError);
}

// --- Guidance, against u + 7.5 (c - u) and diffusers' rescale_noise_cfg.

TEST(Guidance, ScaleAndRescale) {
  const Tensor both = Fill({4, 3, 2, 2}, [](int64_t i) {
    return i < 24 ? std::cos(0.23 * i) : std::sin(1.7 * (i - 24) + 1);
  });
  ExpectValues(Guidance{.scale = 7.5}.Apply(both), {-0.1889678, -3.218801, -0.2884485, 1.511903},
               9.269971);
  ExpectValues(Guidance{.scale = 7.5, .rescale = 0.7}.Apply(both),
               {-0.07120362, -1.212854, -0.1111182, 0.5824265}, 3.581366);
}

TEST(Guidance, BadArguments) {
  EXPECT_FALSE(Guidance{.scale = 1}.active());
  EXPECT_TRUE(Guidance{.scale = 1.5}.active());
  const Tensor both = Tensor::Zeros({2, 3});
  EXPECT_THROW(Guidance{.scale = 1}.Apply(both), ValueError);
  EXPECT_THROW((Guidance{.scale = 2, .rescale = 1.5}.Apply(both)), ValueError);
  EXPECT_THROW(Guidance{.scale = 2}.Apply(Tensor::Zeros({3, 2})), ShapeError);
  EXPECT_THROW(Guidance{.scale = 2}.Apply(Tensor()), ShapeError);
  EXPECT_THROW((Guidance{.scale = 2, .rescale = 0.5}.Apply(Tensor::Zeros({2, 1}))), ShapeError);
  // Constant samples have nothing to rescale.
  const Tensor same = (Guidance{.scale = 2, .rescale = 0.5}.Apply(Tensor::Full({2, 3}, 4)));
  for (float v : same.values()) EXPECT_EQ(v, 4);
}

}  // namespace
}  // namespace calotype
