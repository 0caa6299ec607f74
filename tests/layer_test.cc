// The layer base class: names, values, Forward and Backward, loading.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <set>

#include "layers/attention.h"
#include "layers/conv2d.h"
#include "layers/linear.h"
#include "layers/norm.h"
#include "layers/transformer.h"
#include "tests/expect_error.h"
#include "tests/layer_gradient.h"

namespace calotype {
namespace {

using nn::Attention;
using nn::Conv2d;
using nn::GroupNorm;
using nn::LayerNorm;
using nn::Linear;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// ---------------------------------------------------------------- the base class

// y = second(first(x) * gain): a layer with an own parameter and sub-layers.
class Pair : public Layer {
 public:
  Pair() : Layer("Pair") {
    first_ = AddLayer<Linear>("first", Linear::Options{3, 4});
    second_ = AddLayer<Linear>("inner.second", Linear::Options{4, 2});
    AddParameter("gain", {4}, Initializer::Constant(2));
  }
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override {
    ++exports;
    return {second_->Call(first_->Call(Required(inputs, 0, "x")) * Leaf(graph, "gain"))};
  }
  int exports = 0;

 private:
  Linear *first_, *second_;
};

// A layer that holds a Pair, so that paths have two levels.
class Outer : public Layer {
 public:
  Outer() : Layer("Outer") { pair_ = AddLayer<Pair>("pair"); }
  std::vector<Value> ExportComputationGraph(ComputationGraph&,
                                            std::span<const Value> inputs) override {
    return {pair_->Call(Required(inputs, 0, "x"))};
  }
  Pair* pair() { return pair_; }

 private:
  Pair* pair_;
};

TEST(LayerTest, NamesAndOrder) {
  Outer outer;
  std::vector<std::string> names;
  for (const ParameterPtr& parameter : outer.NamedParameters()) names.push_back(parameter->name());
  EXPECT_THAT(names, ElementsAre("pair.gain", "pair.first.weight", "pair.first.bias",
                                 "pair.inner.second.weight", "pair.inner.second.bias"));
  EXPECT_EQ(outer.ParameterCount(), 4 + 12 + 4 + 8 + 2);
  EXPECT_EQ(outer.FindParameter("pair.gain"), outer.NamedParameters()[0]);
  EXPECT_EQ(outer.pair()->FindParameter("first.bias"), outer.NamedParameters()[2]);
  EXPECT_THAT(MessageOf<ValueError>([&] { outer.FindParameter("pair.second.weight"); }),
              HasSubstr("pair.inner.second.weight"));
}

TEST(LayerTest, InitialValuesDependOnSeedAndPathAlone) {
  Outer a, b;
  a.NamedParameters();  // b draws everything at once, a has drawn before
  a.Initialize(7);
  b.Initialize(7);
  auto bytes = [](Layer& layer) {
    Tensor values = layer.GetParameters();
    return std::vector<float>(values.data(), values.data() + values.elements());
  };
  EXPECT_EQ(bytes(a), bytes(b));
  b.Initialize(8);
  EXPECT_NE(bytes(a), bytes(b));

  // Without Initialize the values are those of seed 0.
  Outer c, d;
  d.Initialize(0);
  EXPECT_EQ(bytes(c), bytes(d));

  // No two tensors are alike, and none is the same in another layer (the original drew every
  // matrix from a generator seeded with 42).
  nn::BasicTransformerBlock block({.dim = 8, .num_attention_heads = 2, .attention_head_dim = 4});
  std::set<float> first;
  int weights = 0;
  for (const ParameterPtr& parameter : block.NamedParameters()) {
    if (parameter->name().starts_with("norm")) continue;
    first.insert(parameter->value().data()[0]);
    ++weights;
  }
  EXPECT_EQ(static_cast<int>(first.size()), weights);
}

TEST(LayerTest, InitialDistributions) {
  auto check = [](const Tensor& t, double bound, double deviation, const char* what) {
    double sum = 0, squares = 0, largest = 0;
    for (float x : t.values()) {
      sum += x;
      squares += double{x} * x;
      largest = std::max(largest, std::abs(double{x}));
    }
    auto n = static_cast<double>(t.elements());
    EXPECT_NEAR(sum / n, 0, 4 * deviation / std::sqrt(n)) << what;
    EXPECT_NEAR(std::sqrt(squares / n), deviation, 0.05 * deviation) << what;
    if (bound > 0) {
      EXPECT_LE(largest, bound) << what;
      EXPECT_GT(largest, 0.98 * bound) << what;
    }
  };
  Linear linear({100, 300});
  check(linear.FindParameter("weight")->value(), 0.1, 0.1 / std::sqrt(3), "linear weight");
  check(linear.FindParameter("bias")->value(), 0.1, 0.1 / std::sqrt(3), "linear bias");
  Conv2d conv({10, 40});
  check(conv.FindParameter("weight")->value(), 1 / std::sqrt(90), 1 / std::sqrt(270),
        "conv weight");
  nn::Embedding embedding({100, 30});
  check(embedding.FindParameter("weight")->value(), 0, 1, "embedding");
  GroupNorm norm({2, 4});
  EXPECT_EQ(norm.FindParameter("weight")->value().data()[3], 1);
  EXPECT_EQ(norm.FindParameter("bias")->value().data()[3], 0);
}

TEST(LayerTest, FlatParameters) {
  Pair pair;
  Tensor values = Random(3).NormalTensor({pair.ParameterCount()});
  pair.SetParameters(values);
  EXPECT_EQ(RelativeError(pair.GetParameters(), values), 0);
  EXPECT_EQ(pair.FindParameter("gain")->value().data()[1], values.data()[1]);
  EXPECT_EQ(pair.FindParameter("first.weight")->value().data()[0], values.data()[4]);
  for (int64_t wrong : {pair.ParameterCount() - 1, pair.ParameterCount() + 1}) {
    EXPECT_THAT(MessageOf<ShapeError>([&] { pair.SetParameters(Tensor::Zeros({wrong})); }),
                HasSubstr(fmt::format("got {}", wrong)));
  }
  EXPECT_EQ(RelativeError(pair.GetParameters(), values), 0) << "a failed call must change nothing";
}

TEST(LayerTest, BackwardNeedsAForward) {
  Pair pair;
  Tensor x = Random(1).NormalTensor({5, 3}), dy = Random(2).NormalTensor({5, 2});
  EXPECT_THAT(MessageOf<ValueError>([&] { pair.Backward(dy); }), HasSubstr("Forward"));
  EXPECT_THAT(MessageOf<ValueError>([&] { pair.UpdateParameters(0.1f); }), HasSubstr("Backward"));
  EXPECT_THROW(pair.GetParameterGradients(), ValueError);
  pair.SetTrainingMode(false);
  pair.Forward(x);
  EXPECT_THAT(MessageOf<ValueError>([&] { pair.Backward(dy); }), HasSubstr("training mode"));
  EXPECT_EQ(pair.GetDiagnostics().at("layer.kept_bytes"), "0");
  pair.SetTrainingMode(true);
  pair.Forward(x);
  EXPECT_NE(pair.GetDiagnostics().at("layer.kept_bytes"), "0");
  EXPECT_THAT(MessageOf<ShapeError>([&] {
                pair.Backward(Tensor::Zeros({5, 3}));
              }),
              HasSubstr("[5, 3]"));
  EXPECT_EQ(pair.Backward(dy)[0].shape(), x.shape());

  // A changed parameter makes the kept values stale.
  pair.FindParameter("gain")->Write();
  EXPECT_THAT(MessageOf<ValueError>([&] { pair.Backward(dy); }), HasSubstr("changed"));
  pair.Forward(x);
  pair.Backward(dy);
  EXPECT_TRUE(pair.FindParameter("gain")->gradient.defined());
  pair.ResetState();
  EXPECT_FALSE(pair.FindParameter("gain")->gradient.defined());
  EXPECT_THROW(pair.Backward(dy), ValueError);
}

TEST(LayerTest, BackwardOverwritesAndUpdateDescends) {
  Pair pair;
  pair.Initialize(5);
  Tensor x = Random(1).NormalTensor({5, 3}), target = Random(2).NormalTensor({5, 2});
  auto loss_gradient = [&](const Tensor& y) {
    Tensor dy(y.shape());
    double loss = 0;
    for (int64_t i = 0; i < y.elements(); ++i) {
      dy.data()[i] = 2 * (y.data()[i] - target.data()[i]);
      loss += std::pow(y.data()[i] - target.data()[i], 2);
    }
    return std::pair(loss, dy);
  };
  auto [before, dy] = loss_gradient(pair.Forward(x));
  pair.Backward(dy);
  Tensor gradients = pair.GetParameterGradients();
  pair.Backward(dy);
  EXPECT_EQ(RelativeError(pair.GetParameterGradients(), gradients), 0);
  Tensor values = pair.GetParameters();
  pair.UpdateParameters(0.001f);
  Tensor moved = pair.GetParameters();
  for (int64_t i = 0; i < moved.elements(); ++i) {
    EXPECT_FLOAT_EQ(moved.data()[i], values.data()[i] - 0.001f * gradients.data()[i]);
  }
  for (int step = 0; step < 200; ++step) {
    pair.Backward(loss_gradient(pair.Forward(x)).second);
    pair.UpdateParameters(0.005f);
  }
  EXPECT_LT(loss_gradient(pair.Forward(x)).first, 0.5 * before);
}

TEST(LayerTest, FrozenParametersGetNoGradient) {
  Pair pair;
  Tensor x = Random(1).NormalTensor({5, 3}), dy = Random(2).NormalTensor({5, 2});
  pair.Forward(x);
  pair.Backward(dy);
  pair.ResetState();
  pair.FindParameter("gain")->set_trainable(false);
  pair.Forward(x);
  pair.Backward(dy);
  EXPECT_FALSE(pair.FindParameter("gain")->gradient.defined());
  EXPECT_TRUE(pair.FindParameter("first.bias")->gradient.defined());
  Tensor before = pair.FindParameter("gain")->value().Clone();
  pair.UpdateParameters(0.1f);
  EXPECT_EQ(RelativeError(pair.FindParameter("gain")->value(), before), 0);
  EXPECT_EQ(pair.GetParameterGradients().data()[0], 0);
}

TEST(LayerTest, GraphsAreCachedByInputTypeAndOptions) {
  Pair pair;
  for (int repeat = 0; repeat < 3; ++repeat) pair.Forward(Tensor::Zeros({5, 3}));
  EXPECT_EQ(pair.exports, 1);
  pair.Forward(Tensor::Zeros({6, 3}));
  pair.Forward(Tensor::Zeros({5, 3}));
  EXPECT_EQ(pair.exports, 2);
  for (int64_t rows = 1; rows <= 20; ++rows) pair.Forward(Tensor::Zeros({rows, 3}));
  EXPECT_EQ(pair.GetDiagnostics().at("layer.cached_graphs"), "8");

  // Changing an option of a sub-layer makes a new graph; new values of parameters do not.
  nn::BasicTransformerBlock block({.dim = 8, .num_attention_heads = 2, .attention_head_dim = 4});
  Tensor x = Random(1).NormalTensor({2, 5, 8});
  Tensor y = block.Forward(x);
  auto* attention = dynamic_cast<Attention*>(block.layers()[1].get());
  ASSERT_NE(attention, nullptr);
  attention->SetProcessor("AttnProcessor");
  EXPECT_LT(RelativeError(block.Forward(x), y), 1e-6);
  EXPECT_EQ(block.GetDiagnostics().at("layer.cached_graphs"), "2");
  block.Initialize(9);
  EXPECT_GT(RelativeError(block.Forward(x), y), 1e-2);
  EXPECT_EQ(block.GetDiagnostics().at("layer.cached_graphs"), "2");
}

TEST(LayerTest, TrainingModeKeepsOnlyWhatTheGradientReads) {
  // The gradient of a chain of linear layers reads the input of each layer and nothing else.
  Pair pair;
  Tensor x = Random(1).NormalTensor({100, 3});
  pair.Forward(x);
  // x [100, 3]; first(x) [100, 4] for the gain's gradient; its product [100, 4] for second.weight.
  EXPECT_EQ(pair.GetDiagnostics().at("layer.kept_bytes"), fmt::format("{}", 4 * (300 + 400 + 400)));
  pair.SetTrainingMode(false);
  pair.Forward(x);
  EXPECT_EQ(pair.GetDiagnostics().at("layer.kept_bytes"), "0");
}

TEST(LayerTest, LoadReport) {
  Pair source, pair;
  source.Initialize(1);
  pair.Initialize(2);
  auto tensors = source.SaveParameters();
  EXPECT_EQ(tensors.size(), 5u);
  LoadReport report = pair.LoadParameters(tensors);
  EXPECT_TRUE(report.complete());
  EXPECT_EQ(report.loaded.size(), 5u);
  EXPECT_EQ(RelativeError(pair.GetParameters(), source.GetParameters()), 0);

  pair.Initialize(2);
  Tensor before = pair.GetParameters();
  tensors.erase("first.bias");
  tensors["first.wieght"] = Tensor::Zeros({4, 3});
  tensors["gain"] = Tensor::Zeros({5});
  tensors["inner.second.bias"] = tensors["inner.second.bias"].To(DType::kF64);
  std::string message = MessageOf<ValueError>([&] { pair.LoadParameters(tensors); });
  EXPECT_THAT(message, HasSubstr("missing (1):\n  first.bias"));
  EXPECT_THAT(message, HasSubstr("unexpected (1):\n  first.wieght"));
  EXPECT_THAT(message, HasSubstr("gain: the tensor has shape [5], the parameter [4]"));
  EXPECT_EQ(RelativeError(pair.GetParameters(), before), 0) << "nothing may be half-loaded";

  report = pair.LoadParameters(tensors, /*strict=*/false);
  EXPECT_THAT(report.loaded,
              ElementsAre("first.weight", "inner.second.weight", "inner.second.bias"));
  EXPECT_THAT(report.missing, ElementsAre("first.bias"));
  EXPECT_THAT(report.unexpected, ElementsAre("first.wieght"));
  EXPECT_EQ(report.wrong_shape.size(), 1u);
  EXPECT_EQ(RelativeError(pair.FindParameter("inner.second.bias")->value(),
                          source.FindParameter("inner.second.bias")->value()),
            0);
  EXPECT_EQ(pair.FindParameter("first.bias")->value().data()[0], before.data()[16]);
  tensors["gain"] = Tensor::Zeros({4}, DType::kI64);
  EXPECT_THAT(MessageOf<ValueError>([&] { pair.LoadParameters(tensors); }), HasSubstr("i64"));

  // Tensors that are moved in become the storage of parameters that have none yet; those that
  // somebody else holds are copied.
  Pair fresh, copied;
  auto moved = source.SaveParameters();
  const void* address = moved.at("first.weight").raw();
  EXPECT_TRUE(copied.LoadParameters(moved).complete());
  EXPECT_NE(copied.FindParameter("first.weight")->value().raw(), address);
  const int64_t allocations = MemoryStats::Allocations();
  EXPECT_TRUE(fresh.LoadParameters(std::move(moved)).complete());
  EXPECT_EQ(MemoryStats::Allocations(), allocations);
  EXPECT_EQ(fresh.FindParameter("first.weight")->value().raw(), address);
  EXPECT_EQ(RelativeError(fresh.GetParameters(), source.GetParameters()), 0);

  // A sub-layer loads by paths that start at itself.
  Outer outer;
  EXPECT_TRUE(outer.pair()->LoadParameters(source.SaveParameters()).complete());
  EXPECT_EQ(RelativeError(outer.pair()->Forward(Tensor::Full({1, 3}, 1)),
                          source.Forward(Tensor::Full({1, 3}, 1))),
            0);
}

TEST(LayerTest, ReleasedParametersAreGoneUntilTheyAreLoadedAgain) {
  Pair pair, fresh;
  pair.Initialize(1);
  Tensor x = Tensor::Full({2, 3}, 0.5f), expected = pair.Forward(x).Clone();
  auto tensors = pair.SaveParameters();
  std::weak_ptr<Parameter> old = pair.FindParameter("gain");
  for (Pair* layer : {&pair, &fresh}) {
    layer->ReleaseParameters();
    for (auto access : std::vector<std::function<void()>>{
             [&] { layer->Forward(x); }, [&] { layer->NamedParameters(); },
             [&] { layer->SaveParameters(); }, [&] { layer->FindParameter("gain"); }}) {
      EXPECT_THAT(MessageOf<ValueError>(access), HasSubstr("has been released; load it again"));
    }
    EXPECT_TRUE(layer->CheckParameters(tensors).complete());
  }
  EXPECT_TRUE(old.expired());

  EXPECT_TRUE(pair.LoadParameters(tensors).complete());
  EXPECT_EQ(RelativeError(pair.Forward(x), expected), 0);
  pair.ReleaseParameters();
  pair.Initialize(1);
  EXPECT_EQ(RelativeError(pair.Forward(x), expected), 0);
  tensors.erase("gain");
  EXPECT_THAT(pair.CheckParameters(tensors).missing, ElementsAre("gain"));
}

TEST(LayerTest, LayersAroundReleasedParametersForgetThemToo) {
  Outer outer;
  outer.Initialize(1);
  Tensor x = Tensor::Full({2, 3}, 0.5f), before = outer.Forward(x).Clone();
  std::weak_ptr<Parameter> old = outer.pair()->FindParameter("gain");
  outer.pair()->ReleaseParameters();
  EXPECT_TRUE(old.expired());
  EXPECT_THAT(MessageOf<ValueError>([&] {
                outer.Backward(Tensor::Full({2, 2}, 1));
              }),
              HasSubstr("needs a Forward"));
  EXPECT_THAT(MessageOf<ValueError>([&] { outer.Forward(x); }), HasSubstr("has been released"));

  Pair other;
  other.Initialize(2);
  outer.pair()->LoadParameters(other.SaveParameters());
  EXPECT_EQ(RelativeError(outer.Forward(x), other.Forward(x)), 0);
  EXPECT_GT(RelativeError(outer.Forward(x), before), 1e-3);
}

TEST(LayerTest, WhatIsFrozenStaysFrozenWhenItIsLoadedAgain) {
  Pair pair;
  auto tensors = pair.SaveParameters();
  pair.FindParameter("gain")->set_trainable(false);
  pair.FindParameter("first.bias")->set_trainable(false);
  auto kept = tensors.at("gain");  // copied, while first.bias is moved in
  pair.ReleaseParameters();
  pair.ReleaseParameters();
  pair.LoadParameters(std::move(tensors));
  for (const ParameterPtr& parameter : pair.NamedParameters()) {
    EXPECT_EQ(parameter->trainable(),
              parameter->name() != "gain" && parameter->name() != "first.bias")
        << parameter->name();
  }
}

TEST(LayerTest, ConstructionTakesNoStorage) {
  int64_t live = MemoryStats::LiveBytes();
  nn::Transformer2DModel layer({.num_attention_heads = 8,
                                .attention_head_dim = 160,
                                .in_channels = 1280,
                                .cross_attention_dim = 768});
  EXPECT_GT(layer.ParameterCount(), 20'000'000);
  EXPECT_EQ(MemoryStats::LiveBytes(), live);
}

TEST(LayerTest, Diagnostics) {
  Outer outer;
  auto facts = outer.pair()->GetDiagnostics();
  EXPECT_EQ(facts.at("layer.type"), "Pair");
  EXPECT_EQ(facts.at("layer.path"), "pair");
  EXPECT_EQ(facts.at("layer.parameter_count"), "30");
  EXPECT_EQ(facts.at("layer.training"), "true");
  outer.SetTrainingMode(false);
  EXPECT_FALSE(outer.pair()->training());
}

}  // namespace
}  // namespace calotype
