// What Compile can be asked for besides the plain code: choices by measuring, weights released
// after packing; two passes over whole programs: chains of row-wise steps, pictures turned in
// blocks; and what is refused, leaving everything as it was.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "core/random.h"
#include "graph/functions.h"
#include "graph/interpreter.h"
#include "graph/op.h"
#include "jit/compile.h"
#include "jit/contraction_plan.h"
#include "jit/lower.h"
#include "jit/tune.h"
#include "tests/expect_error.h"
#include "tests/temp_folder.h"

namespace calotype::jit {
namespace {

namespace fs = std::filesystem;
using test::TempFolder;
using ::testing::AllOf;
using ::testing::HasSubstr;

ParameterPtr MakeParameter(const std::string& name, const Shape& shape) {
  return std::make_shared<Parameter>(name, Random(7, name).UniformTensor(shape, -0.5f, 0.5f));
}

std::vector<Tensor> Randoms(const ComputationGraph& graph) {
  Random random(5);
  std::vector<Tensor> inputs;
  for (int32_t input : graph.inputs()) {
    inputs.push_back(random.NormalTensor(graph.node(input).types[0].shape));
  }
  return inputs;
}

// The largest difference, relative to the largest expected value, is at most `tolerance`.
void ExpectNear(const Tensor& actual, const Tensor& expected, double tolerance) {
  ASSERT_EQ(actual.type(), expected.type());
  double largest = 0, difference = 0;
  for (int64_t i = 0; i < expected.elements(); ++i) {
    double a = actual.data()[i], e = expected.data()[i];
    ASSERT_TRUE(std::isfinite(a)) << i;
    largest = std::max(largest, std::abs(e));
    difference = std::max(difference, std::abs(a - e));
  }
  EXPECT_LE(difference, tolerance * largest);
}

std::vector<Tensor> ExpectSame(Executable& compiled, const ComputationGraph& graph,
                               double tolerance) {
  std::vector<Tensor> inputs = Randoms(graph), expected = Interpreter(graph).Run(inputs),
                      actual = compiled.Run(inputs);
  for (size_t o = 0; o < expected.size(); ++o) ExpectNear(actual[o], expected[o], tolerance);
  return actual;
}

// Gives the compile cache a folder of its own.
class OwnCache : public testing::Test {
 protected:
  OwnCache() {
    if (const char* old = std::getenv("CALOTYPE_CACHE")) old_ = old;
    setenv("CALOTYPE_CACHE", folder().c_str(), 1);
  }
  ~OwnCache() override {
    if (old_) {
      setenv("CALOTYPE_CACHE", old_->c_str(), 1);
    } else {
      unsetenv("CALOTYPE_CACHE");
    }
  }
  fs::path folder() const { return temp_ / "cache"; }

 private:
  TempFolder temp_;
  std::optional<std::string> old_;
};

// ------------------------------------------------------------------------------------- tuning

using Tune = OwnCache;

// A 3x3 convolution that Winograd's could compute, and a product with a long sum.
ComputationGraph TunedGraph() {
  ComputationGraph graph;
  Value x = graph.Input("x", {1, 32, 16, 16}), a = graph.Input("a", {96, 4096});
  graph.Output("conv", Conv2d(x, graph.ParameterLeaf(MakeParameter("w", {32, 32, 3, 3})), {},
                              Conv2dOptions::Padded(1, 1)));
  graph.Output("product",
               MatMul(a, graph.ParameterLeaf(MakeParameter("v", {64, 4096})), false, true));
  return graph;
}

TEST_F(Tune, ChoicesAreStoredAndNotMeasuredAgain) {
  ComputationGraph graph = TunedGraph();
  auto first = Compile(graph, {.tune = true}), second = Compile(graph, {.tune = true});
  EXPECT_GE(first->Stats().tuned, 2);
  EXPECT_EQ(first->Stats().measured, first->Stats().tuned);
  EXPECT_EQ(second->Stats().tuned, first->Stats().tuned);
  EXPECT_EQ(second->Stats().measured, 0);
  EXPECT_EQ(second->Stats().cache_misses, 0) << "the same choices give the same kernels";
  std::vector<Tensor> inputs = Randoms(graph);
  std::vector<Tensor> x = ExpectSame(*first, graph, 2e-5), y = second->Run(inputs);
  for (size_t o = 0; o < x.size(); ++o) ExpectNear(y[o], x[o], 0);
}

TEST_F(Tune, WithoutItNothingIsMeasured) {
  auto compiled = Compile(TunedGraph());
  EXPECT_EQ(compiled->Stats().tuned, 0);
  EXPECT_EQ(compiled->Stats().measured, 0);
}

TEST_F(Tune, DamagedChoicesAreMeasuredAnew) {
  ComputationGraph graph = TunedGraph();
  const int all = Compile(graph, {.tune = true})->Stats().measured;
  for (const auto& entry : fs::directory_iterator(folder())) {  // code and choices
    std::fstream file(entry.path(), std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(-70, std::ios::end);  // in the data, before the hash
    file.put('\x7f');
  }
  auto repaired = Compile(graph, {.tune = true});
  EXPECT_EQ(repaired->Stats().measured, all);
  ExpectSame(*repaired, graph, 2e-5);
  EXPECT_EQ(Compile(graph, {.tune = true})->Stats().measured, 0);
}

TEST_F(Tune, WellFormedEntriesOfOtherContentAreMeasuredAnew) {
  Tuner first;
  const Shape x{1, 16, 8, 8}, w{16, 16, 3, 3};
  Tuner::Times times = first.TimesOf(x, w);
  for (double ms : {times.direct, times.two, times.four}) EXPECT_GT(ms, 0);
  Tuner second;
  EXPECT_EQ(second.TimesOf(x, w).four, times.four);
  EXPECT_EQ(second.measured(), 0);
  // The same key with a right hash but no three numbers: what another version might have written.
  fs::path entry;
  for (const auto& file : fs::directory_iterator(folder())) {
    std::ifstream stream(file.path(), std::ios::binary);
    std::string text{std::istreambuf_iterator<char>(stream), {}};
    if (text.find("choice of") != std::string::npos) entry = file.path();
  }
  ASSERT_FALSE(entry.empty());
  std::ifstream stream(entry, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(stream), {}};
  const std::string magic = "calotype compile cache 1\n";
  const std::string last = fmt::format(" by {}\n", w);  // of the key
  const size_t end = text.find(last) + last.size();
  const std::string key = text.substr(magic.size(), end - magic.size());
  for (const char* wrong : {"", "1\n2\n", "1\n2\n3\n4\n", "1\n-2\n3\n", "1\n2\nx\n", "1 2 3"}) {
    CompileCache(folder()).Store(key, wrong);
    Tuner third;
    EXPECT_GT(third.TimesOf(x, w).direct, 0);
    EXPECT_EQ(third.measured(), 1) << wrong;
  }
}

TEST(Schedules, AllComputeTheSame) {
  // A convolution whose sum the cost model cuts into blocks.
  ComputationGraph graph;
  Value x = graph.Input("x", {1, 640, 16, 16});
  graph.Output("y", Conv2d(x, graph.ParameterLeaf(MakeParameter("w", {64, 640, 3, 3})), {},
                           Conv2dOptions::Padded(1, 1)));
  LoweredProgram program = Lower(graph, {.winograd_bytes = 0});
  std::vector<ContractionSpec> specs;
  for (const Step& step : program.steps) {
    if (const auto* spec = std::get_if<ContractionSpec>(&step.spec)) specs.push_back(*spec);
  }
  ASSERT_FALSE(specs.empty());
  EXPECT_GT(PlanContraction(specs[0], HostTarget()).sum_blocks, 0);
  specs[0].schedule = kWholeSum;
  EXPECT_EQ(PlanContraction(specs[0], HostTarget()).sum_blocks, 0);
  for (int schedule = 0; schedule < kSchedules; ++schedule) {
    auto chosen = std::make_shared<LoweredProgram>(Lower(graph, {.winograd_bytes = 0}));
    for (Step& step : chosen->steps) {
      if (auto* spec = std::get_if<ContractionSpec>(&step.spec)) spec->schedule = schedule;
    }
    SCOPED_TRACE(schedule);
    ExpectSame(*CompileProgram(chosen, {}), graph, 2e-5);
  }
}

// ----------------------------------------------------------------------------------- releasing

TEST(ReleaseWeights, FreesWhatWasPacked) {
  ComputationGraph graph;
  ParameterPtr w = MakeParameter("w", {64, 48}), bias = MakeParameter("bias", {64});
  graph.Output("y", MatMul(graph.Input("x", {32, 48}), graph.ParameterLeaf(w), false, true,
                           graph.ParameterLeaf(bias)));
  std::vector<Tensor> inputs = Randoms(graph), expected = Interpreter(graph).Run(inputs);
  auto compiled = Compile(graph, {.release_weights = true});
  EXPECT_EQ(compiled->Stats().released_bytes, 64 * 48 * 4);
  EXPECT_FALSE(w->value().defined());
  EXPECT_TRUE(bias->value().defined()) << "every run reads it";
  for (int run = 0; run < 2; ++run) ExpectNear(compiled->Run(inputs)[0], expected[0], 1e-5);
  EXPECT_EQ(compiled->Stats().repacks, 1);

  w->Write() = Random(8, "w").UniformTensor({64, 48}, -1, 1);
  EXPECT_THAT(MessageOf<UnsupportedError>([&] { compiled->Run(inputs); }),
              AllOf(HasSubstr("parameter w has changed"), HasSubstr("released")));
}

TEST(ReleaseWeights, IsNothingForTrainingOrChecks) {
  ComputationGraph training;
  ParameterPtr w = MakeParameter("w", {8, 8});
  Value p = training.ParameterLeaf(w);
  training.Update(p, p * 0.5f);
  EXPECT_THAT(MessageOf<UnsupportedError>([&] { Compile(training, {.release_weights = true}); }),
              HasSubstr("updates 1 parameters"));
  ComputationGraph graph;
  graph.Output("y", MatMul(graph.Input("x", {32, 8}), graph.ParameterLeaf(w), false, true));
  EXPECT_THAT(MessageOf<UnsupportedError>(
                  [&] { Compile(graph, {.release_weights = true, .check = true}); }),
              HasSubstr("checking reads"));
  EXPECT_TRUE(w->value().defined());
}

TEST(ReleaseWeights, LeavesOtherExecutablesTheirWeightsAndSaysWhatIsGone) {
  ComputationGraph graph;
  ParameterPtr w = MakeParameter("w", {64, 48}), scale = MakeParameter("scale", {48});
  Value x = graph.Input("x", {32, 48});
  graph.Output("y", MatMul(x, graph.ParameterLeaf(w), false, true));
  graph.Output("z", x * graph.ParameterLeaf(scale));
  std::vector<Tensor> inputs = Randoms(graph), expected = Interpreter(graph).Run(inputs);
  auto keeping = Compile(graph);
  auto releasing = Compile(graph, {.release_weights = true});
  EXPECT_FALSE(w->value().defined());
  for (int run = 0; run < 2; ++run) {
    for (auto* executable : {keeping.get(), releasing.get()}) {
      std::vector<Tensor> actual = executable->Run(inputs);
      for (size_t o = 0; o < 2; ++o) ExpectNear(actual[o], expected[o], 1e-5);
    }
  }
  EXPECT_THAT(MessageOf<ValueError>([&] { Compile(graph); }),
              AllOf(HasSubstr("parameter w has no value"), HasSubstr("load the model again")));
  auto build = [](std::span<const TensorType>) { return ComputationGraph(); };
  EXPECT_THAT(
      MessageOf<UnsupportedError>([&] { CompiledFunction(build, {.release_weights = true}); }),
      HasSubstr("release_weights"));
}

// Code with release_weights keeps no value of its own, so that others can take what it reads.
TEST(ReleaseWeights, WhatOtherCodeHasFreedIsNotRead) {
  ParameterPtr w = MakeParameter("w", {48, 48});
  ComputationGraph sum, product;
  sum.Output("y", sum.Input("x", {48, 48}) + sum.ParameterLeaf(w));
  product.Output("y", MatMul(product.Input("x", {48, 48}), product.ParameterLeaf(w), false, true));
  std::vector<Tensor> inputs = Randoms(sum), expected = Interpreter(sum).Run(inputs);
  auto keeping = Compile(sum), reading = Compile(sum, {.release_weights = true});
  ASSERT_TRUE(w->value().defined());
  ExpectNear(reading->Run(inputs)[0], expected[0], 0);
  auto taking = Compile(product, {.release_weights = true});
  ASSERT_FALSE(w->value().defined());
  std::vector<Tensor> outputs = {Tensor::Full({48, 48}, 7)};
  EXPECT_THAT(MessageOf<ValueError>([&] { reading->Run(inputs, outputs); }),
              AllOf(HasSubstr("parameter w has been released"), HasSubstr("compile it again")));
  EXPECT_EQ(outputs[0].data()[0], 7) << "nothing is written";
  ExpectNear(keeping->Run(inputs)[0], expected[0], 0);
}

TEST(ReleaseWeights, WhatOnlyRareInputsNeedMayChange) {
  ComputationGraph graph;
  ParameterPtr w = MakeParameter("w", {64, 48}), scale = MakeParameter("scale", {48});
  Value context = graph.Input("context", {32, 48}) * graph.ParameterLeaf(scale);
  graph.Output("y", MatMul(graph.Input("x", {32, 48}), graph.ParameterLeaf(w), false, true) +
                        Sum(Exp(context), {0, 1}, false));
  std::vector<Tensor> inputs = Randoms(graph);
  auto compiled = Compile(graph, {.release_weights = true, .rare_inputs = {"context"}});
  ASSERT_GT(compiled->Stats().derive_steps, 0);
  ASSERT_FALSE(w->value().defined());
  Tensor before = compiled->Run(inputs)[0];
  scale->Write().CopyFrom(Random(9, "scale").UniformTensor({48}, -1, 1));
  Tensor after = compiled->Run(inputs)[0];
  EXPECT_GT(std::abs(after.data()[0] - before.data()[0]), 1e-3);
  EXPECT_EQ(compiled->Stats().repacks, 1);
}

// -------------------------------------------------------------------------------------- chains

int Chains(const ComputationGraph& graph) {
  int chains = 0;
  for (const Step& step : Lower(graph).steps)
    chains += std::holds_alternative<ChainSpec>(step.spec);
  return chains;
}

TEST(Chains, NormsAreOneStep) {
  for (int64_t batch : {1, 3}) {
    ComputationGraph rows;
    rows.Output("y", LayerNorm(rows.Input("x", {batch, 40, 72}), rows.Input("g", {72}),
                               rows.Input("b", {72}), 1e-5));
    auto layer = Compile(rows);
    EXPECT_EQ(layer->Stats().steps, 1) << ToString(Lower(rows));
    ExpectSame(*layer, rows, 1e-5);

    ComputationGraph picture;
    picture.Output("y", GroupNorm(picture.Input("x", {batch, 64, 9, 7}), picture.Input("g", {64}),
                                  picture.Input("b", {64}), 16, 1e-5));
    auto group = Compile(picture);
    // With several pictures the step that multiplies by gamma walks them apart from the groups.
    EXPECT_EQ(group->Stats().steps, batch == 1 ? 1 : 3) << ToString(Lower(picture));
    ExpectSame(*group, picture, 1e-5);
  }
}

TEST(Chains, OnlyStepsWhoseRowsLieApart) {
  // The second reads the rows of the first one further on, the third all of them.
  ComputationGraph graph;
  Value x = graph.Input("x", {65, 80});
  Value y = Exp(x * 0.1f) / Sum(Exp(x * 0.1f), {1}, true);
  Value shifted = Slice(y, 0, 1, 64) * Sum(Slice(y, 0, 0, 64), {1}, true);
  graph.Output("shifted", shifted);
  graph.Output("columns", shifted / Sum(shifted, {0}, true));
  ExpectSame(*Compile(graph), graph, 1e-5);
  ComputationGraph columns;
  Value z = columns.Input("z", {64, 80});
  columns.Output("y", z - Sum(z, {0}, true));
  EXPECT_EQ(Chains(columns), 0) << ToString(Lower(columns));
  ExpectSame(*Compile(columns), columns, 1e-5);
}

// ---------------------------------------------------------------------------- channels-first

TEST(Turned, APictureChannelsFirstIsWrittenInBlocks) {
  ComputationGraph graph;
  Value tokens = graph.Input("tokens", {1024, 48});
  Value residual = graph.Input("residual", {1, 64, 32, 32});
  Value y = MatMul(tokens, graph.ParameterLeaf(MakeParameter("w", {48, 64})));
  graph.Output("y", Permute(Reshape(y, {1, 32, 32, 64}), {0, 3, 1, 2}) + residual);
  LoweredProgram program = Lower(graph);
  int turned = 0, products = 0;
  for (const Step& step : program.steps) {
    turned += step.label.find("(turned)") != std::string::npos;
    const auto* spec = std::get_if<ContractionSpec>(&step.spec);
    if (spec == nullptr) continue;
    ++products;
    for (const auto* operands : {&spec->epilogue.operands, &spec->epilogue.outputs}) {
      for (const Operand& operand : *operands) EXPECT_LE(operand.strides.back(), 1);
    }
  }
  EXPECT_EQ(products, 1);
  EXPECT_EQ(turned, 2) << "the residual before, the result after";
  ExpectSame(*Compile(graph), graph, 1e-5);
}

// ------------------------------------------------------------------------------------ refusals

std::vector<TensorType> SameType(const InferContext& context) { return {context.inputs[0]}; }

// An op that somebody has written without a kernel or a decomposition.
const Op kOddOp{.name = "Odd",
                .kind = OpKind::kCall,
                .min_arity = 1,
                .max_arity = 1,
                .doc = "",
                .source = "",
                .infer = SameType};

using Refusals = OwnCache;

TEST_F(Refusals, LeaveWeightsAndCacheAsTheyWere) {
  ParameterPtr w = MakeParameter("w", {64, 48});
  auto model = [&](ComputationGraph& graph) {
    return MatMul(graph.Input("x", {32, 48}), graph.ParameterLeaf(w), false, true);
  };
  auto untouched = [&] {
    EXPECT_TRUE(w->value().defined());
    EXPECT_EQ(w->version(), 0u);
    EXPECT_TRUE(!fs::exists(folder()) || fs::is_empty(folder()));
  };
  ComputationGraph odd;
  {
    ComputationGraph::Label label(odd, "decoder.head");
    odd.Output("y", odd.EmitOne(kOddOp, std::vector<Value>{model(odd)}));
  }
  EXPECT_THAT(MessageOf<UnsupportedError>([&] { Compile(odd, {.release_weights = true}); }),
              AllOf(HasSubstr("decoder.head: Odd"), HasSubstr("f32[32, 64]")));
  untouched();

  ComputationGraph wide;  // one head of 20,000 numbers
  {
    ComputationGraph::Label label(wide, "mid.attention");
    Value q = wide.Input("q", {1, 4, 20000});
    wide.Output("y", model(wide));
    wide.Output("z", Attention(q, q, q, {.heads = 1, .scale = 1}).out);
  }
  EXPECT_THAT(MessageOf<UnsupportedError>([&] { Compile(wide, {.release_weights = true}); }),
              AllOf(HasSubstr("mid.attention"), HasSubstr("20000")));
  EXPECT_TRUE(w->value().defined());

  ComputationGraph plain;
  plain.Output("y", model(plain));
  fs::remove_all(folder());
  EXPECT_THROW(Compile(plain, {.release_weights = true, .memory_bytes = 1000}), OutOfMemoryError);
  untouched();

  fs::create_directories(folder());
  fs::permissions(folder(), fs::perms::owner_read | fs::perms::owner_exec);
  EXPECT_THAT(MessageOf<FileError>([&] { Compile(plain, {.release_weights = true}); }),
              HasSubstr("read-only"));
  untouched();
  fs::permissions(folder(), fs::perms::owner_all);
  ExpectSame(*Compile(plain), plain, 1e-5);
}

TEST_F(Refusals, AParameterKeepsItsMemory) {
  ComputationGraph graph;
  ParameterPtr scale = MakeParameter("scale", {48});
  graph.Output("y", graph.Input("x", {32, 48}) * graph.ParameterLeaf(scale));
  auto compiled = Compile(graph);
  std::vector<Tensor> inputs = Randoms(graph), outputs = {Tensor::Full({32, 48}, 7)};
  Tensor old = scale->value();
  scale->Write() = old.Clone();
  EXPECT_THAT(MessageOf<ValueError>([&] { compiled->Run(inputs, outputs); }),
              AllOf(HasSubstr("parameter scale"), HasSubstr("CopyFrom")));
  EXPECT_EQ(outputs[0].data()[0], 7) << "nothing is written";
  scale->Write() = old;
  ExpectSame(*compiled, graph, 0);
}

TEST_F(Refusals, AnInputIsNoParameterThatIsUpdated) {
  ComputationGraph graph;
  ParameterPtr w = MakeParameter("w", {8, 8});
  Value p = graph.ParameterLeaf(w), x = graph.Input("x", {8, 8});
  graph.Update(p, p * 0.5f);
  graph.Output("y", MatMul(x, x));
  auto compiled = Compile(graph);
  Tensor before = w->value().Clone();
  EXPECT_THAT(MessageOf<ValueError>([&] { compiled->Run(std::vector{w->value()}); }),
              AllOf(HasSubstr("input \"x\""), HasSubstr("parameter w")));
  ExpectNear(w->value(), before, 0);
  compiled->Run(std::vector{before});
  EXPECT_EQ(w->value().data()[0], 0.5f * before.data()[0]);
}

TEST_F(Refusals, IndicesThatTheGraphMakesAreNoneEvenAsOutputs) {
  ComputationGraph graph;
  TensorType three{DType::kI64, {3}};
  Value i = Concat({graph.Input("i", three), graph.Input("j", three)}, 0);
  graph.Output("indices", i);
  graph.Output("y", Gather(graph.Input("x", {9, 4}), i));
  EXPECT_THAT(MessageOf<UnsupportedError>([&] { Compile(graph); }), HasSubstr("as an input"));
}

// Labels are the caller's: one that reads like a step of the lowering's own means nothing.
TEST(Labels, AreNotInterpreted) {
  ComputationGraph graph;
  ComputationGraph::Label label(graph, "update w");
  ParameterPtr w = MakeParameter("w", {48, 64}), m = MakeParameter("m", {32, 64});
  Value x = graph.Input("x", {32, 48}), p = graph.ParameterLeaf(m);
  Value y = MatMul(x, graph.ParameterLeaf(w));
  graph.Update(p, p * 0.5f + y);
  graph.Output("z", Sum(y * y, {1}));
  Tensor before = m->value().Clone();
  std::vector<Tensor> inputs = Randoms(graph), expected = Interpreter(graph).Run(inputs);
  Tensor after = m->value().Clone();
  m->Write().CopyFrom(before);
  std::vector<Tensor> actual = Compile(graph)->Run(inputs);
  ExpectNear(actual[0], expected[0], 1e-5);
  ExpectNear(m->value(), after, 1e-5);
}

}  // namespace
}  // namespace calotype::jit
