// The graph itself: building, sharing, passes, gradients through several ops, updates, interpreter.
#include "graph/graph.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/random.h"
#include "graph/functions.h"
#include "graph/interpreter.h"
#include "graph/op.h"
#include "graph/passes.h"
#include "graph/text.h"

namespace calotype {
namespace {

using testing::AllOf;
using testing::HasSubstr;

std::vector<Tensor> RunGraph(const ComputationGraph& graph, std::vector<Tensor> inputs) {
  return Interpreter(graph).Run(inputs);
}

int CountOps(const ComputationGraph& graph, std::string_view name) {
  int count = 0;
  for (const ComputationNode& node : graph.nodes()) count += node.op->name == name;
  return count;
}

TEST(Graph, EqualNodesAreShared) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{3});
  EXPECT_EQ(Silu(x), Silu(x));
  EXPECT_EQ(x + 1.0f, x + 1.0f);
  EXPECT_FALSE(x + 1.0f == x + 2.0f);
  EXPECT_FALSE(Sum(Reshape(x, {1, 3}), {0}) == Sum(Reshape(x, {1, 3}), {1}));
  auto parameter = std::make_shared<Parameter>("w", Tensor::Zeros({3}));
  EXPECT_EQ(graph.ParameterLeaf(parameter), graph.ParameterLeaf(parameter));
  // Two parameters with equal content stay two.
  auto twin = std::make_shared<Parameter>("w2", Tensor::Zeros({3}));
  EXPECT_FALSE(graph.ParameterLeaf(parameter) == graph.ParameterLeaf(twin));
}

TEST(Graph, MinusZeroIsAnotherConstant) {
  ComputationGraph graph;
  EXPECT_FALSE(graph.Constant(0.0f) == graph.Constant(-0.0f));
}

TEST(Graph, InputsAreUniqueByName) {
  ComputationGraph graph;
  graph.Input("x", Shape{3});
  EXPECT_THROW(graph.Input("x", Shape{4}), ValueError);
}

TEST(Graph, EmitDoesNotExecute) {
  int64_t before = MemoryStats::Allocations();
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{1 << 20});
  for (int i = 0; i < 10; ++i) x = Silu(x);
  EXPECT_EQ(MemoryStats::Allocations(), before);
}

TEST(Graph, RebuildDropsDeadNodesAndKeepsInputs) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{3}), unused = graph.Input("unused", Shape{2});
  Exp(unused);
  Exp(x);
  graph.Output("y", Silu(x));
  ComputationGraph copy = Clone(graph);
  EXPECT_EQ(copy.inputs().size(), 2u);
  EXPECT_EQ(CountOps(copy, "Exp"), 0);
  EXPECT_EQ(copy.nodes().size(), 3u);
}

TEST(Graph, VerifyAcceptsAndTextNamesLabels) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{3});
  {
    ComputationGraph::Label label(graph, "down");
    ComputationGraph::Label inner(graph, "0");
    x = Silu(x);
  }
  graph.Output("y", x);
  Verify(graph);
  EXPECT_THAT(ToText(graph), HasSubstr("@ down.0"));
  EXPECT_THAT(ToDot(graph), HasSubstr("cluster"));
}

TEST(Text, RoundTripWithParametersConstantsUpdates) {
  ComputationGraph graph;
  auto w = std::make_shared<Parameter>("a.weight", Tensor::Full({3}, 2));
  Value x = graph.Input("x", Shape{2, 3});
  Value leaf = graph.ParameterLeaf(w);
  Value y = x * leaf + graph.Constant(Tensor::From<float>({3}, {1e-7f, -0.0f, 3.25f}));
  graph.Output("y", y);
  graph.Update(leaf, leaf - Sum(y, {0}) * 0.1f);
  std::string text = ToText(graph);
  EXPECT_EQ(ToText(ParseText(text)), text);
}

TEST(Text, ErrorsNameTheLine) {
  auto message = [](std::string_view text) {
    try {
      ParseText(text);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_THAT(message("%0 = Input \"x\" : f32[2]\n%1 = Silu(%7) : f32[2]\n"), HasSubstr("line 2"));
  EXPECT_THAT(message("%0 = Nonsense() : f32[2]\n"), HasSubstr("Nonsense"));
  EXPECT_THAT(message("%0 = Input \"x\" : f32[2]\n%1 = Silu(%0) : f32[3]\n"), HasSubstr("f32[2]"));
  // Text that is no number is no 0, and neither is a number with something behind it.
  for (const char* word : {"two", "2x", "1.5.2", "0x10"}) {
    EXPECT_THAT(message(fmt::format("%0 = Constant [{}] : f32[]\n", word)), HasSubstr("a number"));
    EXPECT_THAT(message(fmt::format(
                    "%0 = Input \"x\" : f32[2]\n%1 = Softmax(%0) {{a={}}} : f32[2]\n", word)),
                AllOf(HasSubstr("line 2"), HasSubstr("an attribute value")));
  }
}

TEST(Interpreter, ChecksInputs) {
  ComputationGraph graph;
  graph.Output("y", Silu(graph.Input("x", Shape{3})));
  EXPECT_THROW(RunGraph(graph, {}), ShapeError);
  EXPECT_THROW(RunGraph(graph, {Tensor::Zeros({4})}), ShapeError);
  EXPECT_THROW(RunGraph(graph, {Tensor::Zeros({3}, DType::kI64)}), ShapeError);
}

TEST(Interpreter, FreesValuesAfterTheirLastUse) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{1 << 20});
  Value y = x;
  for (int i = 0; i < 16; ++i) y = Sin(y);
  graph.Output("y", y);
  Tensor input = Tensor::Zeros({1 << 20});
  MemoryStats::ResetPeak();
  int64_t before = MemoryStats::LiveBytes();
  RunGraph(graph, {input});
  EXPECT_LE(MemoryStats::PeakBytes() - before, 2 * (int64_t{4} << 20) + 4096);
}

TEST(Interpreter, UpdatesSeeOldValuesAndBumpVersions) {
  ComputationGraph graph;
  auto a = std::make_shared<Parameter>("a", Tensor::Full({2}, 1));
  auto b = std::make_shared<Parameter>("b", Tensor::Full({2}, 5));
  Value va = graph.ParameterLeaf(a), vb = graph.ParameterLeaf(b);
  graph.Output("old", Reshape(va, {1, 2}));
  graph.Update(va, vb);  // a swap: both sources are the other's old value
  graph.Update(vb, va);
  std::vector<Tensor> outputs = RunGraph(graph, {});
  EXPECT_EQ(a->value().data()[0], 5);
  EXPECT_EQ(b->value().data()[1], 1);
  EXPECT_EQ(outputs[0].data()[0], 1);
  EXPECT_EQ(a->version(), 1u);
  EXPECT_THROW(graph.Update(va, vb), InternalError);  // twice
}

TEST(Gradients, SumsOverAllUsesAndStopsAtStopGradient) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{3});
  Value y = Sum(x * x + x * StopGradient(x) + 3.0f * x);
  graph.Output("dx", Gradients(std::vector{y}, std::vector{Value{}}, std::vector{x})[0]);
  Tensor dx = RunGraph(graph, {Tensor::From<float>({3}, {1, 2, -4})})[0];
  EXPECT_THAT(dx.values(), testing::ElementsAre(6, 9, -9));  // 2x + x + 3
}

TEST(Gradients, IndependentValuesGiveZeros) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{2}), z = graph.Input("z", Shape{4});
  graph.Output("dz", Gradients(std::vector{Sum(x)}, std::vector{Value{}}, std::vector{z})[0]);
  EXPECT_THAT(RunGraph(graph, {Tensor::Zeros({2}), Tensor::Zeros({4})})[0].values(),
              testing::ElementsAre(0, 0, 0, 0));
}

TEST(Gradients, UntakenBranchDoesNotPoison) {
  // y = x > 0 ? log(x) : 0; at x <= 0 the untaken log is -inf or NaN and must not reach the result.
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{3});
  Value zero = graph.Constant(0.0f);
  Value positive = Less(zero, x);
  Value safe = Select(positive, x, graph.Constant(1.0f));
  Value y = Sum(Select(positive, Log(safe), zero));
  graph.Output("y", y);
  graph.Output("dx", Gradients(std::vector{y}, std::vector{Value{}}, std::vector{x})[0]);
  auto result = RunGraph(graph, {Tensor::From<float>({3}, {2, 0, -1})});
  EXPECT_THAT(result[1].values(), testing::ElementsAre(0.5f, 0, 0));
}

TEST(Gradients, ReluIsZeroAtZeroAndTiesGoToTheFirst) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{3}), y = graph.Input("y", Shape{3});
  auto gradient = [&](Value f, Value wrt) {
    return Gradients(std::vector{Sum(f)}, std::vector{Value{}}, std::vector{wrt})[0];
  };
  graph.Output("relu", gradient(Relu(x), x));
  graph.Output("max_x", gradient(Maximum(x, y), x));
  graph.Output("max_y", gradient(Maximum(x, y), y));
  Tensor a = Tensor::From<float>({3}, {-1, 0, 2}), b = Tensor::From<float>({3}, {-2, 0, 3});
  auto result = RunGraph(graph, {a, b});
  EXPECT_THAT(result[0].values(), testing::ElementsAre(0, 0, 1));
  EXPECT_THAT(result[1].values(), testing::ElementsAre(1, 1, 0));
  EXPECT_THAT(result[2].values(), testing::ElementsAre(0, 0, 1));
}

TEST(Gradients, SlicesThatSplitAValueGiveAConcat) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{2, 5});
  std::vector<Value> parts = Split(x, 1, {3, 2});
  Value y = Sum(parts[0] * 2.0f) + Sum(parts[1] * 3.0f);
  graph.Output("dx", Gradients(std::vector{y}, std::vector{Value{}}, std::vector{x})[0]);
  EXPECT_EQ(CountOps(Clone(graph), "Pad"), 0);
  EXPECT_EQ(CountOps(Clone(graph), "Concat"), 1);
  EXPECT_THAT(RunGraph(graph, {Tensor::Zeros({2, 5})})[0].values(),
              testing::ElementsAre(2, 2, 2, 3, 3, 2, 2, 2, 3, 3));
}

TEST(Gradients, OverlappingSlicesAdd) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{5});
  Value y = Sum(Slice(x, 0, 0, 3) * 2.0f) + Sum(Slice(x, 0, 2, 3) * 3.0f);
  graph.Output("dx", Gradients(std::vector{y}, std::vector{Value{}}, std::vector{x})[0]);
  EXPECT_THAT(RunGraph(graph, {Tensor::Zeros({5})})[0].values(),
              testing::ElementsAre(2, 2, 5, 3, 3));
}

TEST(Gradients, SegmentsAreComputedAgainBehindABarrier) {
  auto build = [](bool enabled) {
    ComputationGraph graph;
    Value x = graph.Input("x", Shape{5}), y;
    {
      ComputationGraph::Segment segment(graph, enabled);
      ComputationGraph::Segment inner(graph, enabled);  // belongs to the outer one
      y = Exp(Sin(Exp(x) * 0.5f));
    }
    Value sum = Sum(Square(y));
    graph.Output("sum", sum);
    std::vector<Value> outputs{sum}, ones{Value{}}, wrt{x};
    graph.Output("dx", Gradients(outputs, ones, wrt)[0]);
    return Optimize(graph);
  };
  ComputationGraph plain = build(false), again = build(true);
  // The derivatives of Exp and Sin read their inputs: the inner Exp and Sin are needed again.
  EXPECT_EQ(CountOps(plain, "Barrier"), 0);
  EXPECT_EQ(CountOps(plain, "Exp"), 2);
  EXPECT_EQ(CountOps(plain, "Sin"), 1);
  EXPECT_EQ(CountOps(again, "Barrier"), 1);
  EXPECT_EQ(CountOps(again, "Exp"), 3);
  EXPECT_EQ(CountOps(again, "Sin"), 2);
  std::vector<Tensor> x{Random(1).NormalTensor({5})};
  std::vector<Tensor> expected = Interpreter(plain).Run(x), found = Interpreter(again).Run(x);
  for (size_t i = 0; i < 2; ++i)
    EXPECT_THAT(found[i].values(), testing::ElementsAreArray(expected[i].values()));
}

TEST(Gradients, OpWithoutGradientIsNamed) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{3});
  Value y = graph.EmitOne(FindOp("Silu.dx"), {x});
  try {
    Gradients(std::vector{Sum(y)}, std::vector{Value{}}, std::vector{x});
    FAIL();
  } catch (const UnsupportedError& error) {
    EXPECT_THAT(error.what(), HasSubstr("Silu.dx"));
  }
}

TEST(Passes, FoldComputesConstants) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{2});
  graph.Output("y", x * Exp(graph.Constant(Tensor::From<float>({2}, {0, 1}))));
  ComputationGraph folded = Fold(graph);
  EXPECT_EQ(CountOps(folded, "Exp"), 0);
  Tensor input = Tensor::From<float>({2}, {3, 4});
  EXPECT_THAT(RunGraph(folded, {input})[0].values(),
              testing::ElementsAreArray(RunGraph(graph, {input})[0].values()));
}

TEST(Passes, SimplifyRemovesWhatDoesNothing) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{2, 3});
  Value y = Neg(Neg(x * 1.0f)) / 1.0f - 0.0f;
  y = Permute(Permute(y, {1, 0}), {1, 0});
  y = Reshape(Reshape(y, {6}), {2, 3});
  y = Reshape(Sum(Reshape(y, {2, 1, 3}), {1}), {2, 3});
  graph.Output("y", Silu(y));
  ComputationGraph simple = Clone(Simplify(Simplify(graph)));
  EXPECT_EQ(CountOps(simple, "Silu"), 1);
  EXPECT_EQ(simple.nodes().size(), 2u) << ToText(simple);
}

TEST(Passes, SimplifyKeepsMinusZero) {
  ComputationGraph graph;
  graph.Output("y", graph.Input("x", Shape{1}) + 0.0f);  // -0 + 0 is +0: not the identity
  EXPECT_EQ(CountOps(Simplify(graph), "Add"), 1);
}

TEST(Passes, BroadcastIsReadByTheElementwiseOp) {
  ComputationGraph graph;
  Value x = graph.Input("x", Shape{4, 3}), b = graph.Input("b", Shape{3});
  graph.Output("y", x + Broadcast(b, {4, 3}));
  graph.Output("z", Broadcast(b, {4, 3}) * 2.0f);  // here the Broadcast gives the shape and stays
  ComputationGraph simple = Simplify(graph);
  EXPECT_EQ(CountOps(simple, "Broadcast"), 1);
  Random random(3);
  std::vector<Tensor> inputs = {random.NormalTensor({4, 3}), random.NormalTensor({3})};
  EXPECT_THAT(RunGraph(simple, inputs)[0].values(),
              testing::ElementsAreArray(RunGraph(graph, inputs)[0].values()));
}

TEST(Resize, NearestMatchesTheFormula) {
  Random random(9);
  for (auto [h, w] : {std::pair{8, 6}, {5, 7}, {4, 9}, {2, 3}, {1, 1}}) {
    ComputationGraph graph;
    graph.Output("y", ResizeNearest(graph.Input("x", Shape{2, 3, 4, 3}), h, w));
    Tensor x = random.NormalTensor({2, 3, 4, 3});
    Tensor y = RunGraph(graph, {x})[0];
    for (int64_t bc = 0; bc < 6; ++bc) {
      for (int i = 0; i < h; ++i) {
        for (int j = 0; j < w; ++j) {
          ASSERT_EQ(y.data()[(bc * h + i) * w + j], x.data()[(bc * 4 + i * 4 / h) * 3 + j * 3 / w]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace calotype
