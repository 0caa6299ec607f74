// Whole models compiled: the toy16 U-Net, the caption encoder and both attention layers against
// eager execution and float64, with gradients; what may change between calls really does.
#include <gtest/gtest.h>

#include <cmath>

#include "core/parallel.h"
#include "core/random.h"
#include "graph/functions.h"
#include "graph/interpreter.h"
#include "jit/compile.h"
#include "layers/diffusion_cross_attention.h"
#include "layers/flash_attention_layer.h"
#include "models/caption_encoder.h"
#include "models/presets.h"
#include "models/unet_2d_condition.h"
#include "tests/count_mallocs.h"

namespace calotype {
namespace {

// Largest |a - b| over the largest |b|.
double Difference(const Tensor& a, const Tensor& b) {
  EXPECT_EQ(a.shape(), b.shape());
  double largest = 0, difference = 0;
  for (int64_t i = 0; i < a.elements(); ++i) {
    double x = a.data()[i], y = b.data()[i];
    largest = std::max(largest, std::abs(y));
    difference = std::isfinite(x) ? std::max(difference, std::abs(x - y)) : INFINITY;
  }
  EXPECT_GT(largest, 0);
  return difference / largest;
}

double RootMeanSquareError(const Tensor& a, const Tensor& reference) {
  double sum = 0;
  for (int64_t i = 0; i < a.elements(); ++i) {
    double e = a.data()[i] - reference.data<double>()[i];
    sum += e * e;
  }
  return std::sqrt(sum / static_cast<double>(a.elements()));
}

std::vector<Tensor> Subtract(std::vector<Tensor> a, const Tensor& b) {
  for (int64_t i = 0; i < b.elements(); ++i) a[0].data()[i] -= b.data()[i];
  return a;
}

class UNetJitTest : public testing::Test {
 protected:
  static constexpr int64_t kBatch = 2;
  static void SetUpTestSuite() {
    model_ = new UNet2DConditionModel(UNetPreset("toy16"));
    model_->Initialize(3);
    model_->SetTrainingMode(false);
    graph_ = new ComputationGraph(model_->Export({{"sample", {DType::kF32, {kBatch, 3, 16, 16}}},
                                                  {"timestep", {DType::kI64, {kBatch}}},
                                                  {"context", {DType::kF32, {kBatch, 8, 64}}}}));
    compiled_ = jit::Compile(*graph_).release();
  }
  static void TearDownTestSuite() {
    delete compiled_;
    delete graph_;
    delete model_;
  }
  static std::vector<Tensor> Inputs() {
    Random random(5);
    return {random.NormalTensor({kBatch, 3, 16, 16}), Tensor::From<int64_t>({kBatch}, {17, 903}),
            random.NormalTensor({kBatch, 8, 64})};
  }
  static Tensor Eager(const std::vector<Tensor>& inputs) {
    return Interpreter(*graph_).Run(inputs)[0];
  }

  static UNet2DConditionModel* model_;
  static ComputationGraph* graph_;
  static jit::Executable* compiled_;
};
UNet2DConditionModel* UNetJitTest::model_ = nullptr;
ComputationGraph* UNetJitTest::graph_ = nullptr;
jit::Executable* UNetJitTest::compiled_ = nullptr;

TEST_F(UNetJitTest, MatchesEagerAndFloat64) {
  std::vector<Tensor> inputs = Inputs();
  Tensor jit = compiled_->Run(inputs)[0], eager = Eager(inputs);
  double difference = Difference(jit, eager);
  std::printf("[ worst    ] JIT against eager %.2g of the maximum\n", difference);
  EXPECT_LE(difference, 2e-5);
  Tensor reference = Interpreter(*graph_).RunReference(inputs)[0];
  double jit_error = RootMeanSquareError(jit, reference);
  double eager_error = RootMeanSquareError(eager, reference);
  std::printf("[ rmse     ] JIT %.3g, eager %.3g against float64\n", jit_error, eager_error);
  EXPECT_LE(jit_error, 2 * eager_error + 1e-6);
}

TEST_F(UNetJitTest, OnlyTheTimestepOrOnlyTheContextChangesTheOutputAsInEager) {
  const std::vector<Tensor> inputs = Inputs();
  Tensor first = compiled_->Run(inputs)[0], eager_first = Eager(inputs);
  for (int which : {1, 2}) {
    std::vector<Tensor> changed = inputs;
    changed[which] = which == 1 ? Tensor::From<int64_t>({kBatch}, {500, 4})
                                : Random(9).NormalTensor(inputs[2].shape());
    Tensor change = Subtract(compiled_->Run(changed), first)[0];
    Tensor eager_change = Subtract({Eager(changed)}, eager_first)[0];
    double largest = 0;
    for (float d : eager_change.values())
      largest = std::max(largest, static_cast<double>(std::abs(d)));
    EXPECT_GT(largest, 1e-3) << "input " << which << " has no effect";
    EXPECT_LE(Difference(change, eager_change), 2e-3) << "input " << which;
    EXPECT_LE(Difference(compiled_->Run(changed)[0], Eager(changed)), 2e-5);
  }
}

TEST_F(UNetJitTest, EachPictureDependsOnItsOwnInputsOnly) {
  std::vector<Tensor> inputs = Inputs();
  Tensor first = compiled_->Run(inputs)[0];
  std::vector<Tensor> changed = inputs;
  changed[1] = Tensor::From<int64_t>({kBatch}, {17, 4});  // the second picture's timestep
  Tensor second = compiled_->Run(changed)[0];
  const int64_t half = first.elements() / 2;
  EXPECT_TRUE(std::equal(first.data(), first.data() + half, second.data()));
  EXPECT_FALSE(std::equal(first.data() + half, first.data() + 2 * half, second.data() + half));
}

TEST_F(UNetJitTest, AllocatesNothing) {
  std::vector<Tensor> inputs = Inputs(), outputs = compiled_->Run(inputs);
  int64_t mallocs = g_mallocs, storage = MemoryStats::Allocations();
  for (int i = 0; i < 3; ++i) compiled_->Run(inputs, outputs);
  EXPECT_EQ(g_mallocs, mallocs);
  EXPECT_EQ(MemoryStats::Allocations(), storage);
}

TEST_F(UNetJitTest, SameBitsOnOneAndTwoThreads) {
  const int before = Threads();
  SetThreads(1);
  Tensor one = compiled_->Run(Inputs())[0];
  SetThreads(2);
  Tensor two = compiled_->Run(Inputs())[0];
  SetThreads(before);
  EXPECT_TRUE(std::equal(one.data(), one.data() + one.elements(), two.data()));
}

TEST_F(UNetJitTest, CompiledCodeSeesUpdateParameters) {
  std::vector<Tensor> inputs = Inputs();
  Tensor before = compiled_->Run(inputs)[0];
  Tensor saved = model_->GetParameters();
  model_->SetTrainingMode(true);
  Tensor out = model_->Forward(inputs)[0];
  model_->Backward(Random(2).NormalTensor(out.shape()));
  model_->UpdateParameters(0.01f);
  model_->SetTrainingMode(false);
  Tensor after = compiled_->Run(inputs)[0];
  EXPECT_GT(Difference(after, before), 1e-3);
  EXPECT_LE(Difference(after, Eager(inputs)), 2e-5);
  model_->ResetState();
  model_->SetParameters(saved);
  Tensor restored = compiled_->Run(inputs)[0];
  EXPECT_TRUE(std::equal(before.data(), before.data() + before.elements(), restored.data()));
}

// Outputs and all gradients of a layer, compiled, against eager.
void ExpectGradientsMatch(Layer& layer, const std::vector<GraphInput>& declared,
                          const std::vector<Tensor>& tensors, double tolerance) {
  ComputationGraph graph;
  std::vector<Value> inputs, wrt;
  for (const GraphInput& input : declared) {
    inputs.push_back(graph.Input(input.name, input.type));
    if (input.type.dtype == DType::kF32) wrt.push_back(inputs.back());
  }
  Value out = layer.ExportComputationGraph(graph, inputs)[0];
  for (const ParameterPtr& parameter : layer.NamedParameters()) {
    wrt.push_back(graph.ParameterLeaf(parameter));
  }
  Value cotangent = graph.Input("cotangent", out.shape());
  std::vector<Value> gradients = Gradients(std::vector{out}, std::vector{cotangent}, wrt);
  graph.Output("out", out);
  for (size_t i = 0; i < gradients.size(); ++i) graph.Output(fmt::format("d{}", i), gradients[i]);
  std::vector<Tensor> values = tensors;
  values.push_back(Random(11).NormalTensor(out.shape()));
  std::vector<Tensor> eager = Interpreter(graph).Run(values);
  std::vector<Tensor> jit = jit::Compile(graph)->Run(values);
  double largest = 0;  // over all gradients: some are zero but for rounding
  for (size_t i = 1; i < eager.size(); ++i) {
    for (float d : eager[i].values()) largest = std::max(largest, static_cast<double>(std::abs(d)));
  }
  EXPECT_GT(largest, 0);
  for (size_t i = 0; i < eager.size(); ++i) {
    double own = 0, difference = 0;
    for (int64_t k = 0; k < eager[i].elements(); ++k) {
      own = std::max(own, static_cast<double>(std::abs(eager[i].data()[k])));
      difference = std::max(difference,
                            static_cast<double>(std::abs(jit[i].data()[k] - eager[i].data()[k])));
      ASSERT_TRUE(std::isfinite(jit[i].data()[k]));
    }
    EXPECT_LE(difference, tolerance * own + 1e-6 * largest) << "result " << i;
  }
}

// Code is shared by equal kernels and may come from a cache; graphs that differ in one attribute,
// one constant or one operand must not share it.
TEST(ModelJit, GraphsThatDifferInOneAttributeHaveTheirOwnCode) {
  using Build = Value (*)(Value);
  const Build builds[] = {
      [](Value x) { return Softmax(x, 1); },
      [](Value x) { return Softmax(x, 2); },
      [](Value x) { return Sum(x, {1}); },
      [](Value x) { return Sum(x, {2}); },
      [](Value x) { return MatMul(x, x, false, true); },
      [](Value x) { return MatMul(x, x, true, false); },
      [](Value x) { return Attention(x, x, x, {.heads = 2, .scale = 0.5}).out; },
      [](Value x) { return Attention(x, x, x, {.heads = 2, .scale = 0.25}).out; },
      [](Value x) { return Attention(x, x, x, {.heads = 1, .scale = 0.5}).out; },
      [](Value x) { return Attention(x, x, x, {.heads = 2, .scale = 0.5, .causal = true}).out; },
      [](Value x) { return GroupNorm(x, {}, {}, 2, 1e-5); },
      [](Value x) { return GroupNorm(x, {}, {}, 4, 1e-5); },
      [](Value x) { return GroupNorm(x, {}, {}, 4, 0.5); },
      [](Value x) { return x * 2.0f; },
      [](Value x) { return x * 3.0f; },
      [](Value x) {
        return Permute(x, {0, 2, 1}) - x;
      },
      [](Value x) {
        return x - Permute(x, {0, 2, 1});
      },
      [](Value x) {
        return Maximum(x, Permute(x, {0, 2, 1}));
      },
      [](Value x) {
        return Permute(x, {0, 2, 1}) / (x * x + 1.0f);
      },
  };
  Tensor x = Random(3).NormalTensor({2, 8, 8});
  std::vector<Tensor> results;
  for (size_t i = 0; i < std::size(builds); ++i) {
    ComputationGraph graph;
    graph.Output("y", builds[i](graph.Input("x", x.type())));
    results.push_back(jit::Compile(graph)->Run(std::vector{x})[0]);
    EXPECT_LE(Difference(results[i], Interpreter(graph).Run(std::vector{x})[0]), 1e-5) << i;
    for (size_t j = 0; j < i; ++j) {
      if (results[i].shape() != results[j].shape()) continue;
      EXPECT_GT(Difference(results[i], results[j]), 1e-4) << i << " and " << j;
    }
  }
}

TEST(ModelJit, CaptionEncoderWithGradients) {
  CaptionEncoderConfig config;
  config.vocabulary = {"<pad>", "<unk>", "a", "blue", "circle", "red", "square"};
  config.hidden_size = 16;
  config.num_layers = 1;
  const int64_t tokens = config.max_length;
  std::vector<int64_t> ids(2 * tokens);
  for (size_t i = 0; i < ids.size(); ++i)
    ids[i] = static_cast<int64_t>(i * 3 % config.vocabulary.size());
  for (bool causal : {false, true}) {
    config.causal = causal;
    CaptionEncoder encoder(config);
    encoder.Initialize(1);
    ExpectGradientsMatch(encoder, {{"ids", {DType::kI64, {2, tokens}}}},
                         {Tensor::From(Shape{2, tokens}, ids)}, 1e-5);
  }
}

TEST(ModelJit, DiffusionCrossAttentionWithGradients) {
  Random random(4);
  nn::DiffusionCrossAttention layer(24, 20, 3, 5);
  layer.Initialize(1);
  ExpectGradientsMatch(
      layer, {{"input", {DType::kF32, {2, 24, 5, 5}}}, {"context", {DType::kF32, {2, 7, 20}}}},
      {random.NormalTensor({2, 24, 5, 5}), random.NormalTensor({2, 7, 20})}, 2e-5);
  ExpectGradientsMatch(
      layer, {{"input", {DType::kF32, {2, 9, 24}}}, {"context", {DType::kF32, {1, 7, 20}}}},
      {random.NormalTensor({2, 9, 24}), random.NormalTensor({1, 7, 20})}, 2e-5);
}

TEST(ModelJit, FlashAttentionWithGradients) {
  Random random(4);
  for (bool causal : {false, true}) {
    auto config = causal ? nn::FlashAttentionConfig::Causal() : nn::FlashAttentionConfig::Default();
    nn::FlashAttentionLayer layer(37, 24, 3, config);
    layer.Initialize(1);
    layer.SetTrainingMode(false);
    ExpectGradientsMatch(layer, {{"input", {DType::kF32, {2, 37, 24}}}},
                         {random.NormalTensor({2, 37, 24})}, 2e-5);
  }
}

// Attention of x with a seed for its dropout.
class DroppingAttention : public Layer {
 public:
  explicit DroppingAttention(const nn::AttentionProcessor& processor) : Layer("Dropping") {
    attention_ = AddLayer<nn::Attention>(
        "attention",
        nn::Attention::Options{.query_dim = 12, .heads = 2, .dim_head = 6, .dropout = 0.25});
    attention_->SetProcessor(processor);
  }
  std::vector<Value> ExportComputationGraph(ComputationGraph&,
                                            std::span<const Value> inputs) override {
    return {attention_->Call({inputs[0], Value{}, Value{}, Value{}, inputs[1]})};
  }

 private:
  nn::Attention* attention_;
};

TEST(ModelJit, AttentionWithDropoutAndGradients) {
  for (const nn::AttentionProcessor& processor : std::vector<nn::AttentionProcessor>{
           nn::AttnProcessor{}, nn::CustomDiffusionXFormersAttnProcessor{},
           nn::CustomDiffusionAttnProcessor2_0{.dropout = 0.5}}) {
    DroppingAttention layer(processor);
    layer.Initialize(1);
    ExpectGradientsMatch(layer, {{"x", {DType::kF32, {2, 9, 12}}}, {"seed", {DType::kI64, {1}}}},
                         {Random(4).NormalTensor({2, 9, 12}), Tensor::From<int64_t>({1}, {5})},
                         2e-5);
  }
}

TEST(ModelJit, UNetGradients) {
  UNet2DConditionConfig config = UNetPreset("toy16");
  config.block_out_channels = {8, 16};
  config.norm_num_groups = 4;
  UNet2DConditionModel model(config);
  model.Initialize(1);
  Random random(6);
  ExpectGradientsMatch(model,
                       {{"sample", {DType::kF32, {2, 3, 7, 6}}},
                        {"timestep", {DType::kI64, {2}}},
                        {"context", {DType::kF32, {2, 5, 64}}}},
                       {random.NormalTensor({2, 3, 7, 6}), Tensor::From<int64_t>({2}, {3, 700}),
                        random.NormalTensor({2, 5, 64})},
                       1e-4);
}

}  // namespace
}  // namespace calotype
