// The compiler as a whole: every op and small networks, compiled and eager side by side.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>

#include "core/parallel.h"
#include "core/random.h"
#include "graph/functions.h"
#include "graph/interpreter.h"
#include "graph/op.h"
#include "graph/text.h"
#include "jit/compile.h"
#include "jit/compile_check.h"
#include "jit/lower.h"
#include "jit/plan.h"
#include "jit/runtime/thread_pool.h"
#include "layers/resnet.h"
#include "layers/transformer.h"
#include "optim/optimizer.h"
#include "tests/count_mallocs.h"
#include "tests/op_inputs.h"

namespace calotype::jit {
namespace {

struct Difference {
  bool bits_equal = true;
  double worst = 0;  // largest |x - y| / (largest |y|)
};

Difference Compare(const Tensor& x, const Tensor& y) {
  Difference d;
  d.bits_equal = x.bytes() == 0 || std::memcmp(x.raw(), y.raw(), x.bytes()) == 0;
  if (x.dtype() != DType::kF32) return d;
  double largest = 1e-30, error = 0;
  for (int64_t i = 0; i < x.elements(); ++i) {
    float a = x.data()[i], b = y.data()[i];
    if (std::isnan(a) && std::isnan(b)) continue;
    if (a == b) continue;
    largest = std::max(largest, std::abs(static_cast<double>(b)));
    error = std::max(error, std::abs(static_cast<double>(a) - b));
  }
  for (float b : y.values()) {
    if (std::isfinite(b)) largest = std::max(largest, std::abs(static_cast<double>(b)));
  }
  d.worst = error / largest;
  return d;
}

class OpJitTest : public testing::TestWithParam<const Op*> {};

TEST_P(OpJitTest, CompiledMatchesEager) {
  const Op& op = *GetParam();
  int number = 0;
  for (const OpSample& sample : op.samples()) {
    SCOPED_TRACE(fmt::format("{} sample {}: {} {}", op.name, number, fmt::join(sample.inputs, ", "),
                             sample.attrs.ToString()));
    Random random(99, static_cast<uint64_t>(number++));
    ComputationGraph graph;
    std::vector<Value> inputs;
    for (size_t i = 0; i < sample.inputs.size(); ++i) {
      inputs.push_back(graph.Input(fmt::format("x{}", i), sample.inputs[i]));
    }
    std::vector<Value> outputs = graph.Emit(op, inputs, sample.attrs);
    for (size_t o = 0; o < outputs.size(); ++o) graph.Output(fmt::format("y{}", o), outputs[o]);
    std::vector<Tensor> x = RandomInputs(op, sample, random);
    std::vector<Tensor> eager = Interpreter(graph).Run(x);
    std::unique_ptr<Executable> compiled;
    ASSERT_NO_THROW(compiled = Compile(graph)) << ToText(graph);
    std::vector<Tensor> jit = compiled->Run(x);
    bool exact = op.kind == OpKind::kElementwise || op.kind == OpKind::kView ||
                 op.name == "Gather" || op.name == "Cast" || op.name == "ScatterAdd" ||
                 op.name == "PhiloxUniform" || op.name == "StopGradient" || op.name == "Max";
    for (size_t o = 0; o < eager.size(); ++o) {
      ASSERT_EQ(jit[o].type(), eager[o].type());
      Difference d = Compare(jit[o], eager[o]);
      if (exact) {
        EXPECT_TRUE(d.bits_equal) << "output " << o << " differs by " << d.worst;
      } else {
        EXPECT_LE(d.worst, 2e-5) << "output " << o;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(AllOps, OpJitTest, testing::ValuesIn(AllOps().begin(), AllOps().end()),
                         [](const auto& info) {
                           std::string name(info.param->name);
                           std::replace(name.begin(), name.end(), '.', '_');
                           return name;
                         });

// --------------------------------------------------------------------------- small networks

ParameterPtr MakeParameter(const std::string& name, const Shape& shape, uint64_t seed = 7) {
  return std::make_shared<Parameter>(name, Random(seed, name).UniformTensor(shape, -0.5f, 0.5f));
}

// Compiles and compares with eager; returns the executable.
std::unique_ptr<Executable> ExpectSame(const ComputationGraph& graph,
                                       std::span<const Tensor> inputs, double tolerance) {
  std::vector<Tensor> eager = Interpreter(graph).Run(inputs);
  auto compiled = Compile(graph);
  std::vector<Tensor> jit = compiled->Run(inputs);
  EXPECT_EQ(jit.size(), eager.size());
  for (size_t o = 0; o < eager.size(); ++o) {
    Difference d = Compare(jit[o], eager[o]);
    if (tolerance == 0) {
      EXPECT_TRUE(d.bits_equal) << "output " << o << " differs by " << d.worst;
    }
    EXPECT_LE(d.worst, tolerance) << "output " << o;
  }
  return compiled;
}

std::vector<Tensor> Randoms(const ComputationGraph& graph, uint64_t seed = 5) {
  Random random(seed);
  std::vector<Tensor> inputs;
  for (int32_t input : graph.inputs()) {
    inputs.push_back(random.NormalTensor(graph.node(input).types[0].shape));
  }
  return inputs;
}

// Convolution, bias, time embedding, residual and activation: one kernel.
struct ConvBlock {
  ComputationGraph graph;
  ParameterPtr w = MakeParameter("w", {8, 4, 3, 3}), bias = MakeParameter("bias", {8});
  explicit ConvBlock(int64_t batch = 2) {
    Value x = graph.Input("x", {batch, 4, 6, 6}), temb = graph.Input("temb", {batch, 8});
    Value residual = graph.Input("residual", {batch, 8, 6, 6});
    Value y =
        Conv2d(x, graph.ParameterLeaf(w), graph.ParameterLeaf(bias), Conv2dOptions::Padded(1, 1));
    y = y + Reshape(temb, {batch, 8, 1, 1});
    graph.Output("y", Silu(y + residual));
  }
};

TEST(Fusion, ConvolutionTakesItsWholeEpilogue) {
  ConvBlock block;
  auto compiled = ExpectSame(block.graph, Randoms(block.graph), 1e-5);
  EXPECT_EQ(compiled->Stats().regions, 1);
  EXPECT_EQ(compiled->Stats().prepare_steps, 1) << "the packed weight";
}

TEST(Fusion, ElementwiseChainIsOneLoopWithSeveralOutputs) {
  ComputationGraph graph;
  Value x = graph.Input("x", {3, 5, 7}), y = graph.Input("y", {5, 1});
  Value a = Silu(x) + y, b = Tanh(a) * x, c = Sqrt(Abs(a - b));
  graph.Output("b", b);
  graph.Output("c", c);
  graph.Output("a", a);
  auto compiled = ExpectSame(graph, Randoms(graph), 0);
  EXPECT_EQ(compiled->Stats().steps, 1);
}

TEST(Fusion, CrossesReshapesAndPermutations) {
  ComputationGraph graph;
  Value x = graph.Input("x", {2, 6, 4, 5});
  Value tokens = Permute(Reshape(Exp(x), {2, 6, 20}), {0, 2, 1});
  Value gamma = graph.Input("gamma", {6});
  graph.Output("y", Relu(tokens * gamma - 0.5f));
  EXPECT_EQ(ExpectSame(graph, Randoms(graph), 0)->Stats().steps, 1);
}

TEST(Fusion, ReductionsComputeTheirElementwiseInput) {
  ComputationGraph graph;
  Value x = graph.Input("x", {9, 33});
  Value mean = Mean(x, {1}, true);
  graph.Output("rstd", Rsqrt(Mean(Square(x - mean), {1}, true) + 1e-5f));
  EXPECT_EQ(ExpectSame(graph, Randoms(graph), 1e-5)->Stats().steps, 2);
}

// A part of the summed value is another element of it than the one at hand.
TEST(Fusion, ReductionsReadPartsOfTheirInput) {
  for (int part = 0; part < 2; ++part) {
    ComputationGraph graph;
    Value y = Exp(graph.Input("x", {6, 5}));
    Value first = part == 0 ? Slice(y, 1, 0, 1) : Broadcast(Slice(y, 1, 0, 1), {6, 5});
    graph.Output("sum", Sum(y * first, {1}, false));
    ExpectSame(graph, Randoms(graph), 1e-6);
  }
}

TEST(Fusion, NeverMakesACycle) {
  // `a` and `c` could share a loop but for the product between them.
  ComputationGraph graph;
  Value x = graph.Input("x", {8, 8});
  Value a = Exp(x * 0.1f), b = MatMul(a, a), c = a + b;
  Value d = MatMul(c, a) * a + c;
  graph.Output("d", d);
  ExpectSame(graph, Randoms(graph), 1e-5);
}

TEST(Fusion, OffGivesTheSameBits) {
  ComputationGraph graph;
  Value x = graph.Input("x", {4, 6, 5}), y = graph.Input("y", {6, 1});
  Value z = Gelu(x + y) * Permute(Reshape(Sigmoid(x), {4, 5, 6}), {0, 2, 1});
  graph.Output("z", z - Maximum(x, y));
  std::vector<Tensor> inputs = Randoms(graph);
  auto fused = Compile(graph), plain = Compile(graph, {.fuse = false});
  EXPECT_GT(plain->Stats().steps, fused->Stats().steps);
  EXPECT_TRUE(Compare(fused->Run(inputs)[0], plain->Run(inputs)[0]).bits_equal);
}

TEST(Views, TokensOfAPictureAreFree) {
  // [B, C, H, W] -> [B, H W, C] -> linear -> back, between convolutions: no kernel moves elements
  // but those that make and fill the padded copy of the input.
  ComputationGraph graph;
  Value x = graph.Input("x", {2, 3, 4, 4});
  Value w = graph.ParameterLeaf(MakeParameter("w", {8, 3, 3, 3}));
  Value y = Conv2d(x, w, {}, Conv2dOptions::Padded(1, 1));
  Value tokens = Permute(Reshape(y, {2, 8, 16}), {0, 2, 1});
  tokens = MatMul(tokens, graph.ParameterLeaf(MakeParameter("p", {8, 8})), false, true);
  Value back = Reshape(Permute(tokens, {0, 2, 1}), {2, 8, 4, 4}) + y;
  Value v = graph.ParameterLeaf(MakeParameter("v", {5, 8, 1, 1}));
  graph.Output("y", Conv2d(back, v, {}, {}));
  auto compiled = ExpectSame(graph, Randoms(graph), 1e-5);
  EXPECT_EQ(compiled->Stats().conversions, 3) << "the three packed weights";
  EXPECT_EQ(compiled->Stats().prepare_steps, 3);
  EXPECT_EQ(compiled->Stats().copies, 1) << "of x; borders are cleared once";
}

TEST(Convolution, OfAnEnlargedPictureReadsTheSmallOne) {
  ComputationGraph graph;
  Value x = graph.Input("x", {2, 5, 3, 4});
  Value w = graph.ParameterLeaf(MakeParameter("w", {6, 5, 3, 3}));
  Value bias = graph.ParameterLeaf(MakeParameter("bias", {6}));
  graph.Output("y", Conv2d(ResizeNearest(x, 6, 8), w, bias, Conv2dOptions::Padded(1, 1)));
  graph.Output("corner", Conv2d(ResizeNearest(x, 6, 8), w, {}, {1, 0, 1, 0, 1}));
  auto compiled = ExpectSame(graph, Randoms(graph), 1e-5);
  EXPECT_GE(compiled->Stats().regions, 5) << "four parities of the first, one of the second";
}

double RelativeRootMeanSquareError(const Tensor& x, const Tensor& reference) {
  double error = 0, size = 0;
  for (int64_t i = 0; i < x.elements(); ++i) {
    double r = reference.data<double>()[i], d = x.data()[i] - r;
    error += d * d;
    size += r * r;
  }
  return std::sqrt(error / size);
}

// Sides are even, channels and pixels many: Winograd's convolution, here and in the gradient of the
// input, with tiles of 4x4 or 2x2 pixels. Its error may be up to twice that of the direct sum,
// whose own is about 2e-7 to 5e-7.
TEST(Convolution, WinogradMatchesFloat64) {
  struct Case {
    int64_t batch, in, out, height, width;
    Conv2dOptions options;
  };
  const std::vector<Case> cases = {{2, 24, 32, 12, 16, Conv2dOptions::Padded(1, 1)},
                                   {1, 33, 25, 16, 16, Conv2dOptions::Padded(1, 1)},
                                   {4, 40, 24, 10, 10, {1, 0, 0, 0, 0}},
                                   {5, 64, 48, 4, 20, {1, 2, 0, 0, 2}},
                                   {2, 40, 64, 14, 10, Conv2dOptions::Padded(1, 1)},
                                   {1, 96, 96, 8, 8, Conv2dOptions::Padded(1, 1)},
                                   // Large enough for pictures channels-first to be turned.
                                   {2, 40, 72, 16, 28, Conv2dOptions::Padded(1, 1)}};
  for (const Case& c : cases) {
    SCOPED_TRACE(fmt::format("batch {} channels {} -> {} size {} x {}", c.batch, c.in, c.out,
                             c.height, c.width));
    ComputationGraph graph;
    Value x = graph.Input("x", {c.batch, c.in, c.height, c.width});
    Value temb = graph.Input("temb", {c.batch, c.out, 1, 1});
    Value w = graph.ParameterLeaf(MakeParameter("w", {c.out, c.in, 3, 3}));
    Value bias = graph.ParameterLeaf(MakeParameter("bias", {c.out}));
    Value bare = Conv2d(x, w, bias, c.options);
    Value residual = graph.Input("residual", bare.shape());
    Value y = bare + temb + residual;
    Value dy = graph.Input("dy", y.shape());
    graph.Output("y", y);
    std::vector<Value> outputs = {y}, cotangents = {dy}, wrt = {x, w};
    std::vector<Value> gradients = Gradients(outputs, cotangents, wrt);
    graph.Output("dx", gradients[0]);
    graph.Output("dw", gradients[1]);
    std::vector<Tensor> inputs = Randoms(graph);
    auto winograd = Compile(graph), direct = Compile(graph, {.winograd_bytes = 0});
    EXPECT_GT(winograd->Stats().steps, direct->Stats().steps);
    if (y.shape().elements() > 60000) {
      EXPECT_GE(winograd->Stats().conversions, 5) << "w in both ways, residual, y and dx turned";
    }
    std::vector<Tensor> a = winograd->Run(inputs), b = direct->Run(inputs);
    std::vector<Tensor> reference = Interpreter(graph).RunReference(inputs);
    for (size_t o = 0; o < a.size(); ++o) {
      double own = RelativeRootMeanSquareError(a[o], reference[o]);
      EXPECT_LE(own, 1e-6) << "output " << o;
      EXPECT_LE(own, 3 * RelativeRootMeanSquareError(b[o], reference[o])) << "output " << o;
    }
  }
}

// Its turned copy has no place for the batch.
TEST(Convolution, AnEpilogueOperandThatTheBatchSharesIsTurned) {
  ComputationGraph graph;
  Value x = graph.Input("x", {2, 40, 16, 28});
  Value w = graph.ParameterLeaf(MakeParameter("w", {72, 40, 3, 3}));
  Value bias = graph.ParameterLeaf(MakeParameter("bias", {72}));
  Value shared = graph.Input("shared", {1, 72, 16, 28});
  graph.Output("y", Conv2d(x, w, bias, Conv2dOptions::Padded(1, 1)) + shared);
  std::vector<Tensor> inputs = Randoms(graph);
  Tensor reference = Interpreter(graph).RunReference(inputs)[0];
  for (int64_t winograd_bytes : {int64_t{0}, int64_t{1} << 30}) {
    SCOPED_TRACE(winograd_bytes);
    auto compiled = Compile(graph, {.winograd_bytes = winograd_bytes});
    EXPECT_GE(compiled->Stats().conversions, 2) << "shared and y turned";
    EXPECT_LE(RelativeRootMeanSquareError(compiled->Run(inputs)[0], reference), 1e-6);
  }
}

// A head too wide for the cache next to the core: two groups of queries share packed keys.
TEST(Attention, WideHeadsInGroupsOfQueriesThatShareKeys) {
  ComputationGraph graph;
  Value q = graph.Input("q", {1, 4100, 384}), k = graph.Input("k", {1, 130, 384}),
        v = graph.Input("v", {1, 130, 384});
  graph.Output("y", Attention(q, k, v, {.heads = 1, .scale = 0.05}).out);
  ExpectSame(graph, Randoms(graph), 1e-5);
}

// Keys beyond the cache: several groups of queries for each block of packed keys, and a last unit
// with fewer groups and queries.
TEST(Attention, OverManyKeys) {
  for (bool causal : {false, true}) {
    const int64_t heads = 4, queries = 1130, keys = causal ? queries : 810;
    ComputationGraph graph;
    Value q = graph.Input("q", {1, queries, heads * 24});
    Value k = graph.Input("k", {1, keys, heads * 24});
    Value v = graph.Input("v", {1, keys, heads * 28});
    AttentionResult result = Attention(q, k, v, {.heads = heads, .scale = 0.2, .causal = causal});
    graph.Output("out", result.out);
    graph.Output("lse", result.lse);
    std::vector<Tensor> inputs = Randoms(graph), compiled = Compile(graph)->Run(inputs);
    std::vector<Tensor> reference = Interpreter(graph).RunReference(inputs);
    for (size_t o = 0; o < compiled.size(); ++o) {
      EXPECT_LE(Compare(compiled[o], reference[o].To(DType::kF32)).worst, 2e-6) << "output " << o;
    }
  }
}

// One head: the queries are cut into parts that give work to several threads.
TEST(Attention, GradientOfOneHeadInParts) {
  ComputationGraph graph;
  Value q = graph.Input("q", {1, 530, 24}), k = graph.Input("k", {1, 150, 24});
  Value v = graph.Input("v", {1, 150, 20}), dout = graph.Input("dout", {1, 530, 20});
  Value out = Attention(q, k, v, {.scale = 0.2}).out;
  std::vector<Value> gradients = Gradients({{out}}, {{dout}}, {{q, k, v}});
  for (size_t i = 0; i < 3; ++i) graph.Output(fmt::format("d{}", i), gradients[i]);
  std::vector<Tensor> inputs = Randoms(graph), reference = Interpreter(graph).RunReference(inputs);
  auto compiled = Compile(graph);
  EXPECT_EQ(compiled->Stats().steps, 4);  // forward, gradient, the sums of two
  int threads = Threads();
  SetThreads(1);
  std::vector<Tensor> one = compiled->Run(inputs);
  SetThreads(3);
  std::vector<Tensor> three = compiled->Run(inputs);
  SetThreads(threads);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(Compare(one[i], three[i]).bits_equal) << "output " << i;
    EXPECT_LE(Compare(one[i], reference[i].To(DType::kF32)).worst, 4e-6) << "output " << i;
  }
}

TEST(Views, ConcatenationIsWrittenInPlace) {
  ComputationGraph graph;
  Value x = graph.Input("x", {2, 4, 5, 5});
  Value a = Silu(x), b = Exp(x * 0.3f);
  graph.Output("y", Concat({a, b}, 1));
  auto compiled = ExpectSame(graph, Randoms(graph), 0);
  EXPECT_EQ(compiled->Stats().copies, 0);
}

TEST(Outputs, OfEveryKind) {
  ComputationGraph graph;
  ParameterPtr p = MakeParameter("p", {2, 3});
  Value x = graph.Input("x", {2, 3});
  Value i = graph.Input("i", TensorType{DType::kI64, {4}});
  Value y = x + 1.0f;
  graph.Output("input", x);
  graph.Output("view", Permute(x, {1, 0}));
  graph.Output("parameter", graph.ParameterLeaf(p));
  graph.Output("constant", graph.Constant(Tensor::Full({3}, 2.5f)));
  graph.Output("indices", Reshape(i, {2, 2}));
  graph.Output("y", y);
  graph.Output("same y", Reshape(y, {3, 2}));
  graph.Output("turned y", Permute(y, {1, 0}));
  graph.Output("none", Slice(x, 0, 0, 0));
  Tensor indices = Tensor::From({4}, std::vector<int64_t>{7, -3, int64_t{1} << 40, 0});
  ExpectSame(graph, std::vector<Tensor>{Random(1).NormalTensor({2, 3}), indices}, 0);
}

TEST(Run, AllocatesNothing) {
  ConvBlock block(4);
  auto compiled = Compile(block.graph);
  std::vector<Tensor> inputs = Randoms(block.graph);
  std::vector<Tensor> outputs = compiled->Run(inputs);
  int64_t storage = MemoryStats::Allocations(), mallocs = g_mallocs;
  for (int i = 0; i < 10; ++i) compiled->Run(inputs, outputs);
  EXPECT_EQ(g_mallocs, mallocs);
  EXPECT_EQ(MemoryStats::Allocations(), storage);
}

TEST(Run, SeesNewWeights) {
  ConvBlock block;
  auto compiled = Compile(block.graph);
  std::vector<Tensor> inputs = Randoms(block.graph);
  std::vector<Tensor> before = compiled->Run(inputs);
  EXPECT_EQ(compiled->Stats().repacks, 1);
  compiled->Run(inputs);
  EXPECT_EQ(compiled->Stats().repacks, 1);
  for (float& w : block.w->Write().values()) w *= 0.5f;
  for (float& b : block.bias->Write().values()) b += 1;
  std::vector<Tensor> after = compiled->Run(inputs);
  EXPECT_EQ(compiled->Stats().repacks, 2);
  EXPECT_LE(Compare(after[0], Interpreter(block.graph).Run(inputs)[0]).worst, 1e-5);
  EXPECT_GT(Compare(after[0], before[0]).worst, 0.01);
}

// A resnet and a transformer, as in the U-Net.
struct Network {
  nn::ResnetBlock2D resnet{[] {
    nn::ResnetBlock2D::Options options;
    options.in_channels = 8;
    options.out_channels = 16;
    options.temb_channels = 12;
    options.groups = 4;
    return options;
  }()};
  nn::Transformer2DModel transformer{[] {
    nn::Transformer2DModel::Options options;
    options.num_attention_heads = 2;
    options.attention_head_dim = 8;
    options.in_channels = 16;
    options.norm_num_groups = 4;
    options.cross_attention_dim = 10;
    return options;
  }()};
  ComputationGraph graph;
  Value y;

  explicit Network(int64_t batch = 3) {
    resnet.Initialize(1);
    transformer.Initialize(2);
    Value x = graph.Input("x", {batch, 8, 6, 6}), time = graph.Input("time", {batch, 12});
    Value context = graph.Input("context", {batch, 5, 10});
    y = transformer.Call({resnet.Call({x, time}), context});
    graph.Output("y", y);
  }
};

TEST(Run, NetworkMatchesEagerAndFloat64) {
  Network network;
  std::vector<Tensor> inputs = Randoms(network.graph);
  auto compiled = ExpectSame(network.graph, inputs, 1e-5);
  Tensor reference = Interpreter(network.graph).RunReference(inputs)[0].To(DType::kF32);
  EXPECT_LE(Compare(compiled->Run(inputs)[0], reference).worst, 1e-5);
}

TEST(Run, NothingIsBakedIn) {
  Network network;
  auto compiled = Compile(network.graph);
  std::vector<Tensor> inputs = Randoms(network.graph);
  Tensor first = compiled->Run(inputs)[0];
  for (size_t i = 0; i < inputs.size(); ++i) {
    std::vector<Tensor> changed = inputs;
    changed[i] = Random(77).NormalTensor(inputs[i].shape());
    Tensor y = compiled->Run(changed)[0];
    EXPECT_GT(Compare(y, first).worst, 1e-3) << "input " << i;
    EXPECT_LE(Compare(y, Interpreter(network.graph).Run(changed)[0]).worst, 1e-5) << "input " << i;
  }
}

TEST(Run, SameBitsOnOneAndTwoThreads) {
  Network network(8);
  auto compiled = Compile(network.graph);
  std::vector<Tensor> inputs = Randoms(network.graph);
  int threads = Threads();
  SetThreads(1);
  Tensor one = compiled->Run(inputs)[0];
  SetThreads(2);
  Tensor two = compiled->Run(inputs)[0];
  SetThreads(threads);
  EXPECT_TRUE(Compare(one, two).bits_equal);
}

TEST(Run, SeveralThreadsShareOneExecutable) {
  Network network;
  auto compiled = Compile(network.graph);
  std::vector<Tensor> inputs = Randoms(network.graph), expected = compiled->Run(inputs);
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 10; ++i) {
        wrong += !Compare(compiled->Run(inputs)[0], expected[0]).bits_equal;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(compiled->Stats().runs, 41);
}

// ------------------------------------------------------------------------------- rare inputs

TEST(RareInputs, WhatDependsOnThemAloneRunsOncePerValue) {
  Network network;
  auto plain = Compile(network.graph);
  auto split = Compile(network.graph, {.rare_inputs = {"context"}});
  // The keys and values of the transformer's cross-attention.
  EXPECT_GE(split->Stats().derive_steps, 2);
  EXPECT_EQ(split->Stats().steps + split->Stats().derive_steps, plain->Stats().steps);
  EXPECT_EQ(plain->Stats().derive_steps, 0);
  std::vector<Tensor> inputs = Randoms(network.graph);
  auto expect_same_bits = [&] {
    Tensor y = split->Run(inputs)[0];
    EXPECT_TRUE(Compare(y, plain->Run(inputs)[0]).bits_equal);
    return y;
  };
  Tensor first;
  for (uint64_t step = 0; step < 25; ++step) {
    inputs[0] = Random(step).NormalTensor(inputs[0].shape());
    inputs[1] = Random(100 + step).NormalTensor(inputs[1].shape());
    first = expect_same_bits();
  }
  EXPECT_EQ(split->Stats().derivations, 1);

  // A new context in the same memory.
  std::vector<Tensor> outputs = {Tensor(first.type())};
  inputs[2].CopyFrom(Random(7).NormalTensor(inputs[2].shape()));
  Tensor second = expect_same_bits();
  EXPECT_EQ(split->Stats().derivations, 2);
  EXPECT_GT(Compare(second, first).worst, 1e-3);
  EXPECT_LE(Compare(second, Interpreter(network.graph).Run(inputs)[0]).worst, 1e-5);
  // The same context in other memory.
  inputs[2] = inputs[2].Clone();
  expect_same_bits();
  EXPECT_EQ(split->Stats().derivations, 2);
  // New weights.
  for (const ParameterPtr& p : network.transformer.NamedParameters()) {
    for (float& w : p->Write().values()) w *= 0.5f;
  }
  Tensor third = expect_same_bits();
  EXPECT_EQ(split->Stats().derivations, 3);
  EXPECT_GT(Compare(third, second).worst, 1e-3);

  int64_t storage = MemoryStats::Allocations(), mallocs = g_mallocs;
  for (int i = 0; i < 10; ++i) split->Run(inputs, outputs);
  EXPECT_EQ(g_mallocs, mallocs);
  EXPECT_EQ(MemoryStats::Allocations(), storage);
}

TEST(RareInputs, MayDifferBetweenThreads) {
  Network network;
  auto split = Compile(network.graph, {.check = true, .rare_inputs = {"context", "time"}});
  std::vector<std::vector<Tensor>> inputs, expected;
  for (uint64_t t = 0; t < 3; ++t) {
    inputs.push_back(Randoms(network.graph, 40 + t));
    expected.push_back(Compile(network.graph)->Run(inputs.back()));
  }
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (size_t t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 10; ++i) {
        wrong += !Compare(split->Run(inputs[t])[0], expected[t][0]).bits_equal;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GE(split->Stats().derivations, 3);
}

// ---------------------------------------------------------------------------------- updates

// Fits the network to a target; the parameters of two equal networks are trained side by side.
std::vector<ParameterPtr> AddTraining(Network& network, const Optimizer::Rule& rule,
                                      std::unique_ptr<Optimizer>& optimizer, double clip) {
  std::vector<ParameterPtr> parameters = network.resnet.NamedParameters();
  for (const ParameterPtr& p : network.transformer.NamedParameters()) parameters.push_back(p);
  for (size_t i = 0; i < parameters.size(); ++i) {
    parameters[i]->set_name(fmt::format("{}.{}", i, parameters[i]->name()));
  }
  ComputationGraph& graph = network.graph;
  Value target = graph.Input("target", network.y.shape());
  Value loss = MeanSquaredError(network.y, target);
  graph.Output("loss", loss);
  std::vector<Value> leaves;
  for (const ParameterPtr& p : parameters) leaves.push_back(graph.ParameterLeaf(p));
  std::vector<Value> outputs = {loss}, one = {Value{}};
  optimizer = std::make_unique<Optimizer>(rule, parameters, clip);
  optimizer->ExportUpdates(graph, Gradients(outputs, one, leaves));
  for (const ParameterPtr& p : optimizer->state()) parameters.push_back(p);
  return parameters;
}

void ExpectTrainingMatchesEager(const Optimizer::Rule& rule, double clip) {
  Network eager_network, jit_network;
  std::unique_ptr<Optimizer> eager_optimizer, jit_optimizer;
  auto eager_parameters = AddTraining(eager_network, rule, eager_optimizer, clip);
  auto jit_parameters = AddTraining(jit_network, rule, jit_optimizer, clip);
  Interpreter eager(eager_network.graph);
  auto compiled = Compile(jit_network.graph);
  EXPECT_EQ(compiled->Stats().prepare_steps, 0) << "parameters change with every call";
  for (int step = 1; step <= 3; ++step) {
    std::vector<Tensor> inputs = Randoms(jit_network.graph, 100 + step);
    inputs.resize(4);
    for (const Tensor& x : jit_optimizer->Inputs(step, 0.01)) inputs.push_back(x);
    std::vector<Tensor> a = eager.Run(inputs), b = compiled->Run(inputs);
    EXPECT_NEAR(a[1].Item(), b[1].Item(), 1e-4 * a[1].Item()) << "loss of step " << step;
  }
  for (size_t i = 0; i < jit_parameters.size(); ++i) {
    EXPECT_EQ(jit_parameters[i]->version(), eager_parameters[i]->version());
    EXPECT_LE(Compare(jit_parameters[i]->value(), eager_parameters[i]->value()).worst, 2e-3)
        << jit_parameters[i]->name();
  }
}

TEST(Updates, ClippedMomentumMatchesEager) {
  ExpectTrainingMatchesEager(Sgd{.momentum = 0.9, .nesterov = true}, 1);
}

TEST(Updates, AdamOfOneStepHasTheBitsOfEager) {
  // The rule alone is elementwise, so whatever the order of its kernels, the bits agree.
  auto build = [](ComputationGraph& graph, std::unique_ptr<Optimizer>& optimizer) {
    std::vector<ParameterPtr> parameters = {MakeParameter("a", {17, 5}), MakeParameter("b", {33})};
    std::vector<Value> gradients = {graph.Input("da", {17, 5}), graph.Input("db", {33})};
    optimizer = std::make_unique<Optimizer>(AdamW{}, parameters, 0);
    auto step = optimizer->ExportUpdates(graph, gradients);
    graph.Output("finite", step.finite);
    for (const ParameterPtr& p : optimizer->state()) parameters.push_back(p);
    return parameters;
  };
  ComputationGraph eager_graph, jit_graph;
  std::unique_ptr<Optimizer> eager_optimizer, jit_optimizer;
  auto eager_parameters = build(eager_graph, eager_optimizer);
  auto jit_parameters = build(jit_graph, jit_optimizer);
  auto compiled = Compile(jit_graph);
  EXPECT_EQ(compiled->Stats().copies, 0) << "new values are written into the parameters";
  for (int step = 1; step <= 3; ++step) {
    std::vector<Tensor> inputs = {Random(step).NormalTensor({17, 5}),
                                  Random(step).NormalTensor({33})};
    for (const Tensor& x : jit_optimizer->Inputs(step, 0.01)) inputs.push_back(x);
    Interpreter(eager_graph).Run(inputs);
    compiled->Run(inputs);
  }
  for (size_t i = 0; i < jit_parameters.size(); ++i) {
    EXPECT_TRUE(Compare(jit_parameters[i]->value(), eager_parameters[i]->value()).bits_equal);
  }
}

TEST(Updates, ReadOldValuesEverywhere) {
  // A swap, an update whose old value an output shows, and one whose old value a later kernel
  // needs.
  auto build = [](ComputationGraph& graph) {
    std::vector<ParameterPtr> p;
    for (const char* name : {"a", "b", "c", "d"}) p.push_back(MakeParameter(name, {6, 6}));
    Value x = graph.Input("x", {6, 6});
    std::vector<Value> v;
    for (const ParameterPtr& parameter : p) v.push_back(graph.ParameterLeaf(parameter));
    graph.Update(v[0], v[1]);
    graph.Update(v[1], Permute(v[0], {1, 0}));
    Value c = v[2] * 0.5f + x;
    graph.Update(v[2], c);
    graph.Output("old c", v[2]);
    graph.Update(v[3], Permute(v[3], {1, 0}) - x);
    graph.Output("product", MatMul(MatMul(c, x), v[2]) + v[3]);
    return p;
  };
  ComputationGraph eager_graph, jit_graph;
  auto eager = build(eager_graph), jit = build(jit_graph);
  auto compiled = Compile(jit_graph);
  std::vector<Tensor> inputs = Randoms(jit_graph);
  for (int step = 0; step < 2; ++step) {
    std::vector<Tensor> a = Interpreter(eager_graph).Run(inputs), b = compiled->Run(inputs);
    for (size_t o = 0; o < a.size(); ++o) EXPECT_LE(Compare(b[o], a[o]).worst, 1e-5);
  }
  for (size_t i = 0; i < jit.size(); ++i) {
    EXPECT_TRUE(Compare(jit[i]->value(), eager[i]->value()).bits_equal) << jit[i]->name();
  }
}

// ----------------------------------------------------------------------------------- errors

template <class E, class F>
void ExpectError(F f, const std::string& text) {
  try {
    f();
    ADD_FAILURE() << "no error; expected one with: " << text;
  } catch (const E& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr(text));
  }
}

TEST(Errors, BadArgumentsAreNamed) {
  ConvBlock block;
  auto compiled = Compile(block.graph);
  std::vector<Tensor> good = Randoms(block.graph);
  auto with = [&](size_t i, Tensor x) {
    std::vector<Tensor> inputs = good;
    inputs[i] = x;
    return inputs;
  };
  ExpectError<ShapeError>(
      [&] {
        compiled->Run(with(0, Tensor::Zeros({2, 3, 6, 6})));
      },
      "input \"x\" is f32[2, 3, 6, 6], expects f32[2, 4, 6, 6]");
  ExpectError<ShapeError>([&] { compiled->Run(with(1, Tensor::Zeros({2, 8, 1}))); }, "\"temb\"");
  ExpectError<ShapeError>(
      [&] {
        compiled->Run(with(1, Tensor::Zeros({2, 8}, DType::kI32)));
      },
      "is i32[2, 8]");
  ExpectError<ShapeError>([&] { compiled->Run(with(2, Tensor())); }, "\"residual\" is undefined");
  ExpectError<ShapeError>([&] { compiled->Run(std::span(good).first(2)); },
                          "2 inputs given, 3 declared");
  std::vector<Tensor> outputs = {Tensor({2, 8, 6, 5})};
  ExpectError<ShapeError>([&] { compiled->Run(good, outputs); }, "output \"y\"");
  outputs = {good[2]};
  ExpectError<ValueError>([&] { compiled->Run(good, outputs); }, "overlaps input \"residual\"");
}

TEST(Errors, IndexOutOfRangeWritesNothing) {
  ComputationGraph graph;
  ParameterPtr table = MakeParameter("table", {5, 3});
  Value indices = graph.Input("tokens", TensorType{DType::kI64, {4}});
  Value rows = Gather(graph.ParameterLeaf(table), indices);
  graph.Update(graph.ParameterLeaf(table), ScatterAdd(rows, indices, 0, 5));
  graph.Output("rows", rows);
  auto compiled = Compile(graph);
  Tensor before = table->value().Clone();
  for (int64_t bad : {int64_t{5}, int64_t{-1}, int64_t{1} << 40}) {
    std::vector<Tensor> inputs = {Tensor::From({4}, std::vector<int64_t>{0, 4, bad, 1})};
    ExpectError<ValueError>([&] { compiled->Run(inputs); },
                            fmt::format("index {} at position 2 is not in [0, 5)", bad));
  }
  EXPECT_TRUE(Compare(table->value(), before).bits_equal);
  EXPECT_EQ(table->version(), 0u);
  std::vector<Tensor> inputs = {Tensor::From({4}, std::vector<int64_t>{0, 4, 4, 1})};
  compiled->Run(inputs);
  EXPECT_EQ(table->version(), 1u);
}

TEST(Errors, RareInputsMustBeInputs) {
  Network network;
  ExpectError<ValueError>([&] { Compile(network.graph, {.rare_inputs = {"prompt"}}); },
                          "\"prompt\" is none of the inputs (x, time, context)");
}

TEST(Errors, NodeWithoutKernelIsNamed) {
  ComputationGraph graph;
  ComputationGraph::Label label(graph, "model.lookup");
  Value table = graph.Input("table", TensorType{DType::kI64, {9}});
  Value first = Gather(table, graph.Input("i", TensorType{DType::kI64, {4}}));
  graph.Output("y", Gather(graph.Input("x", {5, 3}), first));
  ExpectError<UnsupportedError>([&] { Compile(graph); }, "model.lookup");
}

// ------------------------------------------------------------------------------ diagnostics

TEST(CheckMode, PassesAndNamesTheFirstWrongStep) {
  Network network;
  std::vector<Tensor> inputs = Randoms(network.graph);
  auto checked = Compile(network.graph, {.check = true});
  EXPECT_NO_THROW(checked->Run(inputs));

  ComputationGraph graph;
  ComputationGraph::Label label(graph, "block.act");
  graph.Output("y", Exp(graph.Input("x", {4})));
  auto program = std::make_shared<LoweredProgram>(Lower(graph));
  PlanMemory(*program);
  std::vector<Tensor> x = {Random(1).NormalTensor({4})};
  Tensor right = Interpreter(graph).Run(x)[0], wrong = right.Clone();
  wrong.data()[2] += 0.5f;
  for (bool good : {true, false}) {
    std::vector<void*> addresses;
    for (const Buffer& buffer : program->buffers) {
      Tensor& output = good ? right : wrong;
      addresses.push_back(buffer.storage == Storage::kOutput ? output.raw() : x[0].raw());
    }
    auto run = [&] { MakeChecker(program)(x)->AfterStep(StepChecker::kRun, 0, addresses); };
    if (good) {
      EXPECT_NO_THROW(run());
    } else {
      ExpectError<NumericError>(run, "step \"block.act: Exp\"");
      ExpectError<NumericError>(run, "element 2");
    }
  }
}

TEST(Plan, LiveBuffersDoNotOverlap) {
  Network network;
  std::unique_ptr<Optimizer> optimizer;
  AddTraining(network, AdamW{}, optimizer, 1);
  LoweredProgram program = Lower(network.graph);
  MemoryPlan plan = PlanMemory(program);
  EXPECT_GE(plan.arena_bytes, plan.max_live_bytes);
  EXPECT_LE(plan.arena_bytes, plan.max_live_bytes * 5 / 4);
  std::vector<int> first(program.buffers.size(), -1), last(program.buffers.size(), -1);
  for (size_t s = 0; s < program.steps.size(); ++s) {
    for (int b : program.steps[s].buffers) {
      if (first[b] < 0) first[b] = static_cast<int>(s);
      last[b] = static_cast<int>(s);
    }
  }
  int64_t pairs = 0;
  for (size_t a = 0; a < program.buffers.size(); ++a) {
    for (size_t b = a + 1; b < program.buffers.size(); ++b) {
      const Buffer &x = program.buffers[a], &y = program.buffers[b];
      if (x.storage != Storage::kArena || y.storage != Storage::kArena) continue;
      if (first[a] < 0 || first[b] < 0 || last[a] < first[b] || last[b] < first[a]) continue;
      ++pairs;
      int64_t x_end = x.offset + x.elements * 4, y_end = y.offset + y.elements * 4;
      EXPECT_TRUE(x_end <= y.offset || y_end <= x.offset) << x.label << " and " << y.label;
      EXPECT_EQ(x.offset % 64, 0);
      EXPECT_LE(x_end, plan.arena_bytes);
    }
  }
  EXPECT_GT(pairs, 100);
}

TEST(CompiledFunction, SpecialisesAndForgets) {
  auto build = [](std::span<const TensorType> types) {
    ComputationGraph graph;
    Value x = graph.Input("x", types[0]);
    Check<ShapeError>(x.rank() == 2 && x.dim(1) == 3, "model: input is {}, expects [batch, 3]",
                      types[0]);
    graph.Output("y", Sum(x, {1}));
    return graph;
  };
  CompiledFunction function(build, {}, 2);
  auto run = [&](Shape shape) { return function.Run(std::vector<Tensor>{Tensor::Full(shape, 2)}); };
  EXPECT_EQ(run({4, 3})[0].shape(), Shape({4}));
  EXPECT_EQ(run({4, 3})[0].data()[3], 6);
  run({5, 3});
  EXPECT_EQ(function.stats().compiled, 2);
  run({4, 3});
  run({6, 3});  // evicts the batch of 5, the least recently used
  EXPECT_EQ(function.stats().evicted, 1);
  run({4, 3});
  EXPECT_EQ(function.stats().compiled, 3);
  EXPECT_EQ(function.stats().alive, 2);
  ExpectError<ShapeError>([&] { run({4, 2}); }, "expects [batch, 3]");
  ExpectError<ShapeError>([&] { run({3}); }, "expects [batch, 3]");
}

// Several callers at once, loops inside loops, more threads than processors.
TEST(ThreadPool, RunsEachChunkOnce) {
  struct Loop {
    std::vector<std::atomic<int>> hits;
    std::atomic<int> inner{0};
  };
  const int threads = Threads();
  SetThreads(3);
  std::atomic<int> wrong{0};
  auto call = [&wrong](int first) {
    for (int k = 0; k < 2000; ++k) {
      Loop loop{std::vector<std::atomic<int>>((first + k) % 37)};
      RunChunks(
          static_cast<int64_t>(loop.hits.size()),
          [](void* p, int64_t chunk) {
            auto& l = *static_cast<Loop*>(p);
            ++l.hits[chunk];
            RunChunks(
                2, [](void* q, int64_t) { ++*static_cast<std::atomic<int>*>(q); }, &l.inner);
          },
          &loop);
      for (std::atomic<int>& hits : loop.hits) wrong += hits != 1;
      wrong += loop.inner != 2 * static_cast<int>(loop.hits.size());
    }
  };
  std::vector<std::thread> callers;
  for (int c = 0; c < 3; ++c) callers.emplace_back(call, 11 * c);
  for (std::thread& caller : callers) caller.join();
  SetThreads(threads);
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace calotype::jit
