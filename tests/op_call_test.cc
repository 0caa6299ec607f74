// The fused ops: their gradient ops against the gradient of the decomposition and against central
// differences, bits independent of threads, memory of attention, masks, weight gradients, errors.
// That each op's kernel agrees with float64 is checked for the whole table in op_test.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include "core/parallel.h"
#include "graph/functions.h"
#include "graph/interpreter.h"
#include "graph/op.h"
#include "tests/expect_error.h"
#include "tests/op_inputs.h"

namespace calotype {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

int CountOps(const ComputationGraph& graph, std::string_view name) {
  int count = 0;
  for (const ComputationNode& node : graph.nodes()) count += node.op->name == name;
  return count;
}

Tensor ToF64(const Tensor& x) { return x.dtype() == DType::kF32 ? x.To(DType::kF64) : x; }

double Largest(const Tensor& x) {
  double largest = 0;
  for (double v : x.values<double>()) largest = std::max(largest, std::abs(v));
  return largest;
}

// loss = sum(v * first output) of one op, with the gradients of the f32 inputs: of the op's own
// rule, or of its decomposition.
struct LossGraph {
  ComputationGraph graph;
  std::vector<Value> wrt;
  std::vector<int> positions;  // of wrt among the inputs

  LossGraph(const Op& op, const OpSample& sample, bool decomposed, const std::vector<bool>& skip) {
    std::vector<Value> inputs;
    for (size_t i = 0; i < sample.inputs.size(); ++i) {
      inputs.push_back(graph.Input(fmt::format("x{}", i), sample.inputs[i]));
      if (sample.inputs[i].dtype != DType::kF32 || (i < skip.size() && skip[i])) continue;
      wrt.push_back(inputs[i]);
      positions.push_back(static_cast<int>(i));
    }
    std::vector<Value> outputs = graph.Emit(op, inputs, sample.attrs);
    Value y = outputs[0];
    if (decomposed) {
      const ComputationNode node = graph.node(y.id.node);  // the nodes move as the graph grows
      y = op.decompose(graph, node, inputs)[0];
    }
    Value v = graph.Input("v", y.type());
    graph.Output("loss", Sum(v * y));
    std::vector<Value> gradients = Gradients(std::vector<Value>{y}, std::vector<Value>{v}, wrt);
    for (size_t i = 0; i < wrt.size(); ++i) graph.Output(fmt::format("d{}", i), gradients[i]);
    Verify(graph);
  }
};

std::vector<Tensor> WithCotangent(const Op& op, const OpSample& sample, Random& random) {
  std::vector<Tensor> values = RandomInputs(op, sample, random);
  ComputationGraph graph;
  std::vector<Value> inputs;
  for (size_t i = 0; i < sample.inputs.size(); ++i) {
    inputs.push_back(graph.Input(fmt::format("x{}", i), sample.inputs[i]));
  }
  values.push_back(random.UniformTensor(graph.Emit(op, inputs, sample.attrs)[0].shape(), -1, 1));
  return values;
}

class FusedGradient : public testing::TestWithParam<const char*> {};

// Of the first output only, as layers use it: there the fused gradient op must be in the graph.
TEST_P(FusedGradient, MatchesDecompositionDifferencesAndEager) {
  const Op& op = FindOp(GetParam());
  int number = 0;
  for (const OpSample& sample : op.samples()) {
    SCOPED_TRACE(fmt::format("{} sample {}: {} {}", op.name, number, fmt::join(sample.inputs, ", "),
                             sample.attrs.ToString()));
    Random random(77, static_cast<uint64_t>(number++));
    // A mask whose gradient is wanted goes through the decomposition, see AttentionMaskGradient.
    std::vector<bool> skip(sample.inputs.size(), false);
    if (op.name == "Attention" && sample.attrs.Int("mask")) skip[3] = true;
    std::vector<Tensor> values = WithCotangent(op, sample, random), wide;
    for (const Tensor& x : values) wide.push_back(ToF64(x));
    LossGraph fused(op, sample, false, skip);
    std::string gradient_name = std::string(op.name) + "Gradient";
    if (op.name == "Attention" || op.name.ends_with("Norm")) {
      EXPECT_EQ(CountOps(fused.graph, gradient_name), 1);
    }
    Interpreter interpreter(fused.graph);
    std::vector<Tensor> exact = interpreter.RunReference(wide);
    std::vector<Tensor> eager = interpreter.Run(values);

    std::vector<Tensor> decomposed;
    if (op.decompose) {
      LossGraph graph(op, sample, true, skip);
      EXPECT_EQ(CountOps(graph.graph, gradient_name), 0);
      decomposed = Interpreter(graph.graph).RunReference(wide);
    }
    for (size_t d = 0; d < fused.wrt.size(); ++d) {
      const Tensor& dx = exact[1 + d];
      double largest = Largest(dx);
      for (int64_t e = 0; e < dx.elements(); ++e) {
        double value = dx.data<double>()[e];
        if (op.decompose) {
          ASSERT_NEAR(decomposed[1 + d].data<double>()[e], value, 1e-9 * largest + 1e-12)
              << "input " << fused.positions[d] << " element " << e;
        }
        // float32 against float64: sums of up to a few thousand terms.
        ASSERT_NEAR(eager[1 + d].data()[e], value, 2e-5 * largest + 1e-6)
            << "input " << fused.positions[d] << " element " << e;
      }
      Tensor& x = wide[fused.positions[d]];
      for (int64_t pick = 0; pick < std::min<int64_t>(x.elements(), 6); ++pick) {
        int64_t e = random.Integer(x.elements());
        double& element = x.data<double>()[e];
        const double start = element, h = 6.06e-6 * std::max(1.0, std::abs(start));
        element = start + h;
        double up = interpreter.RunReference(wide)[0].Item();
        element = start - h;
        double down = interpreter.RunReference(wide)[0].Item();
        element = start;
        double numeric = (up - down) / (2 * h), analytic = dx.data<double>()[e];
        double rounding = 1e-15 * (std::abs(up) + static_cast<double>(x.elements())) / h;
        ASSERT_NEAR(numeric, analytic, 1e-6 * (std::abs(analytic) + 1e-3 * largest) + rounding)
            << "input " << fused.positions[d] << " element " << e;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, FusedGradient,
                         testing::Values("MatMul", "Conv2d", "GroupNorm", "LayerNorm", "Softmax",
                                         "Attention"),
                         [](const auto& info) { return std::string(info.param); });

// ------------------------------------------------------------------------------------- threads

class Threading : public testing::TestWithParam<const char*> {
 protected:
  void TearDown() override { SetThreads(threads_); }
  int threads_ = Threads();
};

TEST_P(Threading, SameBits) {
  const Op& op = FindOp(GetParam());
  std::vector<OpSample> samples = op.samples();
  // Large enough for several chunks.
  auto f32 = [](Shape shape) { return TensorType{DType::kF32, shape}; };
  if (op.name == "GroupNorm") {
    samples.push_back(
        {{f32({8, 32, 40, 40}), f32({32}), f32({32})}, {{"groups", int64_t{8}}, {"eps", 1e-5}}});
  } else if (op.name == "LayerNorm") {
    samples.push_back({{f32({3000, 65}), f32({65}), f32({65})}, {{"eps", 1e-5}}});
  } else if (op.name == "Softmax") {
    samples.push_back({{f32({3000, 77})}, {}});
  } else if (op.name == "Attention") {
    samples.push_back(samples[2]);
    samples.back().inputs = {f32({4, 200, 48}), f32({1, 100, 48}), f32({1, 100, 48})};
  }
  for (const OpSample& sample : samples) {
    Random random(5);
    std::vector<Tensor> values = WithCotangent(op, sample, random);
    LossGraph graph(op, sample, false, {});
    std::vector<std::vector<Tensor>> results;
    for (int threads : {1, 2, 3}) {
      SetThreads(threads);
      results.push_back(Interpreter(graph.graph).Run(values));
    }
    for (size_t r = 1; r < results.size(); ++r) {
      for (size_t o = 0; o < results[0].size(); ++o) {
        ASSERT_EQ(std::memcmp(results[0][o].raw(), results[r][o].raw(), results[0][o].bytes()), 0)
            << op.name << " " << fmt::format("{}", fmt::join(sample.inputs, ", ")) << " output "
            << o;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Threading,
                         testing::Values("GroupNorm", "LayerNorm", "Softmax", "Attention"),
                         [](const auto& info) { return std::string(info.param); });

// -------------------------------------------------------------------------------------- MatMul

TEST(MatMulGradient, SharedWeightIsOneFlatProduct) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{4, 9, 16}), w = graph.Input("w", Shape{24, 16});
  Value b = graph.Input("b", Shape{24});
  Value y = MatMul(x, w, false, true, b);
  Value dy = graph.Input("dy", y.type());
  size_t before = graph.nodes().size();
  Value dw = Gradients(std::vector<Value>{y}, std::vector<Value>{dy}, std::vector<Value>{w})[0];
  int products = 0;
  for (size_t i = before; i < graph.nodes().size(); ++i) {
    const ComputationNode& node = graph.node(static_cast<int32_t>(i));
    EXPECT_NE(node.op->name, "Sum");
    if (node.op->name != "MatMul") continue;
    ++products;
    EXPECT_EQ(node.types[0].shape, (Shape{24, 16}));
    EXPECT_EQ(graph.type(node.inputs[0]).shape, (Shape{36, 24}));
  }
  EXPECT_EQ(products, 1);
  EXPECT_EQ(dw.shape(), w.shape());
}

// ---------------------------------------------------------------------------------- GroupNorm

TEST(GroupNormTest, KeepsDigitsFarFromZero) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{2, 4, 16, 16});
  graph.Output("y", GroupNorm(x, {}, {}, 2, 1e-5));
  Random random(3);
  Tensor input = random.NormalTensor({2, 4, 16, 16});
  for (float& v : input.values()) v += 4096;  // E[x^2] - mean^2 has no correct digit here
  Interpreter interpreter(graph);
  std::vector<Tensor> inputs = {input};
  Tensor actual = interpreter.Run(inputs)[0], exact = interpreter.RunReference(inputs)[0];
  for (int64_t i = 0; i < actual.elements(); ++i) {
    ASSERT_NEAR(actual.data()[i], exact.data<double>()[i], 1e-3);
  }
}

TEST(GroupNormTest, GradientThroughTheStatistics) {
  // Nothing in a model reads mean and rstd, but the graph must not be wrong if something does.
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{2, 4, 3}), one = graph.Input("w", Shape{4}),
        zero = graph.Input("b", Shape{4});
  std::vector<Value> outputs = graph.Emit(FindOp("GroupNorm"), std::vector<Value>{x, one, zero},
                                          {{"groups", int64_t{2}}, {"eps", 1e-5}});
  graph.Output("d", Gradients(std::vector<Value>{Sum(outputs[1])}, std::vector<Value>{{}},
                              std::vector<Value>{x})[0]);
  Random random(4);
  std::vector<Tensor> inputs = {random.NormalTensor({2, 4, 3}), Tensor::Full({4}, 1),
                                Tensor::Full({4}, 0)};
  Tensor d = Interpreter(graph).Run(inputs)[0];
  for (float v : d.values()) EXPECT_NEAR(v, 1.0f / 6, 1e-6);
}

// ------------------------------------------------------------------------------------ Softmax

TEST(SoftmaxTest, AnyAxisExtremesAndMaskedRows) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{2, 3, 2});
  graph.Output("y", Softmax(x, 1));
  Tensor input = Tensor::From<float>({2, 3, 2}, {1000, -kInf, 1000, -kInf, -1000, -kInf,  //
                                                 0, -3e38f, -kInf, -3e38f, 0, -3e38f});
  Tensor y = Interpreter(graph).Run(std::vector<Tensor>{input})[0];
  auto at = [&](int b, int i, int j) { return y.data()[(b * 3 + i) * 2 + j]; };
  EXPECT_FLOAT_EQ(at(0, 0, 0), 0.5f);
  EXPECT_FLOAT_EQ(at(0, 1, 0), 0.5f);
  EXPECT_EQ(at(0, 2, 0), 0);
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(std::isnan(at(0, i, 1)));  // as torch.softmax
    EXPECT_FLOAT_EQ(at(1, i, 1), 1.0f / 3);
  }
  EXPECT_FLOAT_EQ(at(1, 0, 0), 0.5f);
  EXPECT_EQ(at(1, 1, 0), 0);
}

// ---------------------------------------------------------------------------------- Attention

// Attention of random q, k, v with gradients as a graph: outputs out, lse, dq, dk, dv (, dmask).
struct AttentionGraph {
  ComputationGraph graph;

  AttentionGraph(int64_t batch, int64_t queries, int64_t keys, int64_t width,
                 const AttentionOptions& options, Shape mask_shape = {},
                 bool mask_gradient = false) {
    Value q = graph.Input("q", Shape{batch, queries, width});
    Value k = graph.Input("k", Shape{batch, keys, width});
    Value v = graph.Input("v", Shape{batch, keys, width});
    Value dout = graph.Input("dout", Shape{batch, queries, width}), mask, seed;
    if (mask_shape.rank() > 0) mask = graph.Input("mask", mask_shape);
    if (options.dropout > 0) seed = graph.Input("seed", {DType::kI64, Shape{1}});
    AttentionResult result = Attention(q, k, v, options, mask, seed);
    graph.Output("out", result.out);
    graph.Output("lse", result.lse);
    std::vector<Value> wrt = {q, k, v};
    if (mask_gradient) wrt.push_back(mask);
    std::vector<Value> gradients =
        Gradients(std::vector<Value>{result.out}, std::vector<Value>{dout}, wrt);
    for (const Value& d : gradients) graph.Output(fmt::format("d{}", graph.outputs().size()), d);
  }
};

std::vector<Tensor> AttentionInputs(int64_t batch, int64_t queries, int64_t keys, int64_t width,
                                    Random& random) {
  return {random.NormalTensor({batch, queries, width}), random.NormalTensor({batch, keys, width}),
          random.NormalTensor({batch, keys, width}), random.NormalTensor({batch, queries, width})};
}

TEST(AttentionTest, MemoryIsLinearInTokens) {
  // Peak bytes beyond the inputs, forward and backward, on a fresh thread with empty scratch.
  auto peak = [](int64_t tokens) {
    int64_t bytes = 0;
    std::thread([&] {
      Random random(6);
      AttentionGraph g(1, tokens, tokens, 8, {.heads = 1, .scale = 0.35});
      std::vector<Tensor> inputs = AttentionInputs(1, tokens, tokens, 8, random);
      int64_t before = MemoryStats::LiveBytes();
      MemoryStats::ResetPeak();
      Interpreter(g.graph).Run(inputs);
      bytes = MemoryStats::PeakBytes() - before;
    }).join();
    return bytes;
  };
  int64_t small = peak(1024), large = peak(16384);
  EXPECT_GT(small, 4 * 1024 * 8 * 4);
  EXPECT_LE(large, 16 * small);
  EXPECT_LT(large, int64_t{16384} * 16384 * 4 / 100);
}

TEST(AttentionTest, RowsWithoutAVisibleKey) {
  // Query 1 sees nothing: zeros and lse = -inf, as PyTorch's scaled_dot_product_attention; query 2
  // has the lowest finite number everywhere, which is a uniform mask.
  AttentionGraph g(1, 3, 5, 4, {.heads = 2, .scale = 0.7}, Shape{1, 1, 3, 5}, true);
  Random random(8);
  std::vector<Tensor> inputs = AttentionInputs(1, 3, 5, 4, random);
  Tensor mask = Tensor::Zeros({1, 1, 3, 5});
  for (int j = 0; j < 5; ++j) {
    mask.data()[5 + j] = -kInf;
    mask.data()[10 + j] = std::numeric_limits<float>::lowest();
  }
  inputs.push_back(mask);
  Interpreter interpreter(g.graph);
  std::vector<Tensor> y = interpreter.Run(inputs), exact = interpreter.RunReference(inputs);
  for (int d = 0; d < 4; ++d) {
    EXPECT_EQ(y[0].data()[4 + d], 0);
    float mean = 0;
    for (int j = 0; j < 5; ++j) mean += inputs[2].data()[j * 4 + d] / 5;
    EXPECT_NEAR(y[0].data()[8 + d], mean, 1e-6);
    EXPECT_EQ(y[2].data()[4 + d], 0);  // dq of query 1
  }
  for (int h = 0; h < 2; ++h) EXPECT_EQ(y[1].data()[h * 3 + 1], -kInf);
  for (int o : {2, 3, 4, 5}) {
    for (float value : y[o].values()) EXPECT_TRUE(std::isfinite(value)) << "output " << o;
  }
  for (int64_t i = 0; i < 8; ++i) {  // and the float64 reference agrees
    EXPECT_NEAR(y[0].data()[i], exact[0].data<double>()[i], 1e-6);
  }
}

TEST(AttentionTest, MaskedKeysDoNotMatter) {
  AttentionGraph g(2, 9, 21, 6, {.heads = 1, .scale = 0.4}, Shape{2, 1, 1, 21});
  Random random(9);
  std::vector<Tensor> inputs = AttentionInputs(2, 9, 21, 6, random);
  Tensor mask = Tensor::Zeros({2, 1, 1, 21});
  for (int j = 13; j < 21; ++j) mask.data()[j] = mask.data()[21 + j] = -kInf;
  inputs.push_back(mask);
  std::vector<Tensor> first = Interpreter(g.graph).Run(inputs);
  for (int b = 0; b < 2; ++b) {
    for (int j = 13 * 6; j < 21 * 6; ++j) inputs[1].data()[b * 126 + j] = 100;
  }
  std::vector<Tensor> second = Interpreter(g.graph).Run(inputs);
  for (int o : {0, 2}) {
    EXPECT_EQ(std::memcmp(first[o].raw(), second[o].raw(), first[o].bytes()), 0) << o;
  }
  for (int b = 0; b < 2; ++b) {
    for (int j = 13 * 6; j < 21 * 6; ++j) {
      EXPECT_EQ(second[3].data()[b * 126 + j], 0);
      EXPECT_EQ(second[4].data()[b * 126 + j], 0);
    }
  }
}

TEST(AttentionTest, BlockSizesOnlyChangeRounding) {
  Random random(10);
  std::vector<Tensor> inputs = AttentionInputs(1, 70, 90, 12, random), base;
  for (auto [q, kv] : {std::pair{64, 64}, {1, 1}, {7, 13}, {32, 32}, {128, 128}, {1000, 1000}}) {
    AttentionGraph g(1, 70, 90, 12, {.heads = 2, .scale = 0.4, .block_q = q, .block_kv = kv});
    std::vector<Tensor> y = Interpreter(g.graph).Run(inputs);
    if (base.empty()) base = y;
    for (size_t o = 0; o < y.size(); ++o) {
      for (int64_t i = 0; i < y[o].elements(); ++i) {
        ASSERT_NEAR(y[o].data()[i], base[o].data()[i], 1e-5) << q << " " << kv << " output " << o;
      }
    }
  }
}

TEST(AttentionTest, DropoutKeepsTheExpectationAndFollowsTheSeed) {
  const int64_t keys = 64, seeds = 400;
  AttentionGraph g(1, 4, keys, 4, {.heads = 1, .scale = 0.1, .dropout = 0.25});
  AttentionGraph plain(1, 4, keys, 4, {.heads = 1, .scale = 0.1});
  Random random(12);
  std::vector<Tensor> inputs = AttentionInputs(1, 4, keys, 4, random);
  Tensor expected = Interpreter(plain.graph).Run(inputs)[0];
  inputs.push_back(Tensor::From<int64_t>({1}, {0}));
  std::vector<double> mean(16);
  std::vector<Tensor> outs;
  for (int64_t seed = 0; seed < seeds; ++seed) {
    inputs[4].data<int64_t>()[0] = seed;
    outs.push_back(Interpreter(g.graph).Run(inputs)[0]);
    for (int i = 0; i < 16; ++i) mean[i] += outs.back().data()[i] / double{seeds};
  }
  EXPECT_NE(std::memcmp(outs[0].raw(), outs[1].raw(), 64), 0);
  inputs[4].data<int64_t>()[0] = 0;
  Tensor again = Interpreter(g.graph).Run(inputs)[0];
  EXPECT_EQ(std::memcmp(outs[0].raw(), again.raw(), 64), 0);
  // Deviation of one output: sqrt(p / (1 - p) sum (weight v)^2) ~ sqrt(1/3 / 64) = 0.072; of the
  // mean over 400 seeds 0.0036.
  for (int i = 0; i < 16; ++i) EXPECT_NEAR(mean[i], expected.data()[i], 5 * 0.0045);
}

TEST(AttentionTest, DropoutStreamsDiffer) {
  Random random(13);
  std::vector<Tensor> inputs = AttentionInputs(1, 4, 16, 4, random), outs;
  inputs.push_back(Tensor::From<int64_t>({1}, {3}));
  for (int64_t stream : {0, 1}) {
    AttentionGraph g(1, 4, 16, 4, {.heads = 1, .scale = 0.5, .dropout = 0.5, .stream = stream});
    outs.push_back(Interpreter(g.graph).Run(inputs)[0]);
  }
  EXPECT_NE(std::memcmp(outs[0].raw(), outs[1].raw(), outs[0].bytes()), 0);
}

TEST(AttentionTest, GradientOfMaskEqualsFusedGradientOfTheRest) {
  // With a mask gradient everything goes through the decomposition; dq, dk, dv must not change.
  Random random(14);
  std::vector<Tensor> inputs = AttentionInputs(2, 6, 7, 4, random);
  inputs.push_back(random.NormalTensor({1, 2, 6, 7}));
  AttentionOptions options{.heads = 2, .scale = 0.5};
  AttentionGraph fused(2, 6, 7, 4, options, Shape{1, 2, 6, 7}, false);
  AttentionGraph full(2, 6, 7, 4, options, Shape{1, 2, 6, 7}, true);
  EXPECT_EQ(CountOps(fused.graph, "AttentionGradient"), 1);
  EXPECT_EQ(CountOps(full.graph, "AttentionGradient"), 0);
  std::vector<Tensor> a = Interpreter(fused.graph).Run(inputs);
  std::vector<Tensor> b = Interpreter(full.graph).Run(inputs);
  ASSERT_EQ(b.size(), a.size() + 1);
  for (size_t o = 0; o < a.size(); ++o) {
    for (int64_t i = 0; i < a[o].elements(); ++i) {
      ASSERT_NEAR(a[o].data()[i], b[o].data()[i], 1e-5) << "output " << o;
    }
  }
}

TEST(DecomposedGradientTest, InputsThatDependOnEachOther) {
  // k is computed from q: the partial derivative along q must not include the path through k twice.
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{1, 5, 4}), dout = graph.Input("dout", Shape{1, 5, 4});
  Value mask = graph.Input("mask", Shape{1, 1, 5, 5});
  Value k = x * 2.0f;
  Value y = Attention(x, k, x, {.heads = 1, .scale = 0.3}, mask).out;
  for (bool with_mask : {false, true}) {
    std::vector<Value> wrt = {x};
    if (with_mask) wrt.push_back(mask);
    graph.Output(with_mask ? "decomposed" : "fused",
                 Gradients(std::vector<Value>{y}, std::vector<Value>{dout}, wrt)[0]);
  }
  Random random(15);
  std::vector<Tensor> inputs = {random.NormalTensor({1, 5, 4}), random.NormalTensor({1, 5, 4}),
                                random.NormalTensor({1, 1, 5, 5})};
  std::vector<Tensor> d = Interpreter(graph).RunReference(inputs);
  for (int i = 0; i < 20; ++i) {
    EXPECT_NEAR(d[0].data<double>()[i], d[1].data<double>()[i], 1e-12);
  }
}

// -------------------------------------------------------------------------------------- Philox

TEST(PhiloxTest, KnownAnswersAndUniformity) {
  ComputationGraph graph;
  Value seed = graph.Input("seed", {DType::kI64, Shape{1}});
  graph.Output("y", PhiloxUniform(seed, {100000}, 0));
  graph.Output("z", PhiloxUniform(seed, {4}, 1));
  std::vector<Tensor> y =
      Interpreter(graph).Run(std::vector<Tensor>{Tensor::From<int64_t>({1}, {0})});
  // First word for counter 0 and key 0 of the authors' known-answer table: 6627e8d5.
  EXPECT_EQ(y[0].data()[0], static_cast<float>(0x6627e8d5 >> 8) * 0x1p-24f);
  for (uint32_t i = 0; i < 4; ++i) {
    EXPECT_EQ(y[1].data()[i],
              static_cast<float>(Philox4x32({i, 0, 1, 0}, {0, 0})[0] >> 8) * 0x1p-24f);
  }
  double sum = 0, squares = 0;
  for (float u : y[0].values()) {
    ASSERT_GE(u, 0);
    ASSERT_LT(u, 1);
    sum += u;
    squares += double{u} * u;
  }
  EXPECT_NEAR(sum / 1e5, 0.5, 5 * 0.2887 / std::sqrt(1e5));
  EXPECT_NEAR(squares / 1e5, 1.0 / 3, 5 * 0.2981 / std::sqrt(1e5));
}

// -------------------------------------------------------------------------------------- errors

template <class E, class F>
void ExpectError(F f, const std::vector<std::string>& words) {
  std::string message = MessageOf<E>(f);
  for (const std::string& word : words) EXPECT_THAT(message, testing::HasSubstr(word));
}

TEST(CallErrors, NameTheOpAndAllShapes) {
  ComputationGraph graph;
  auto input = [&](Shape shape) {
    return graph.Input(fmt::format("x{}", graph.inputs().size()), shape);
  };
  Value x = input({2, 8, 6, 6});
  ExpectError<ShapeError>(
      [&] {
        MatMul(input({2, 3}), input({4, 5}));
      },
      {"MatMul", "[2, 3]", "[4, 5]", "3 and 4"});
  ExpectError<ShapeError>(
      [&] {
        MatMul(input({2, 3, 4}), input({3, 4, 5}));
      },
      {"MatMul", "[2, 3, 4]", "[3, 4, 5]", "broadcast"});
  ExpectError<ShapeError>(
      [&] {
        MatMul(input({2, 3}), input({3, 5}), false, false, input({4}));
      },
      {"MatMul", "bias", "[4]", "[5]"});
  ExpectError<ShapeError>([&] { MatMul(input({3}), input({3, 5})); }, {"MatMul", "two axes"});
  ExpectError<ShapeError>(
      [&] {
        Conv2d(x, input({4, 7, 3, 3}), {}, {});
      },
      {"Conv2d", "[2, 8, 6, 6]", "[4, 7, 3, 3]", "8 channels", "expects 7"});
  ExpectError<ShapeError>(
      [&] {
        Conv2d(x, input({4, 8, 9, 3}), {}, Conv2dOptions::Padded(1, 1));
      },
      {"Conv2d", "[4, 8, 9, 3]", "larger"});
  ExpectError<ShapeError>(
      [&] {
        Conv2d(x, input({4, 8, 3, 3}), {}, {.stride = 0});
      },
      {"Conv2d", "stride 0"});
  ExpectError<ShapeError>(
      [&] {
        Conv2d(x, input({4, 8, 3, 3}), input({5}), {});
      },
      {"Conv2d", "bias", "[5]", "[4]"});
  ExpectError<ShapeError>([&] { GroupNorm(x, {}, {}, 3, 1e-5); },
                          {"GroupNorm", "3 groups", "8 channels", "[2, 8, 6, 6]"});
  ExpectError<ShapeError>([&] { GroupNorm(x, input({8}), {}, 4, 1e-5); },
                          {"GroupNorm", "come together"});
  ExpectError<ShapeError>([&] { GroupNorm(x, input({7}), input({8}), 4, 1e-5); },
                          {"GroupNorm", "[7]", "[8]"});
  ExpectError<ShapeError>([&] { LayerNorm(x, input({5}), input({6}), 1e-5); },
                          {"LayerNorm", "[5]", "[6]"});
  Value q = input({2, 5, 12}), k = input({2, 7, 12});
  ExpectError<ShapeError>([&] { Attention(q, k, k, {.heads = 5}); },
                          {"Attention", "5 heads", "[2, 5, 12]"});
  ExpectError<ShapeError>(
      [&] {
        Attention(q, input({3, 7, 12}), input({3, 7, 12}), {.heads = 2});
      },
      {"Attention", "batch of k and v must be 2 or 1"});
  ExpectError<ShapeError>(
      [&] {
        Attention(q, k, input({2, 8, 12}), {.heads = 2});
      },
      {"Attention", "[2, 8, 12]", "differ in batch or tokens"});
  ExpectError<ShapeError>(
      [&] {
        Attention(q, k, k, {.heads = 2}, input({2, 1, 5, 6}));
      },
      {"Attention", "mask [2, 1, 5, 6]", "[2, 2, 5, 7]"});
  ExpectError<ValueError>([&] { Attention(q, k, k, {.heads = 2, .dropout = 0.1}); },
                          {"Attention", "needs a seed"});
  ExpectError<ValueError>([&] { Attention(q, k, k, {.heads = 2, .block_q = 0}); },
                          {"Attention", "block sizes"});
  ExpectError<ShapeError>([&] { PhiloxUniform(q, {3}, 0); }, {"PhiloxUniform", "i64[1]"});
}

}  // namespace
}  // namespace calotype
