// Optimizers as graph updates against a float64 implementation written here, which is itself
// checked against torch.optim; averages and schedules against diffusers.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>

#include "core/error.h"
#include "core/random.h"
#include "graph/functions.h"
#include "graph/interpreter.h"
#include "optim/ema.h"
#include "optim/learning_rate.h"
#include "optim/optimizer.h"
#include "optim/parameter_values.h"
#include "optim/update_parameters.h"

namespace calotype {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Two parameters, sin(a i + a).
std::vector<ParameterPtr> MakeParameters() {
  std::vector<ParameterPtr> parameters;
  for (auto [name, shape, a] :
       {std::tuple{"block.weight", Shape{2, 3}, 0.9}, std::tuple{"block.bias", Shape{4}, 1.3}}) {
    Tensor value(shape);
    for (int64_t i = 0; i < value.elements(); ++i) {
      value.data()[i] = static_cast<float>(std::sin(a * static_cast<double>(i) + a));
    }
    parameters.push_back(std::make_shared<Parameter>(name, value));
  }
  return parameters;
}

using Vectors = std::vector<std::vector<double>>;

Vectors ValuesOf(const std::vector<ParameterPtr>& parameters) {
  Vectors values;
  for (const ParameterPtr& p : parameters) {
    values.emplace_back(p->value().values().begin(), p->value().values().end());
  }
  return values;
}

std::vector<Tensor> Clones(const std::vector<ParameterPtr>& parameters) {
  std::vector<Tensor> clones;
  for (const ParameterPtr& p : parameters) clones.push_back(p->value().Clone());
  return clones;
}

bool SameBits(const std::vector<ParameterPtr>& parameters, const std::vector<Tensor>& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& value = parameters[i]->value();
    if (std::memcmp(value.raw(), tensors[i].raw(), value.bytes()) != 0) return false;
  }
  return parameters.size() == tensors.size();
}

// A training step of the loss sum_i (w_i^2 / 2 (1 + .1 i) + sin(w_i) cos(i + k)) over both
// parameters; the cosines are inputs, and `disturbance` is added to one gradient.
class Trainer {
 public:
  Trainer(const Optimizer::Rule& rule, double clip, std::vector<ParameterPtr> parameters,
          const EmaOptions* ema_options = nullptr)
      : parameters_(std::move(parameters)), optimizer_(rule, parameters_, clip) {
    Value loss;
    std::vector<Value> leaves;
    for (const ParameterPtr& p : parameters_) {
      const Shape& shape = p->value().shape();
      Value w = graph_.ParameterLeaf(p);
      Value cosines = graph_.Input("cosines of " + p->name(), shape);
      Tensor curvature(shape);
      for (int64_t i = 0; i < curvature.elements(); ++i) {
        curvature.data()[i] = static_cast<float>(1 + 0.1 * static_cast<double>(i));
      }
      Value sum = Sum(Square(w) * 0.5f * graph_.Constant(curvature) + Sin(w) * cosines);
      loss = loss.defined() ? loss + sum : sum;
      leaves.push_back(w);
    }
    Value disturbance = graph_.Input("disturbance", Shape());
    const Value losses[] = {loss}, ones[] = {Value()};
    std::vector<Value> gradients = Gradients(losses, ones, leaves);
    gradients[1] = gradients[1] + disturbance;
    Optimizer::Exported step = optimizer_.ExportUpdates(graph_, gradients);
    graph_.Output("gradient_norm", step.gradient_norm);
    graph_.Output("finite", step.finite);
    if (ema_options) {
      ema_ = std::make_unique<Ema>(*ema_options, parameters_);
      ema_->ExportUpdates(graph_, step.parameters, step.finite);
    }
    Verify(graph_);
    interpreter_ = std::make_unique<Interpreter>(graph_);
  }

  // Returns the gradient norm.
  double Step(int64_t k, double learning_rate, float disturbance = 0) {
    std::vector<Tensor> inputs;
    for (const ParameterPtr& p : parameters_) {
      Tensor cosines(p->value().shape());
      for (int64_t i = 0; i < cosines.elements(); ++i) {
        cosines.data()[i] = static_cast<float>(std::cos(static_cast<double>(i + k)));
      }
      inputs.push_back(cosines);
    }
    inputs.push_back(Tensor::Scalar(disturbance));
    for (const Tensor& input : optimizer_.Inputs(k, learning_rate)) inputs.push_back(input);
    if (ema_) {
      for (const Tensor& input : ema_->Inputs(k)) inputs.push_back(input);
    }
    const std::vector<Tensor> outputs = interpreter_->Run(inputs);
    EXPECT_EQ(outputs[1].Item(), std::isfinite(outputs[0].Item()) ? 1 : 0);
    return outputs[0].Item();
  }

  const ComputationGraph& graph() const { return graph_; }
  const std::vector<ParameterPtr>& parameters() const { return parameters_; }
  const Optimizer& optimizer() const { return optimizer_; }
  Ema& ema() { return *ema_; }

 private:
  std::vector<ParameterPtr> parameters_;
  Optimizer optimizer_;
  std::unique_ptr<Ema> ema_;
  ComputationGraph graph_;
  std::unique_ptr<Interpreter> interpreter_;
};

// The same in float64, element by element, from the rules' formulas.
class Reference {
 public:
  Reference(const Optimizer::Rule& rule, double clip, Vectors values)
      : rule_(rule), clip_(clip), w_(std::move(values)), a_(w_), b_(w_) {
    for (Vectors* state : {&a_, &b_}) {
      for (auto& v : *state) std::fill(v.begin(), v.end(), 0);
    }
  }

  double Step(int64_t k, double lr) {
    Vectors g = w_;
    double squares = 0;
    for (auto& v : g) {
      for (size_t i = 0; i < v.size(); ++i) {
        const double x = v[i], n = static_cast<double>(i);
        v[i] = x * (1 + 0.1 * n) + std::cos(x) * std::cos(n + static_cast<double>(k));
        squares += v[i] * v[i];
      }
    }
    const double norm = std::sqrt(squares);
    const double scale = clip_ > 0 ? std::min(1.0, clip_ / (norm + 1e-6)) : 1;
    for (size_t j = 0; j < w_.size(); ++j) {
      for (size_t i = 0; i < w_[j].size(); ++i) {
        Apply(k, lr, w_[j][i], scale * g[j][i], a_[j][i], b_[j][i]);
      }
    }
    return norm;
  }

  const Vectors& values() const { return w_; }

 private:
  void Apply(int64_t k, double lr, double& w, double g, double& a, double& b) const {
    if (const Sgd* sgd = std::get_if<Sgd>(&rule_)) {
      g += sgd->weight_decay * w;
      a = k == 1 ? g : sgd->momentum * a + (1 - sgd->dampening) * g;
      const double direction = sgd->momentum == 0 ? g : sgd->nesterov ? g + sgd->momentum * a : a;
      w -= lr * direction;
    } else if (const Adam* adam = std::get_if<Adam>(&rule_)) {
      Moments(*adam, k, lr, w, g + adam->weight_decay * w, a, b);
    } else {
      const AdamW& adamw = std::get<AdamW>(rule_);
      w -= lr * adamw.weight_decay * w;
      Moments(adamw, k, lr, w, g, a, b);
    }
  }
  void Moments(const auto& adam, int64_t k, double lr, double& w, double g, double& m,
               double& v) const {
    const double n = static_cast<double>(k);
    m = adam.beta1 * m + (1 - adam.beta1) * g;
    v = adam.beta2 * v + (1 - adam.beta2) * g * g;
    const double mean = m / (1 - std::pow(adam.beta1, n));
    const double square = v / (1 - std::pow(adam.beta2, n));
    w -= lr * mean / (std::sqrt(square) + adam.eps);
  }

  Optimizer::Rule rule_;
  double clip_;
  Vectors w_, a_, b_;
};

// torch 2.15 in float64 after 8 steps: first and last element of both parameters, sum of the norms.
struct RuleCase {
  const char* name;
  Optimizer::Rule rule;
  double learning_rate, clip;
  double values[4];
  double norms;
};

std::vector<RuleCase> RuleCases() {
  return {
      {"sgd",
       Sgd{},
       0.05,
       0,
       {0.499741007591, -0.469220276657, 0.620002715743, -0.487713136108},
       22.9794620897},
      {"sgd decay",
       Sgd{.weight_decay = 0.1},
       0.05,
       0,
       {0.477464915862, -0.45149731404, 0.592683721838, -0.465347944351},
       22.7887742042},
      {"momentum",
       Sgd{.momentum = 0.9, .weight_decay = 0.1},
       0.05,
       0,
       {-0.103816265857, 0.30162798255, -0.145814383369, 0.299308580107},
       21.6294755629},
      {"dampening",
       Sgd{.momentum = 0.9, .dampening = 0.4},
       0.05,
       0,
       {0.139743758011, -0.0227194819131, 0.171604910143, 0.0137147053408},
       21.6848974791},
      {"nesterov",
       Sgd{.momentum = 0.9, .weight_decay = 0.01, .nesterov = true},
       0.05,
       0,
       {-0.113768160935, 0.186277607579, -0.144336600794, 0.282257583236},
       21.2150462737},
      {"sgd clip",
       Sgd{.momentum = 0.9},
       0.05,
       0.5,
       {0.627194167391, -0.530818347589, 0.756903474617, -0.632786374383},
       24.4319271377},
      {"adam",
       Adam{},
       0.02,
       0,
       {0.64956606827, -0.622502174839, 0.815858595295, -0.734940098185},
       24.5459346221},
      {"adam decay",
       Adam{.beta1 = 0.8, .beta2 = 0.95, .eps = 1e-3, .weight_decay = 0.1},
       0.02,
       0,
       {0.645371157529, -0.620635806028, 0.813623491833, -0.733552393089},
       24.5327596051},
      {"adamw",
       AdamW{},
       0.02,
       0,
       {0.648444381894, -0.621392112216, 0.814448665674, -0.733655489154},
       24.5349467594},
      {"adamw clip",
       AdamW{.beta1 = 0.8, .beta2 = 0.95, .eps = 1e-3, .weight_decay = 0.5},
       0.02,
       1,
       {0.591324949008, -0.573405858654, 0.742694988482, -0.669444745454},
       24.0177433021},
      {"adamw loose clip",
       AdamW{},
       0.02,
       1000,
       {0.648444381894, -0.621392112216, 0.814448665674, -0.733655489154},
       24.5349467594},
  };
}

TEST(Optimizer, RulesEqualTorch) {
  for (const RuleCase& c : RuleCases()) {
    SCOPED_TRACE(c.name);
    Trainer trainer(c.rule, c.clip, MakeParameters());
    Reference reference(c.rule, c.clip, ValuesOf(trainer.parameters()));
    double norms = 0;
    for (int64_t k = 1; k <= 8; ++k) {
      const double norm = reference.Step(k, c.learning_rate);
      norms += norm;
      EXPECT_NEAR(trainer.Step(k, c.learning_rate), norm, 2e-6 * norm) << "step " << k;
      const Vectors values = ValuesOf(trainer.parameters());
      for (size_t j = 0; j < values.size(); ++j) {
        for (size_t i = 0; i < values[j].size(); ++i) {
          ASSERT_NEAR(values[j][i], reference.values()[j][i], 1e-6) << "step " << k;
        }
      }
    }
    const Vectors& w = reference.values();
    const double ends[] = {w[0].front(), w[0].back(), w[1].front(), w[1].back()};
    for (int i = 0; i < 4; ++i) EXPECT_NEAR(ends[i], c.values[i], 1e-10);
    EXPECT_NEAR(norms, c.norms, 1e-9);
  }
}

// Nothing that changes from step to step is part of the graph: one graph, three learning rates.
TEST(Optimizer, LearningRateIsAnInput) {
  const Optimizer::Rule rule = AdamW{.weight_decay = 0.1};
  Trainer trainer(rule, 0, MakeParameters());
  Reference reference(rule, 0, ValuesOf(trainer.parameters()));
  for (auto [k, learning_rate] : {std::pair{1, 0.0}, {2, 0.3}, {3, 0.01}, {400, 0.2}}) {
    trainer.Step(k, learning_rate);
    reference.Step(k, learning_rate);
    EXPECT_NEAR(trainer.parameters()[0]->value().data()[0], reference.values()[0][0], 2e-6);
  }
  const auto& graph = trainer.graph();
  std::vector<std::string> names;
  for (int32_t input : graph.inputs()) names.push_back(graph.node(input).name);
  const std::vector<std::string> expected = trainer.optimizer().InputNames();
  EXPECT_EQ(expected,
            (std::vector<std::string>{"optimizer.learning_rate", "optimizer.bias_correction1",
                                      "optimizer.bias_correction2_sqrt"}));
  ASSERT_GE(names.size(), expected.size());
  EXPECT_TRUE(std::equal(expected.begin(), expected.end(), names.end() - 3));
}

TEST(Optimizer, NonFiniteGradientChangesNothing) {
  for (const RuleCase& c : RuleCases()) {
    SCOPED_TRACE(c.name);
    const EmaOptions ema{.decay = 0.9};
    Trainer trainer(c.rule, c.clip, MakeParameters(), &ema);
    // Signed zeros and denormal numbers must survive as well.
    trainer.parameters()[0]->Write().data()[1] = -0.0f;
    trainer.parameters()[0]->Write().data()[2] = 1e-42f;
    trainer.Step(1, c.learning_rate);
    trainer.Step(2, c.learning_rate);
    trainer.parameters()[1]->Write().data()[1] = -0.0f;
    const auto weights = Clones(trainer.parameters()), state = Clones(trainer.optimizer().state()),
               averages = Clones(trainer.ema().state());
    // 1e30 is finite, but the sum of squares is not.
    for (float disturbance : {kNan, kInfinity, -kInfinity, 1e30f}) {
      EXPECT_FALSE(std::isfinite(trainer.Step(3, c.learning_rate, disturbance)));
      EXPECT_TRUE(SameBits(trainer.parameters(), weights)) << disturbance;
      EXPECT_TRUE(SameBits(trainer.optimizer().state(), state)) << disturbance;
      EXPECT_TRUE(SameBits(trainer.ema().state(), averages)) << disturbance;
    }
    // The step that follows is the one that would have followed.
    EXPECT_TRUE(std::isfinite(trainer.Step(3, c.learning_rate)));
    EXPECT_FALSE(SameBits(trainer.parameters(), weights));
    EXPECT_FALSE(SameBits(trainer.ema().state(), averages));
  }
}

TEST(Optimizer, ResumesBitExactly) {
  for (const RuleCase& c : RuleCases()) {
    SCOPED_TRACE(c.name);
    const EmaOptions options{.decay = 0.9};
    Trainer unbroken(c.rule, c.clip, MakeParameters(), &options);
    for (int64_t k = 1; k <= 3; ++k) unbroken.Step(k, c.learning_rate);
    std::map<std::string, Tensor> saved;
    std::vector<ParameterPtr> all;
    auto collect = [&](Trainer& trainer) {
      all = trainer.parameters();
      for (const auto* list : {&trainer.optimizer().state(), &trainer.ema().state()}) {
        all.insert(all.end(), list->begin(), list->end());
      }
    };
    collect(unbroken);
    for (const auto& [name, value] : ValuesByName(all)) saved.emplace(name, value.Clone());
    EXPECT_EQ(saved.count("block.weight"), 1u);
    EXPECT_EQ(saved.count("ema.block.bias"), 1u);
    for (int64_t k = 4; k <= 6; ++k) unbroken.Step(k, c.learning_rate);

    Trainer resumed(c.rule, c.clip, MakeParameters(), &options);
    collect(resumed);
    SetValuesByName(all, saved);
    for (int64_t k = 4; k <= 6; ++k) resumed.Step(k, c.learning_rate);
    EXPECT_TRUE(SameBits(resumed.parameters(), Clones(unbroken.parameters())));
    EXPECT_TRUE(SameBits(resumed.optimizer().state(), Clones(unbroken.optimizer().state())));
    EXPECT_TRUE(SameBits(resumed.ema().state(), Clones(unbroken.ema().state())));
  }
}

// The 1e-6 beside the norm: gradients of norm 1e-6 limited to 1e-7 shrink to 1/20, not 1/10.
TEST(Optimizer, ClippingOfTinyGradients) {
  auto p = std::make_shared<Parameter>("p", Tensor::Zeros({2}));
  Optimizer optimizer(Sgd{}, {p}, 1e-7);
  ComputationGraph graph;
  const std::vector<Value> gradients{graph.Input("gradient", Shape{2})};
  graph.Output("norm", optimizer.ExportUpdates(graph, gradients).gradient_norm);
  std::vector<Tensor> inputs{Tensor::From({2}, std::vector<float>{6e-7f, -8e-7f})};
  for (const Tensor& input : optimizer.Inputs(1, 1)) inputs.push_back(input);
  EXPECT_NEAR(Interpreter(graph).Run(inputs)[0].Item(), 1e-6, 1e-12);
  EXPECT_NEAR(p->value().data()[0], -3e-8, 1e-13);
  EXPECT_NEAR(p->value().data()[1], 4e-8, 1e-13);
}

TEST(Optimizer, StateHasNamesAndIsNotTrainable) {
  Optimizer adam(AdamW{}, MakeParameters());
  ASSERT_EQ(adam.state().size(), 4u);
  EXPECT_EQ(adam.state()[0]->name(), "optimizer.exp_avg.block.weight");
  EXPECT_EQ(adam.state()[3]->name(), "optimizer.exp_avg_sq.block.bias");
  for (const ParameterPtr& p : adam.state()) EXPECT_FALSE(p->trainable());
  EXPECT_EQ(Optimizer(Sgd{.momentum = 0.5}, MakeParameters()).state()[1]->name(),
            "optimizer.momentum_buffer.block.bias");
  EXPECT_TRUE(Optimizer(Sgd{}, MakeParameters()).state().empty());
}

TEST(Optimizer, BadArguments) {
  auto bad = [](const Optimizer::Rule& rule, double clip = 0) {
    EXPECT_THROW(Optimizer(rule, MakeParameters(), clip), ValueError);
  };
  bad(Sgd{.momentum = -0.1});
  bad(Sgd{.momentum = kNan});
  bad(Sgd{.dampening = 0.5});
  bad(Sgd{.nesterov = true});
  bad(Sgd{.momentum = 0.9, .dampening = 0.5, .nesterov = true});
  bad(Sgd{.weight_decay = -1});
  bad(Adam{.beta1 = 1});
  bad(Adam{.beta2 = -0.1});
  bad(AdamW{.eps = 0});
  bad(AdamW{.weight_decay = kInfinity});
  bad(AdamW{}, -1);
  bad(AdamW{}, kNan);
  EXPECT_THROW(Optimizer(Sgd{}, {}), ValueError);
  auto parameters = MakeParameters();
  EXPECT_THROW(Optimizer(Sgd{}, {parameters[0], parameters[0]}), ValueError);
  parameters[1]->set_trainable(false);
  EXPECT_THROW(Optimizer(Sgd{}, parameters), ValueError);
  Optimizer optimizer(Sgd{}, {parameters[0]});
  EXPECT_THROW(optimizer.Inputs(0, 0.1), ValueError);
  EXPECT_THROW(optimizer.Inputs(1, -0.1), ValueError);
  EXPECT_THROW(optimizer.Inputs(1, kNan), ValueError);
  ComputationGraph graph;
  const std::vector<Value> wrong{graph.Input("g", Shape{3, 2})}, none;
  EXPECT_THROW(optimizer.ExportUpdates(graph, wrong), ShapeError);
  EXPECT_THROW(optimizer.ExportUpdates(graph, none), ShapeError);
}

// --- Averages.

TEST(Ema, DecayEqualsDiffusers) {
  const int64_t steps[] = {1, 2, 3, 4, 5, 10, 100, 1000, 100000};
  const std::pair<EmaOptions, std::vector<double>> cases[] = {
      {{},
       {0, 0.181818182, 0.25, 0.307692308, 0.357142857, 0.526315789, 0.917431193, 0.991080278,
        0.9999}},
      {{.use_ema_warmup = true},
       {0, 0.370039475, 0.519250143, 0.603149737, 0.658004811, 0.784556531, 0.953584112, 0.99,
        0.999535841}},
      {{.update_after_step = 3, .use_ema_warmup = true, .inv_gamma = 5, .power = 0.75},
       {0, 0, 0, 0, 0.127804051, 0.446416688, 0.895049026, 0.981211074, 0.999405401}},
      {{.decay = 0.5, .min_decay = 0.2},
       {0, 0.2, 0.25, 0.307692308, 0.357142857, 0.5, 0.5, 0.5, 0.5}},
      {{.update_after_step = 2},
       {0, 0, 0, 0.181818182, 0.25, 0.470588235, 0.91588785, 0.991062562, 0.9999}},
  };
  for (const auto& [options, decays] : cases) {
    Ema ema(options, MakeParameters());
    for (size_t i = 0; i < decays.size(); ++i) EXPECT_NEAR(ema.Decay(steps[i]), decays[i], 1e-9);
  }
}

TEST(Ema, FollowsTheWeights) {
  const EmaOptions options{.decay = 0.8};
  Trainer trainer(Sgd{.momentum = 0.9}, 0, MakeParameters(), &options);
  EXPECT_TRUE(SameBits(trainer.ema().state(), Clones(trainer.parameters())));
  double average = 0;
  for (int64_t k = 1; k <= 20; ++k) {
    trainer.Step(k, 0.05);
    const double p = trainer.parameters()[0]->value().data()[4];
    const double decay =
        k == 1 ? 0 : std::min(0.8, static_cast<double>(k) / static_cast<double>(9 + k));
    average = decay * average + (1 - decay) * p;
    EXPECT_NEAR(trainer.ema().state()[0]->value().data()[4], average, 1e-6) << k;
  }
  const auto weights = Clones(trainer.parameters()), averages = Clones(trainer.ema().state());
  EXPECT_EQ(trainer.ema().Weights().at("block.bias").data()[3], averages[1].data()[3]);
  const uint64_t version = trainer.parameters()[0]->version();
  trainer.ema().Swap();
  EXPECT_TRUE(SameBits(trainer.parameters(), averages));
  EXPECT_TRUE(SameBits(trainer.ema().state(), weights));
  EXPECT_GT(trainer.parameters()[0]->version(), version);
  trainer.ema().Swap();
  EXPECT_TRUE(SameBits(trainer.parameters(), weights));
}

TEST(Ema, BadArguments) {
  auto bad = [](const EmaOptions& options) {
    EXPECT_THROW(Ema(options, MakeParameters()), ValueError);
  };
  bad({.decay = 1.1});
  bad({.decay = kNan});
  bad({.decay = 0.5, .min_decay = 0.6});
  bad({.update_after_step = -1});
  bad({.use_ema_warmup = true, .inv_gamma = 0});
  bad({.inv_gamma = 2});  // no effect without warm-up
  EXPECT_THROW(Ema({}, {}), ValueError);
  EXPECT_THROW(Ema({}, MakeParameters()).Decay(0), ValueError);
  ComputationGraph graph;
  EXPECT_THROW(Ema({}, MakeParameters()).ExportUpdates(graph, {}), ShapeError);
}

// --- Learning rates: diffusers' get_scheduler with base rate .5, steps 0 to 10.

TEST(LearningRate, SchedulesEqualDiffusers) {
  const std::pair<LearningRateSchedule, std::vector<double>> cases[] = {
      {{"constant", 0.5}, {.5, .5, .5, .5, .5, .5, .5, .5, .5, .5, .5}},
      {{"constant_with_warmup", 0.5, 4}, {0, .125, .25, .375, .5, .5, .5, .5, .5, .5, .5}},
      {{"linear", 0.5, 3, 10},
       {0, .16666666666666666, .3333333333333333, .5, .42857142857142855, .35714285714285715,
        .2857142857142857, .21428571428571427, .14285714285714285, .07142857142857142, 0}},
      {{"linear", 0.5, 0, 10}, {.5, .45, .4, .35, .3, .25, .2, .15, .1, .05, 0}},
      {{"linear", 0.5, 10, 10}, {0, .05, .1, .15, .2, .25, .3, .35, .4, .45, 0}},
      {{"cosine", 0.5, 3, 10},
       {0, .16666666666666666, .3333333333333333, .5, .47524221697560476, .4058724504646834,
        .3056302334890786, .19436976651092142, .09412754953531663, .02475778302439524, 0}},
      // Behind the end diffusers' cosine rises again; ours stays 0.
      {{"cosine", 0.5, 0, 7},
       {.5, .47524221697560476, .4058724504646834, .3056302334890786, .19436976651092142,
        .09412754953531663, .02475778302439524, 0, 0, 0, 0}},
      {{"cosine", 0.5, 1, 1}, {0, .5, 0, 0, 0, 0, 0, 0, 0, 0, 0}},
      {{"cosine_with_restarts", 0.5, 2, 11, 3},
       {0, .25, .5, .375, .125, .5, .375, .125, .5, .375, .125, 0, 0}},
      {{"cosine_with_restarts", 0.5, 0, 8},
       {.5, .4809698831278217, .42677669529663687, .34567085809127246, .25, .15432914190872757,
        .07322330470336313, .019030116872178315, 0, 0, 0}},
      {{"polynomial", 0.5, 2, 10, 1, 2},
       {0, .25, .5, .3828125234375, .28125004375, .1953125609375, .125000075, .0703125859375,
        .03125009375, .0078125984375, 1e-7, 1e-7}},
      {{"polynomial", 0.5, 0, 6},
       {.5, .41666668333333334, .3333333666666667, .25000005, .16666673333333334,
        .08333341666666665, 1e-7, 1e-7}},
      {{.name = "piecewise_constant", .learning_rate = 0.5, .step_rules = "1:2,0.5:5,.1"},
       {.5, .5, .25, .25, .25, .05, .05}},
  };
  for (const auto& [schedule, rates] : cases) {
    for (size_t step = 0; step < rates.size(); ++step) {
      EXPECT_NEAR(schedule.At(static_cast<int64_t>(step)), rates[step], 1e-15)
          << schedule.name << " step " << step;
    }
  }
}

TEST(LearningRate, BadArguments) {
  auto bad = [](const LearningRateSchedule& schedule, int64_t step = 0) {
    EXPECT_THROW(schedule.At(step), ValueError);
  };
  bad({.name = "polynomial"});
  bad({.learning_rate = -1});
  bad({.learning_rate = kNan});
  bad({.warmup_steps = 5});
  bad({.name = "constant_with_warmup", .warmup_steps = -5});
  bad({.name = "linear"});
  bad({.name = "cosine", .warmup_steps = 11, .total_steps = 10});
  bad({.name = "cosine", .total_steps = 10, .num_cycles = 2});
  bad({.name = "cosine_with_restarts", .total_steps = 10, .num_cycles = 0});
  bad({.name = "polynomial", .warmup_steps = 10, .total_steps = 10});
  bad({.name = "polynomial", .total_steps = 10, .power = 0});
  bad({.name = "polynomial", .learning_rate = 1e-8, .total_steps = 10});
  bad({.name = "linear", .total_steps = 10, .power = 2});
  bad({.step_rules = "1"});
  for (const char* rules : {"", "1:", "1:5", ":5,1", "1:5,", "1:x,1", "-1:5,1", "1:5,1:5,1", "1 "})
    bad({.name = "piecewise_constant", .step_rules = rules});
  bad({.name = "piecewise_constant", .warmup_steps = 1, .step_rules = "1"});
  bad({}, -1);
}

// --- Eager descent and restoring.

TEST(UpdateParameters, DescendsAlongTheGradient) {
  Random random(3);
  Tensor value = random.NormalTensor({300, 301});  // more than one chunk
  const Tensor start = value.Clone();
  auto p = std::make_shared<Parameter>("w", value);
  auto frozen = std::make_shared<Parameter>("frozen", Tensor::Full({2}, 1), false);
  p->gradient = random.NormalTensor(value.shape());
  const std::vector<ParameterPtr> parameters{p, frozen};
  UpdateParameters(parameters, 0.25f);
  for (int64_t i = 0; i < value.elements(); ++i) {
    ASSERT_EQ(p->value().data()[i], start.data()[i] - 0.25f * p->gradient.data()[i]);
  }
  EXPECT_EQ(p->version(), 1u);
  EXPECT_EQ(frozen->version(), 0u);
}

TEST(UpdateParameters, RefusesWithoutChangingAnything) {
  auto parameters = MakeParameters();
  const auto before = Clones(parameters);
  parameters[0]->gradient = Tensor::Full({2, 3}, 1);
  EXPECT_THROW(UpdateParameters(parameters, 0.1f), ValueError);  // the bias has no gradient
  parameters[1]->gradient = Tensor::Zeros({5});
  EXPECT_THROW(UpdateParameters(parameters, 0.1f), ShapeError);
  parameters[1]->gradient = Tensor::Full({4}, kNan);
  EXPECT_THROW(UpdateParameters(parameters, 0.1f), NumericError);
  parameters[1]->gradient = Tensor::Zeros({4});
  EXPECT_THROW(UpdateParameters(parameters, kInfinity), ValueError);
  EXPECT_TRUE(SameBits(parameters, before));
}

TEST(ParameterValues, ErrorsChangeNothing) {
  auto parameters = MakeParameters();
  const auto before = Clones(parameters);
  const Tensor weight = Tensor::Zeros({2, 3}), bias = Tensor::Zeros({4});
  EXPECT_THROW(SetValuesByName(parameters, {{"block.weight", weight}}), ValueError);
  EXPECT_THROW(SetValuesByName(parameters, {{"block.weight", weight}, {"block.bias", weight}}),
               ShapeError);
  EXPECT_THROW(SetValuesByName(parameters, {{"block.weight", weight},
                                            {"block.bias", Tensor::Zeros({4}, DType::kI32)}}),
               ShapeError);
  EXPECT_THROW(
      SetValuesByName(parameters,
                      {{"block.weight", weight}, {"block.bias", bias}, {"block.extra", bias}}),
      ValueError);
  EXPECT_TRUE(SameBits(parameters, before));
  SetValuesByName(parameters, {{"block.weight", weight}, {"block.bias", bias}});
  EXPECT_EQ(parameters[0]->value().data()[5], 0);
  EXPECT_EQ(parameters[0]->version(), 1u);
}

}  // namespace
}  // namespace calotype
