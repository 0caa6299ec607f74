// The attention processors: the equalities between them, what slicing costs in memory, what blocks
// gradients, and their management on whole models. Golden outputs and gradients are in
// conformance_test.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "graph/op.h"
#include "layer_gradient.h"
#include "layers/attention.h"
#include "layers/attention_modules.h"
#include "layers/lora.h"
#include "models/unet_2d_condition.h"
#include "tests/expect_error.h"

namespace calotype {
namespace {

using nn::Attention;
using nn::AttentionProcessor;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

Tensor Normal(const Shape& shape, uint64_t seed) { return Random(seed).NormalTensor(shape); }

// A module with random parameters; LoRA's up matrices, too.
std::unique_ptr<Attention> Make(const Attention::Options& options,
                                const AttentionProcessor& processor) {
  auto attention = std::make_unique<Attention>(options);
  if (nn::NameOf(processor).starts_with("Fused")) attention->FuseProjections();
  attention->SetProcessor(processor);
  attention->Initialize(11);
  for (const ParameterPtr& p : attention->NamedParameters()) {
    if (p->name().ends_with("up.weight")) p->Write().CopyFrom(Normal(p->value().shape(), 5));
  }
  if (attention->fused()) {  // Initialize has drawn other numbers
    attention->SetDefaultProcessor();
    attention->UnfuseProjections();
    attention->FuseProjections();
    attention->SetProcessor(processor);
  }
  return attention;
}

struct Result {
  Tensor y;
  std::vector<Tensor> inputs;                // gradients
  std::map<std::string, Tensor> parameters;  // gradients
};
Result Evaluate(Attention& attention, const std::vector<Tensor>& inputs) {
  Result result;
  result.y = attention.Layer::Forward(inputs).at(0);
  result.inputs = attention.Backward(Normal(result.y.shape(), 77));
  for (const ParameterPtr& p : attention.NamedParameters()) {
    result.parameters[p->name()] = p->gradient;
  }
  return result;
}

constexpr double kSame = 2e-6;  // of the largest value; float32 in another order

// Value and all gradients of what both have.
void ExpectSame(const Result& a, const Result& b) {
  EXPECT_LT(RelativeError(a.y, b.y), kSame);
  ASSERT_EQ(a.inputs.size(), b.inputs.size());
  double largest = 0;
  for (const auto& [name, gradient] : b.parameters) {
    largest = std::max(largest, LargestAbs(gradient));
  }
  for (size_t i = 0; i < a.inputs.size(); ++i) {
    ASSERT_EQ(a.inputs[i].defined(), b.inputs[i].defined());
    // A mask's gradient is zero in both.
    if (a.inputs[i].defined() && LargestAbs(b.inputs[i]) > 0) {
      EXPECT_LT(RelativeError(a.inputs[i], b.inputs[i]), 1e-5) << "input " << i;
    }
  }
  for (const auto& [name, gradient] : b.parameters) {
    auto it = a.parameters.find(name);
    if (it == a.parameters.end()) continue;
    double error = RelativeError(it->second, gradient) * LargestAbs(gradient);
    EXPECT_LT(error, 1e-5 * largest) << name;
  }
}

std::vector<AttentionProcessor> PlainProcessors() {
  using nn::AttentionOp;
  return {nn::AttnProcessor2_0{},
          nn::XFormersAttnProcessor{},
          nn::XFormersAttnProcessor{AttentionOp::kFlash},
          nn::XFormersAttnProcessor{AttentionOp::kSingleBlock},
          nn::SlicedAttnProcessor{1},
          nn::SlicedAttnProcessor{4},  // leaves a remainder of 6 rows
          nn::SlicedAttnProcessor{100}};
}

// ---------------------------------------------------------------- equalities

TEST(AttentionProcessorTest, PlainOnesAgree) {
  struct Form {
    const char* name;
    Attention::Options options;
    std::vector<Tensor> inputs;
  };
  Tensor mask = Tensor::Zeros({2, 1, 4});
  mask.data()[3] = mask.data()[6] = mask.data()[7] = -10000;
  const Form forms[] = {
      {"self", {.query_dim = 6, .heads = 3, .dim_head = 4}, {Normal({2, 5, 6}, 1)}},
      {"long", {.query_dim = 6, .heads = 3, .dim_head = 4}, {Normal({2, 150, 6}, 1)}},
      {"cross",
       {.query_dim = 6, .cross_attention_dim = 7, .heads = 3, .dim_head = 4, .bias = true},
       {Normal({2, 5, 6}, 1), Normal({2, 4, 7}, 2)}},
      {"shared context",
       {.query_dim = 6, .cross_attention_dim = 7, .heads = 3, .dim_head = 4},
       {Normal({2, 5, 6}, 1), Normal({1, 4, 7}, 2)}},
      {"mask",
       {.query_dim = 6,
        .cross_attention_dim = 7,
        .heads = 3,
        .dim_head = 4,
        .cross_attention_norm = "layer_norm"},
       {Normal({2, 5, 6}, 1), Normal({2, 4, 7}, 2), mask}},
      {"mask by query",
       {.query_dim = 6, .cross_attention_dim = 7, .heads = 3, .dim_head = 4},
       {Normal({2, 5, 6}, 1), Normal({2, 4, 7}, 2), Normal({2, 5, 4}, 3)}},
      {"mask by head",
       {.query_dim = 6,
        .cross_attention_dim = 8,
        .heads = 3,
        .dim_head = 4,
        .cross_attention_norm = "group_norm",
        .cross_attention_norm_num_groups = 2},
       {Normal({2, 5, 6}, 1), Normal({2, 4, 8}, 2), Normal({6, 1, 4}, 3)}},
      {"picture",
       {.query_dim = 6,
        .heads = 3,
        .dim_head = 2,
        .bias = true,
        .qk_norm = "layer_norm",
        .norm_num_groups = 2,
        .rescale_output_factor = 1.5,
        .residual_connection = true},
       {Normal({2, 6, 3, 2}, 1)}},
  };
  for (const Form& form : forms) {
    SCOPED_TRACE(form.name);
    Result expected = Evaluate(*Make(form.options, nn::AttnProcessor{}), form.inputs);
    for (const AttentionProcessor& processor : PlainProcessors()) {
      SCOPED_TRACE(nn::NameOf(processor));
      auto attention = Make(form.options, processor);
      EXPECT_EQ(attention->GetDiagnostics().at("attention.processor"), nn::NameOf(processor));
      ExpectSame(Evaluate(*attention, form.inputs), expected);
    }
    // Fused: the originals get no gradient, the fused rows theirs.
    auto fused = Make(form.options, nn::FusedAttnProcessor2_0{});
    Result result = Evaluate(*fused, form.inputs);
    EXPECT_LT(RelativeError(result.y, expected.y), kSame);
    bool cross = form.options.cross_attention_dim > 0;
    const Tensor& joint = result.parameters.at(cross ? "to_kv.weight" : "to_qkv.weight");
    std::vector<std::string> parts = {"to_k.weight", "to_v.weight"};
    if (!cross) parts.insert(parts.begin(), "to_q.weight");
    int64_t row = 0;
    for (const std::string& part : parts) {
      EXPECT_EQ(LargestAbs(result.parameters.at(part)), 0) << part;
      const Tensor& own = expected.parameters.at(part);
      Tensor rows(own.shape());
      std::copy_n(joint.data() + row, own.elements(), rows.data());
      row += own.elements();
      EXPECT_LT(RelativeError(rows, own) * LargestAbs(own), 1e-5 * LargestAbs(joint)) << part;
    }
  }
}

TEST(AttentionProcessorTest, SpatialNorm) {
  Attention::Options options{.query_dim = 32, .heads = 2, .dim_head = 16, .spatial_norm_dim = 3};
  std::vector<Tensor> inputs = {Normal({2, 32, 4, 6}, 1), Tensor(), Tensor(),
                                Normal({2, 3, 2, 3}, 2)};
  CheckLayer(*Make(options, nn::AttnProcessor{}), inputs);
  Result expected = Evaluate(*Make(options, nn::AttnProcessor{}), inputs);
  ExpectSame(Evaluate(*Make(options, nn::AttnProcessor2_0{}), inputs), expected);
  EXPECT_GT(LargestAbs(expected.inputs[3]), 1e-3);
  EXPECT_THAT(MessageOf<UnsupportedError>([&] { Make(options, nn::SlicedAttnProcessor{}); }),
              HasSubstr("spatial_norm_dim"));
  Attention attention(options);
  EXPECT_THAT(MessageOf<ShapeError>([&] { attention.Forward(inputs[0]); }), HasSubstr("temb"));
}

TEST(AttentionProcessorTest, AddedKVAgree) {
  Attention::Options options{.query_dim = 8,
                             .cross_attention_dim = 8,
                             .heads = 2,
                             .dim_head = 4,
                             .bias = true,
                             .added_kv_proj_dim = 5,
                             .norm_num_groups = 2};
  Tensor x = Normal({2, 8, 3, 2}, 1), e = Normal({2, 4, 5}, 2), mask = Tensor::Zeros({2, 1, 4});
  mask.data()[3] = mask.data()[6] = mask.data()[7] = -10000;
  for (bool only_cross : {false, true}) {
    options.only_cross_attention = only_cross;
    for (const std::vector<Tensor>& inputs :
         {std::vector{x, e}, std::vector{x.Reshape({2, 8, 6}), e}, std::vector{x, e, mask}}) {
      SCOPED_TRACE(inputs.size());
      if (inputs.size() == 2) CheckLayer(*Make(options, nn::AttnAddedKVProcessor{}), inputs);
      Result expected = Evaluate(*Make(options, nn::AttnAddedKVProcessor{}), inputs);
      EXPECT_EQ(expected.y.shape(), inputs[0].shape());
      for (const AttentionProcessor& processor : std::vector<AttentionProcessor>{
               nn::AttnAddedKVProcessor2_0{}, nn::SlicedAttnAddedKVProcessor{1},
               nn::SlicedAttnAddedKVProcessor{3}}) {
        SCOPED_TRACE(nn::NameOf(processor));
        ExpectSame(Evaluate(*Make(options, processor), inputs), expected);
      }
      auto lora = Make(options, nn::LoRAAttnAddedKVProcessor{.scale = 0});
      EXPECT_LT(RelativeError(Evaluate(*lora, inputs).y, expected.y), kSame);
      lora->SetProcessor(nn::LoRAAttnAddedKVProcessor{});  // up = 0
      EXPECT_LT(RelativeError(Evaluate(*lora, inputs).y, expected.y), kSame);
    }
    // A mask of the length of all keys, with none dropped of the input's own.
    if (!only_cross) {
      Tensor full = Tensor::Zeros({2, 1, 10});
      for (int64_t b = 0; b < 2; ++b) std::copy_n(mask.data() + b * 4, 4, full.data() + b * 10);
      auto attention = Make(options, nn::AttnAddedKVProcessor{});
      EXPECT_EQ(RelativeError(attention->Forward({x, e, full}), attention->Forward({x, e, mask})),
                0);
    }
  }
  EXPECT_EQ(nn::NameOf(Attention(options).processor()), "AttnAddedKVProcessor2_0");
}

TEST(AttentionProcessorTest, CrossFrame) {
  Attention::Options self{.query_dim = 6, .heads = 3, .dim_head = 2};
  Attention::Options cross = self;
  cross.cross_attention_dim = 7;
  Tensor x = Normal({6, 4, 6}, 1), e = Normal({6, 3, 7}, 2);
  auto run = [&](const Attention::Options& options, const AttentionProcessor& processor,
                 const std::vector<Tensor>& inputs) {
    return Evaluate(*Make(options, processor), inputs);
  };
  ExpectSame(run(cross, nn::CrossFrameAttnProcessor{}, {x, e}),
             run(cross, nn::AttnProcessor{}, {x, e}));
  Result plain = run(self, nn::AttnProcessor{}, {x});
  ExpectSame(run(self, nn::CrossFrameAttnProcessor{6}, {x}), plain);  // one frame each
  // Three frames: the first of each element is as it was, the others are not.
  Result frames = run(self, nn::CrossFrameAttnProcessor{2}, {x});
  double first = 0, others = 0;
  for (int64_t i = 0; i < x.elements(); ++i) {
    double difference = std::abs(frames.y.data()[i] - plain.y.data()[i]);
    double& largest = i / 24 % 3 == 0 ? first : others;
    largest = std::max(largest, difference);
  }
  EXPECT_LT(first, 1e-6);
  EXPECT_GT(others, 1e-2);
  CheckLayer(*Make(self, nn::CrossFrameAttnProcessor{2}), {x});
  Attention attention(self);
  attention.SetProcessor(nn::CrossFrameAttnProcessor{4});
  EXPECT_THAT(MessageOf<ShapeError>([&] { attention.Forward(x); }), HasSubstr("batch_size 4"));
}

// Copies the module's projections into the processor's own.
void CopyProjections(Attention& attention) {
  for (const ParameterPtr& p : attention.NamedParameters()) {
    std::string name = p->name();
    if (!name.starts_with("processor.")) continue;
    name = name.substr(10);
    name.erase(name.find("_custom_diffusion"), std::string("_custom_diffusion").size());
    p->Write().CopyFrom(attention.FindParameter(name)->value());
  }
}

TEST(AttentionProcessorTest, CustomDiffusion) {
  Attention::Options options{.query_dim = 6, .cross_attention_dim = 7, .heads = 3, .dim_head = 2};
  Tensor x = Normal({2, 4, 6}, 1), e = Normal({2, 3, 7}, 2), mask = Tensor::Zeros({2, 1, 3});
  mask.data()[2] = -10000;
  for (const std::vector<Tensor>& inputs : {std::vector{x, e}, std::vector{x, e, mask}}) {
    Result plain = Evaluate(*Make(options, nn::AttnProcessor{}), inputs);
    auto run = [&](const AttentionProcessor& processor) {
      auto attention = Make(options, processor);
      CopyProjections(*attention);
      return Evaluate(*attention, inputs);
    };
    Result custom = run(nn::CustomDiffusionAttnProcessor{});
    EXPECT_LT(RelativeError(custom.y, plain.y), kSame);
    ExpectSame(run(nn::CustomDiffusionAttnProcessor2_0{}), custom);
    ExpectSame(run(nn::CustomDiffusionXFormersAttnProcessor{.train_q_out = true}), custom);
    // Gradients differ by token 0 only: none reaches it, the others are as they were.
    const Tensor &de = custom.inputs[1], &de_plain = plain.inputs[1];
    for (int64_t i = 0; i < de.elements(); ++i) {
      if (i / 7 % 3 == 0) {
        EXPECT_EQ(de.data()[i], 0);
        EXPECT_NE(de_plain.data()[i], 0);
      } else {
        EXPECT_NEAR(de.data()[i], de_plain.data()[i], 1e-5);
      }
    }
    EXPECT_LT(RelativeError(custom.inputs[0], plain.inputs[0]), 1e-5);
    EXPECT_GT(RelativeError(custom.parameters.at("processor.to_k_custom_diffusion.weight"),
                            plain.parameters.at("to_k.weight")),
              1e-2);
    // Without parameters: the layer as it was.
    auto none =
        Make(options, nn::CustomDiffusionAttnProcessor{.train_kv = false, .train_q_out = false});
    EXPECT_FALSE(none->processor_has_parameters());
    EXPECT_LT(RelativeError(Evaluate(*none, inputs).y, plain.y), kSame);
  }
  // Self-attention blocks nothing.
  Attention::Options self{.query_dim = 6, .heads = 3, .dim_head = 2};
  auto attention = Make(self, nn::CustomDiffusionAttnProcessor{});
  CopyProjections(*attention);
  EXPECT_LT(RelativeError(Evaluate(*attention, {x}).inputs[0],
                          Evaluate(*Make(self, nn::AttnProcessor{}), {x}).inputs[0]),
            1e-5);
  EXPECT_EQ(Make(options, nn::CustomDiffusionXFormersAttnProcessor{})->ParameterShapes().size(),
            5u + 2u);  // keys and values only
}

TEST(AttentionProcessorTest, LoRA) {
  Attention::Options options{.query_dim = 6, .cross_attention_dim = 7, .heads = 3, .dim_head = 2};
  std::vector<Tensor> inputs = {Normal({2, 4, 6}, 1), Normal({2, 3, 7}, 2)};
  Result base = Evaluate(*Make(options, nn::AttnProcessor{}), inputs);
  nn::LoRAAttnProcessor lora{.rank = 3, .network_alpha = 6, .v_rank = 2, .scale = 0.5};
  auto attention = Make(options, lora);
  CheckLayer(*Make(options, lora), inputs);
  Result expected = Evaluate(*attention, inputs);
  EXPECT_GT(RelativeError(expected.y, base.y), 1e-2);
  ExpectSame(Evaluate(*Make(options,
                            nn::LoRAAttnProcessor2_0{
                                .rank = 3, .network_alpha = 6, .v_rank = 2, .scale = 0.5}),
                      inputs),
             expected);
  ExpectSame(Evaluate(*Make(options,
                            nn::LoRAXFormersAttnProcessor{
                                .rank = 3, .network_alpha = 6, .v_rank = 2, .scale = 0.5}),
                      inputs),
             expected);
  // Merged into the weights: W += scale alpha / rank up down.
  auto merged = Make(options, nn::AttnProcessor{});
  for (const char* name : {"to_q", "to_k", "to_v", "to_out"}) {
    std::string own = std::string("processor.") + name + "_lora.";
    const Tensor& up = attention->FindParameter(own + "up.weight")->value();
    const Tensor& down = attention->FindParameter(own + "down.weight")->value();
    int64_t out = up.shape()[0], rank = up.shape()[1], in = down.shape()[1];
    EXPECT_EQ(rank, std::string(name) == "to_v" ? 2 : 3);
    Tensor& w = merged->FindParameter(std::string(name) + (name[3] == 'o' ? ".0" : "") + ".weight")
                    ->Write();
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t i = 0; i < in; ++i) {
        double sum = 0;
        for (int64_t r = 0; r < rank; ++r) {
          sum += double{up.data()[o * rank + r]} * down.data()[r * in + i];
        }
        w.data()[o * in + i] += static_cast<float>(0.5 * 6.0 / static_cast<double>(rank) * sum);
      }
    }
  }
  EXPECT_LT(RelativeError(Evaluate(*merged, inputs).y, expected.y), 5e-6);
  // Scale 0, or up = 0 as at the start: the module as it was.
  lora.scale = 0;
  EXPECT_LT(RelativeError(Evaluate(*Make(options, lora), inputs).y, base.y), kSame);
  attention->SetProcessor(nn::LoRAAttnProcessor{});
  EXPECT_LT(RelativeError(Evaluate(*attention, inputs).y, base.y), kSame);
  // ... whose first step moves up, not down.
  Result start = Evaluate(*attention, inputs);
  EXPECT_EQ(LargestAbs(start.parameters.at("processor.to_q_lora.down.weight")), 0);
  EXPECT_GT(LargestAbs(start.parameters.at("processor.to_q_lora.up.weight")), 0);
  // Another processor drops the parameters.
  size_t with = attention->ParameterShapes().size();
  attention->SetProcessor(nn::AttnProcessor{});
  EXPECT_EQ(attention->ParameterShapes().size(), with - 8);
  EXPECT_LT(RelativeError(Evaluate(*attention, inputs).y, base.y), kSame);
}

TEST(AttentionProcessorTest, LoRAInitialDistribution) {
  nn::LoRALinearLayer layer({.in_features = 400, .out_features = 3, .rank = 8, .network_alpha = 4});
  layer.Initialize(1);
  const Tensor& down = layer.FindParameter("down.weight")->value();
  double square = 0;
  for (float x : down.values<float>()) square += double{x} * x;
  // 3200 draws of N(0, 1/64): the deviation is known within 1.25 %.
  EXPECT_NEAR(std::sqrt(square / 3200), 1.0 / 8, 5 * 0.0125 / 8);
  EXPECT_EQ(LargestAbs(layer.FindParameter("up.weight")->value()), 0);
  EXPECT_EQ(layer.factor(), 0.5);
}

// to_out.0 is followed by torch's Dropout: in training each value of the result is 0 with the given
// probability, and else divided by the probability to stay; residual and rescaling come after it.
TEST(AttentionProcessorTest, Dropout) {
  auto check = [](const Attention::Options& given, const AttentionProcessor& processor,
                  double probability) {
    SCOPED_TRACE(nn::NameOf(processor));
    auto attention = Make(given, processor);
    std::vector<Tensor> inputs(5);
    inputs[0] = Normal({4, 50, 16}, 1);
    inputs[4] = Tensor::From({1}, std::vector<int64_t>{3});
    attention->SetTrainingMode(false);
    Tensor kept = attention->Layer::Forward(inputs)[0];
    attention->SetTrainingMode(true);
    Tensor y = attention->Layer::Forward(inputs)[0];
    int64_t dropped = 0;
    double residual = given.residual_connection ? 1 : 0, factor = given.rescale_output_factor;
    for (int64_t i = 0; i < y.elements(); ++i) {
      double added = residual * inputs[0].data()[i], out = y.data()[i] * factor - added;
      dropped += std::abs(out) < 1e-6;
      double expected = (kept.data()[i] * factor - added) / (1 - probability);
      if (std::abs(out) >= 1e-6) EXPECT_NEAR(out, expected, 1e-5);
    }
    double deviation = std::sqrt(3200 * probability * (1 - probability));
    EXPECT_NEAR(static_cast<double>(dropped), 3200 * probability, 5 * deviation);
    EXPECT_EQ(RelativeError(attention->Layer::Forward(inputs)[0], y), 0);
    // The gradient of the bias counts what is kept.
    attention->Backward(Tensor::Full(y.shape(), 1));
    const char* bias =
        given.dropout == 0 ? "processor.to_out_custom_diffusion.0.bias" : "to_out.0.bias";
    double sum = 0;
    for (float v : attention->FindParameter(bias)->gradient.values()) sum += v;
    EXPECT_NEAR(sum * factor * (1 - probability), static_cast<double>(3200 - dropped), 0.05);
    inputs[4] = Tensor::From({1}, std::vector<int64_t>{4});
    EXPECT_GT(RelativeError(attention->Layer::Forward(inputs)[0], y), 0.1);
    EXPECT_THAT(MessageOf<ShapeError>([&] { attention->Forward(inputs[0]); }), HasSubstr("seed"));
  };
  Attention::Options plain{.query_dim = 16, .heads = 2, .dim_head = 8}, dropping = plain;
  dropping.dropout = 0.3;
  dropping.rescale_output_factor = 2;
  dropping.residual_connection = true;
  check(dropping, nn::AttnProcessor{}, 0.3);
  check(dropping, nn::AttnProcessor2_0{}, 0.3);
  check(dropping, nn::LoRAAttnProcessor{}, 0.3);
  check(plain, nn::CustomDiffusionAttnProcessor2_0{.dropout = 0.2}, 0.2);
  dropping.rescale_output_factor = 1;
  dropping.residual_connection = false;
  // The module's own belongs to the module's own result.
  check(dropping, nn::CustomDiffusionAttnProcessor{.train_kv = false, .train_q_out = false}, 0.3);
  EXPECT_THROW(Attention({.query_dim = 6, .dropout = 1}), ValueError);
}

// ---------------------------------------------------------------- memory

// What the graph of self-attention over 200 tokens, 2 pictures and 3 heads, is made of.
struct Parts {
  int softmax = 0, fused = 0, products = 0;  // nodes
  int64_t keys_at_once = 0;                  // of the fused node
  bool operator==(const Parts&) const = default;
};

TEST(AttentionProcessorTest, EachComputesInItsOwnWay) {
  using nn::AttentionOp;
  auto parts = [](const AttentionProcessor& processor, int64_t tokens = 200) {
    Attention::Options options{.query_dim = 6, .heads = 3, .dim_head = 2};
    if (nn::NameOf(processor).find("Added") != std::string_view::npos) {
      options.added_kv_proj_dim = 6;
      options.norm_num_groups = 2;
      tokens /= 2;  // and as many added
    }
    auto attention = Make(options, processor);
    Shape shape = options.added_kv_proj_dim > 0 ? Shape{2, 6, tokens} : Shape{2, tokens, 6};
    ComputationGraph graph = attention->Export({{"x", {DType::kF32, shape}}});
    Parts parts;
    for (const ComputationNode& node : graph.nodes()) {
      parts.softmax += node.op->name == "Softmax";
      parts.products += node.op->name == "MatMul";
      if (node.op->name == "Attention") {
        ++parts.fused;
        parts.keys_at_once = node.attrs.Int("block_kv");
      }
    }
    return parts;
  };
  // Four projections; scores and their product with the values; those of each slice.
  EXPECT_EQ(parts(nn::AttnProcessor{}), (Parts{1, 0, 6}));
  EXPECT_EQ(parts(nn::SlicedAttnProcessor{1}), (Parts{6, 0, 16}));
  EXPECT_EQ(parts(nn::SlicedAttnProcessor{4}), (Parts{2, 0, 8}));
  EXPECT_EQ(parts(nn::CrossFrameAttnProcessor{}), (Parts{1, 0, 6}));
  EXPECT_EQ(parts(nn::CustomDiffusionAttnProcessor{}), (Parts{1, 0, 6}));
  EXPECT_EQ(parts(nn::LoRAAttnProcessor{}), (Parts{1, 0, 6 + 8}));
  EXPECT_EQ(parts(nn::AttnProcessor2_0{}), (Parts{0, 1, 4, 64}));
  EXPECT_EQ(parts(nn::CustomDiffusionAttnProcessor2_0{}), (Parts{0, 1, 4, 64}));
  EXPECT_EQ(parts(nn::LoRAAttnProcessor2_0{}), (Parts{0, 1, 4 + 8, 64}));
  EXPECT_EQ(parts(nn::FusedAttnProcessor2_0{}), (Parts{0, 1, 2, 64}));
  // attention_op chooses the kernel.
  EXPECT_EQ(parts(nn::XFormersAttnProcessor{}), (Parts{0, 1, 4, 64}));
  EXPECT_EQ(parts(nn::XFormersAttnProcessor{}, 100), (Parts{0, 1, 4, 100}));
  EXPECT_EQ(parts(nn::XFormersAttnProcessor{AttentionOp::kFlash}, 100), (Parts{0, 1, 4, 64}));
  EXPECT_EQ(parts(nn::XFormersAttnProcessor{AttentionOp::kSingleBlock}), (Parts{0, 1, 4, 200}));
  EXPECT_EQ(
      parts(nn::CustomDiffusionXFormersAttnProcessor{.attention_op = AttentionOp::kSingleBlock}),
      (Parts{0, 1, 4, 200}));
  EXPECT_EQ(parts(nn::LoRAXFormersAttnProcessor{.attention_op = AttentionOp::kSingleBlock}),
            (Parts{0, 1, 4 + 8, 200}));
  // Two more projections.
  EXPECT_EQ(parts(nn::AttnAddedKVProcessor{}), (Parts{1, 0, 8}));
  EXPECT_EQ(parts(nn::AttnAddedKVProcessor2_0{}), (Parts{0, 1, 6, 64}));
  EXPECT_EQ(parts(nn::SlicedAttnAddedKVProcessor{4}), (Parts{2, 0, 10}));
  EXPECT_EQ(parts(nn::LoRAAttnAddedKVProcessor{}), (Parts{1, 0, 8 + 12}));
}

TEST(AttentionProcessorTest, SlicesBoundTheScores) {
  // 8 heads of 256 x 256 scores: 262,144 bytes a row of batch * heads.
  constexpr int64_t kRow = 256 * 256 * 4;
  Attention attention({.query_dim = 16, .heads = 8, .dim_head = 2});
  attention.SetTrainingMode(false);
  Tensor x = Normal({1, 256, 16}, 1);
  auto peak = [&](const AttentionProcessor& processor) {
    attention.SetProcessor(processor);
    attention.Forward(x);  // exports the graph
    int64_t before = MemoryStats::LiveBytes();
    MemoryStats::ResetPeak();
    attention.Forward(x);
    return MemoryStats::PeakBytes() - before;
  };
  int64_t all = peak(nn::AttnProcessor{}), fused = peak(nn::AttnProcessor2_0{});
  EXPECT_GT(all, 8 * kRow);
  EXPECT_LT(fused, kRow);
  // Scores and weights of one slice, and values of the size of the input.
  int64_t rest = 12 * 256 * 16 * 4;
  for (int64_t slice : {1, 2, 4}) {
    int64_t bytes = peak(nn::SlicedAttnProcessor{slice});
    EXPECT_GT(bytes, slice * kRow) << slice;
    EXPECT_LT(bytes, 2 * slice * kRow + rest) << slice;
  }
}

// ---------------------------------------------------------------- errors

TEST(AttentionProcessorTest, MisfitsAreRefusedAndChangeNothing) {
  Attention plain({.query_dim = 6, .cross_attention_dim = 7, .heads = 3, .dim_head = 2});
  auto error = [&](Attention& attention, const AttentionProcessor& processor) {
    std::string_view before = nn::NameOf(attention.processor());
    size_t parameters = attention.ParameterShapes().size();
    std::string text = MessageOf<ValueError>([&] { attention.SetProcessor(processor); });
    EXPECT_EQ(nn::NameOf(attention.processor()), before);
    EXPECT_EQ(attention.ParameterShapes().size(), parameters);
    return text;
  };
  EXPECT_THAT(error(plain, nn::AttnAddedKVProcessor{}), HasSubstr("needs added_kv_proj_dim"));
  EXPECT_THAT(error(plain, nn::FusedAttnProcessor2_0{}), HasSubstr("FuseProjections"));
  EXPECT_THAT(error(plain, nn::SlicedAttnProcessor{0}), HasSubstr("slice_size 0"));
  EXPECT_THAT(error(plain, nn::CrossFrameAttnProcessor{0}), HasSubstr("batch_size 0"));
  EXPECT_THAT(error(plain, nn::LoRAAttnProcessor{.rank = 0}), HasSubstr("rank 0"));
  EXPECT_THAT(error(plain, nn::LoRAAttnProcessor{.hidden_size = 8}), HasSubstr("hidden_size 8"));
  EXPECT_THAT(error(plain, nn::LoRAAttnProcessor{.cross_attention_dim = 6}),
              HasSubstr("cross_attention_dim 6"));
  EXPECT_THAT(error(plain, nn::CustomDiffusionAttnProcessor{.hidden_size = 7}),
              HasSubstr("hidden_size 7"));
  EXPECT_THAT(error(plain, nn::CustomDiffusionAttnProcessor{.dropout = 1}), HasSubstr("[0, 1)"));
  EXPECT_THAT(error(plain, nn::CustomDiffusionAttnProcessor{.train_q_out = false, .dropout = 0.1}),
              HasSubstr("dropout 0.1 has no effect"));
  Attention unscaled({.query_dim = 6, .heads = 3, .dim_head = 2, .scale_qk = false});
  for (const AttentionProcessor& processor :
       std::vector<AttentionProcessor>{nn::AttnProcessor2_0{}, nn::LoRAAttnProcessor2_0{},
                                       nn::CustomDiffusionAttnProcessor2_0{}}) {
    EXPECT_THAT(error(unscaled, processor), HasSubstr("1/sqrt(dim_head)"));
  }
  Attention residual({.query_dim = 6, .heads = 3, .dim_head = 2, .residual_connection = true});
  EXPECT_THAT(error(residual, nn::CrossFrameAttnProcessor{}), HasSubstr("residual_connection"));
  EXPECT_THAT(error(residual, nn::CustomDiffusionAttnProcessor{}), HasSubstr("residual"));
  Attention added(
      {.query_dim = 6, .heads = 3, .dim_head = 2, .added_kv_proj_dim = 4, .norm_num_groups = 2});
  EXPECT_THAT(error(added, nn::AttnProcessor{}), HasSubstr("added_kv_proj_dim"));
  EXPECT_THAT(MessageOf<UnsupportedError>([&] { added.FuseProjections(); }), HasSubstr("fused"));
  EXPECT_THAT(
      MessageOf<ValueError>([&] { Attention a({.query_dim = 6, .only_cross_attention = true}); }),
      HasSubstr("only_cross_attention"));
  EXPECT_THAT(MessageOf<UnsupportedError>([&] { plain.SetProcessor("AttnProcessor3_0"); }),
              HasSubstr("LoRAAttnAddedKVProcessor"));
  plain.FuseProjections();
  plain.SetProcessor(nn::FusedAttnProcessor2_0{});
  EXPECT_THAT(MessageOf<ValueError>([&] { plain.UnfuseProjections(); }),
              HasSubstr("another processor"));
  EXPECT_THAT(MessageOf<ShapeError>([&] {
                Attention a({.query_dim = 6, .cross_attention_dim = 6, .heads = 3, .dim_head = 2});
                a.FuseProjections();
                a.SetProcessor(nn::FusedAttnProcessor2_0{});
                a.Forward(Tensor::Zeros({1, 2, 6}));
              }),
              HasSubstr("cross-attention only"));
}

// ---------------------------------------------------------------- whole models

UNet2DConditionConfig TinyUNet() {
  UNet2DConditionConfig c;
  c.sample_size = 8;
  c.block_out_channels = {8, 16};
  c.down_block_types = {"CrossAttnDownBlock2D", "DownBlock2D"};
  c.up_block_types = {"UpBlock2D", "CrossAttnUpBlock2D"};
  c.layers_per_block = {1};
  c.norm_num_groups = 4;
  c.cross_attention_dim = {6};
  c.attention_head_dim = {4};
  return c;
}

TEST(AttentionModulesTest, OrderAndSetting) {
  UNet2DConditionModel unet(TinyUNet());
  auto processors = nn::AttnProcessors(unet);
  ASSERT_EQ(processors.size(), 8u);
  EXPECT_EQ(processors[0].first, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor");
  EXPECT_EQ(processors[2].first, "up_blocks.1.attentions.0.transformer_blocks.0.attn1.processor");
  EXPECT_EQ(processors[7].first, "mid_block.attentions.0.transformer_blocks.0.attn2.processor");
  EXPECT_EQ(nn::NameOf(processors[0].second), "AttnProcessor2_0");

  std::map<std::string, AttentionProcessor> map(processors.begin(), processors.end());
  map[processors[0].first] = nn::SlicedAttnProcessor{2};
  nn::SetAttnProcessor(unet, map);
  EXPECT_EQ(nn::NameOf(nn::AttnProcessors(unet)[0].second), "SlicedAttnProcessor");
  EXPECT_EQ(nn::NameOf(nn::AttnProcessors(unet)[1].second), "AttnProcessor2_0");
  auto extracted = map.extract(processors[1].first);
  extracted.key() = "down_blocks.7.processor";
  map.insert(std::move(extracted));
  std::string text = MessageOf<ValueError>([&] { nn::SetAttnProcessor(unet, map); });
  EXPECT_THAT(text, HasSubstr(processors[1].first));
  EXPECT_THAT(text, HasSubstr("down_blocks.7.processor"));
  EXPECT_THROW(nn::SetAttnProcessor(unet, nn::FusedAttnProcessor2_0{}), ValueError);
  EXPECT_EQ(nn::NameOf(nn::AttnProcessors(unet)[0].second), "SlicedAttnProcessor");
  nn::SetDefaultAttnProcessor(unet);
  for (const auto& [name, processor] : nn::AttnProcessors(unet)) {
    EXPECT_EQ(nn::NameOf(processor), "AttnProcessor");
  }
}

TEST(AttentionModulesTest, SlicingFusingAndLoRAOfAUNet) {
  UNet2DConditionModel unet(TinyUNet());
  unet.SetTrainingMode(false);
  unet.Initialize(4);
  Tensor x = Normal({2, 4, 8, 8}, 1), t = Tensor::From({1}, std::vector<float>{300}),
         e = Normal({2, 5, 6}, 2);
  auto run = [&] { return unet.Forward({x, t, e}); };
  auto sizes = [&] {
    std::vector<int64_t> sizes;
    for (const auto& [name, processor] : nn::AttnProcessors(unet)) {
      sizes.push_back(std::get<nn::SlicedAttnProcessor>(processor).slice_size);
    }
    return sizes;
  };
  Tensor expected = run();
  constexpr double kClose = 5e-6;
  nn::SetAttentionSlice(unet, "auto");
  EXPECT_THAT(sizes(), ElementsAre(2, 2, 2, 2, 2, 2, 2, 2));
  EXPECT_LT(RelativeError(run(), expected), kClose);
  nn::SetAttentionSlice(unet, "max");
  EXPECT_THAT(sizes(), ElementsAre(1, 1, 1, 1, 1, 1, 1, 1));
  nn::SetAttentionSlice(unet, 3);
  EXPECT_THAT(sizes(), ElementsAre(3, 3, 3, 3, 3, 3, 3, 3));
  EXPECT_LT(RelativeError(run(), expected), kClose);
  nn::SetAttentionSlice(unet, std::vector<int64_t>{1, 2, 3, 4, 1, 2, 3, 4});
  EXPECT_THAT(sizes(), ElementsAre(1, 2, 3, 4, 1, 2, 3, 4));
  EXPECT_THAT(MessageOf<ValueError>([&] { nn::SetAttentionSlice(unet, 5); }),
              HasSubstr("slice size 5 for down_blocks.0"));
  EXPECT_THAT(MessageOf<ValueError>([&] { nn::SetAttentionSlice(unet, std::vector<int64_t>{1}); }),
              HasSubstr("1 slice sizes for 8"));
  EXPECT_THROW(nn::SetAttentionSlice(unet, "half"), ValueError);
  EXPECT_THAT(sizes(), ElementsAre(1, 2, 3, 4, 1, 2, 3, 4));
  nn::SetAttentionSlice(unet, "none");
  EXPECT_EQ(RelativeError(run(), expected), 0);

  size_t parameters = unet.ParameterShapes().size();
  auto before = nn::FuseQkvProjections(unet);
  EXPECT_EQ(unet.ParameterShapes().size(), parameters + 8);
  EXPECT_EQ(nn::NameOf(nn::AttnProcessors(unet)[3].second), "FusedAttnProcessor2_0");
  for (const AttentionProcessor& other : std::vector<AttentionProcessor>{
           nn::CrossFrameAttnProcessor{}, nn::CustomDiffusionAttnProcessor{}}) {
    EXPECT_THAT(MessageOf<ValueError>([&] { nn::SetDefaultAttnProcessor(unet); }),
                HasSubstr("no default to go back to"));
    nn::SetAttnProcessor(unet, other);
  }
  EXPECT_THAT(MessageOf<ValueError>([&] { nn::SetDefaultAttnProcessor(unet); }),
              HasSubstr("CustomDiffusionAttnProcessor"));
  nn::SetAttnProcessor(unet, nn::FusedAttnProcessor2_0{});
  EXPECT_LT(RelativeError(run(), expected), kClose);
  nn::UnfuseQkvProjections(unet, before);
  EXPECT_EQ(unet.ParameterShapes().size(), parameters);
  EXPECT_EQ(RelativeError(run(), expected), 0);

  nn::SetAttnProcessor(unet, nn::LoRAAttnProcessor2_0{});
  EXPECT_EQ(unet.ParameterShapes().size(), parameters + 8 * 8);
  EXPECT_LT(RelativeError(run(), expected), kClose);  // up = 0
  std::string name =
      "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.up.weight";
  unet.FindParameter(name)->Write().CopyFrom(Normal({16, 4}, 3));
  EXPECT_GT(RelativeError(run(), expected), 1e-4);
  EXPECT_THAT(MessageOf<ValueError>([&] { nn::SetAttentionSlice(unet, 1); }),
              HasSubstr("would be lost"));
  EXPECT_THAT(MessageOf<ValueError>([&] { nn::FuseQkvProjections(unet); }), HasSubstr("be lost"));
  EXPECT_THAT(MessageOf<ValueError>([&] { nn::SetDefaultAttnProcessor(unet); }),
              HasSubstr("the LoRAAttnProcessor2_0 of down_blocks.0"));
  EXPECT_EQ(unet.ParameterShapes().size(), parameters + 8 * 8);
  nn::SetAttnProcessor(unet, nn::AttnProcessor{});
  EXPECT_EQ(unet.ParameterShapes().size(), parameters);
}

TEST(AttentionModulesTest, XFormersOnAndOff) {
  UNet2DConditionModel unet(TinyUNet());
  unet.SetTrainingMode(false);
  unet.Initialize(4);
  Tensor x = Normal({2, 4, 8, 8}, 1), t = Tensor::From({1}, std::vector<float>{300}),
         e = Normal({2, 5, 6}, 2);
  for (const AttentionProcessor& processor : std::vector<AttentionProcessor>{
           nn::AttnProcessor2_0{}, nn::CustomDiffusionAttnProcessor{},
           nn::LoRAAttnProcessor{.rank = 2, .network_alpha = 5, .scale = 0.5}}) {
    SCOPED_TRACE(nn::NameOf(processor));
    nn::SetAttnProcessor(unet, processor);
    for (const ParameterPtr& p : unet.NamedParameters()) {
      if (p->name().find(".processor.") != std::string::npos) {
        p->Write().CopyFrom(
            Random(p->name().size()).UniformTensor(p->value().shape(), -0.3f, 0.3f));
      }
    }
    size_t number = 0;
    for (const ParameterPtr& p : unet.NamedParameters()) p->set_trainable(++number % 3 != 0);
    auto trainable = [&] {
      std::map<std::string, bool> flags;
      for (const ParameterPtr& p : unet.NamedParameters()) flags[p->name()] = p->trainable();
      return flags;
    };
    const auto flags = trainable();
    auto kept = unet.SaveParameters();
    Tensor expected = unet.Forward({x, t, e});
    for (bool use : {true, false}) {
      nn::SetUseMemoryEfficientAttentionXFormers(unet, use, nn::AttentionOp::kSingleBlock);
      std::string_view name = nn::NameOf(nn::AttnProcessors(unet)[5].second);
      EXPECT_EQ(name.find("XFormers") != std::string_view::npos, use) << name;
      EXPECT_EQ(name.ends_with("2_0"), !use) << name;
      EXPECT_EQ(name.starts_with("LoRA"), nn::NameOf(processor).starts_with("LoRA"));
      EXPECT_EQ(name.starts_with("Custom"), nn::NameOf(processor).starts_with("Custom"));
      auto now = unet.SaveParameters();
      ASSERT_EQ(now.size(), kept.size());
      for (const auto& [path, value] : kept) EXPECT_EQ(RelativeError(now.at(path), value), 0);
      EXPECT_EQ(trainable(), flags);
      EXPECT_LT(RelativeError(unet.Forward({x, t, e}), expected), 5e-6);
    }
  }
  nn::SetAttnProcessor(unet, nn::CrossFrameAttnProcessor{});
  EXPECT_THAT(
      MessageOf<UnsupportedError>([&] { nn::SetUseMemoryEfficientAttentionXFormers(unet, true); }),
      HasSubstr("CrossFrameAttnProcessor"));
}

}  // namespace
}  // namespace calotype
