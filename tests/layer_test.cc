// The layer base class, and every building block against float64 and finite differences.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

#include "layer_gradient.h"
#include "layers/activation.h"
#include "layers/attention.h"
#include "layers/conv2d.h"
#include "layers/feed_forward.h"
#include "layers/linear.h"
#include "layers/norm.h"
#include "layers/resample.h"
#include "layers/resnet.h"
#include "layers/timesteps.h"
#include "layers/transformer.h"

namespace calotype {
namespace {

using nn::Attention;
using nn::Conv2d;
using nn::GroupNorm;
using nn::LayerNorm;
using nn::Linear;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

template <class E, class F>
std::string MessageOf(F f) {
  try {
    f();
  } catch (const E& error) {
    return error.what();
  }
  ADD_FAILURE() << "no error of the expected type";
  return "";
}

// ---------------------------------------------------------------- every layer

// Draws the sizes and inputs of a case.
struct Draw {
  Random random;
  int64_t Size(int64_t low, int64_t high) { return low + random.Integer(high - low + 1); }
  Tensor Normal(const Shape& shape) { return random.NormalTensor(shape); }
};

struct LayerCase {
  std::string name;
  std::function<void(Draw&)> run;
};
std::ostream& operator<<(std::ostream& stream, const LayerCase& layer_case) {
  return stream << layer_case.name;
}

void CheckConv(Draw& d, Conv2d::Options o, Shape x) {
  o.in_channels = x[1];
  o.out_channels = d.Size(1, 5);
  Conv2d layer(o);
  CheckLayer(layer, {d.Normal(x)});
}

void CheckResnet(Draw& d, const std::function<void(nn::ResnetBlock2D::Options&)>& change) {
  nn::ResnetBlock2D::Options o{
      .in_channels = 4, .out_channels = 6, .temb_channels = d.Size(2, 7), .groups = 2, .eps = 1e-5};
  change(o);
  nn::ResnetBlock2D layer(o);
  int64_t batch = d.Size(1, 3);
  std::vector<Tensor> inputs = {d.Normal({batch, o.in_channels, d.Size(2, 6), d.Size(2, 6)})};
  if (o.temb_channels > 0) inputs.push_back(d.Normal({d.Size(0, 1) ? batch : 1, o.temb_channels}));
  CheckLayer(layer, inputs);
}

void CheckAttention(Draw& d, const std::function<void(Attention::Options&)>& change,
                    const std::string& form) {
  for (const char* processor : {"AttnProcessor", "AttnProcessor2_0"}) {
    SCOPED_TRACE(processor);
    Attention::Options o{.query_dim = 6, .heads = 3, .dim_head = 4};
    if (form.starts_with("cross")) o.cross_attention_dim = d.Size(3, 9);
    change(o);
    if (!o.scale_qk && std::string(processor) == "AttnProcessor2_0") continue;
    o.processor = processor;
    Attention layer(o);
    int64_t batch = d.Size(1, 3), keys = d.Size(1, 9), height = d.Size(1, 4), width = d.Size(1, 5);
    int64_t tokens = height * width;
    bool picture = form.ends_with("picture");
    std::vector<Tensor> inputs = {picture ? d.Normal({batch, 6, height, width})
                                          : d.Normal({batch, tokens, 6})};
    if (form.starts_with("cross")) {
      inputs.push_back(d.Normal({form == "cross shared" ? 1 : batch, keys, o.cross_attention_dim}));
    }
    CheckLayer(layer, inputs);
  }
}

void CheckBlock(Draw& d, nn::BasicTransformerBlock::Options o, bool context) {
  o.dim = 6;
  o.num_attention_heads = 2;
  o.attention_head_dim = 3;
  nn::BasicTransformerBlock layer(o);
  int64_t batch = d.Size(1, 3);
  std::vector<Tensor> inputs = {d.Normal({batch, d.Size(1, 7), 6})};
  if (context) inputs.push_back(d.Normal({batch, d.Size(1, 6), o.cross_attention_dim}));
  CheckLayer(layer, inputs);
}

std::vector<LayerCase> LayerCases() {
  std::vector<LayerCase> cases = {
      {"LinearVector",
       [](Draw& d) {
         Linear layer({d.Size(1, 9), d.Size(1, 9)});
         CheckLayer(layer, {d.Normal({layer.options().in_features})});
       }},
      {"LinearMatrix",
       [](Draw& d) {
         Linear layer({d.Size(1, 9), d.Size(1, 9), false});
         CheckLayer(layer, {d.Normal({d.Size(1, 5), layer.options().in_features})});
       }},
      {"LinearTokens",
       [](Draw& d) {
         Linear layer({d.Size(1, 9), d.Size(1, 9)});
         CheckLayer(layer, {d.Normal({d.Size(1, 3), d.Size(1, 5), layer.options().in_features})});
       }},
      {"Embedding",
       [](Draw& d) {
         nn::Embedding layer({d.Size(1, 6), d.Size(1, 5)});
         Tensor ids({d.Size(1, 3), d.Size(1, 4)}, DType::kI64);
         for (int64_t& id : ids.values<int64_t>()) {
           id = d.random.Integer(layer.options().num_embeddings);
         }
         CheckLayer(layer, {ids});
       }},
      {"Conv2dPadded",
       [](Draw& d) {
         CheckConv(d, {.padding = 1}, {d.Size(1, 3), d.Size(1, 4), d.Size(1, 6), d.Size(1, 6)});
       }},
      {"Conv2dStride",
       [](Draw& d) {
         CheckConv(d, {.stride = 2, .padding = 1},
                   {d.Size(1, 3), d.Size(1, 4), d.Size(2, 6), d.Size(2, 6)});
       }},
      {"Conv2dPointwise",
       [](Draw& d) {
         CheckConv(d, {.kernel_size = 1, .bias = false},
                   {d.Size(1, 3), d.Size(1, 4), d.Size(1, 6), d.Size(1, 6)});
       }},
      {"GroupNorm",
       [](Draw& d) {
         GroupNorm layer({2, 2 * d.Size(1, 4)});
         CheckLayer(layer,
                    {d.Normal({d.Size(1, 3), layer.options().num_channels, d.Size(2, 5), 3})});
       }},
      {"GroupNormPlain",
       [](Draw& d) {
         GroupNorm layer({3, 6, 1e-2, false});
         CheckLayer(layer, {d.Normal({d.Size(1, 3), 6, d.Size(2, 5)})});
       }},
      {"LayerNorm",
       [](Draw& d) {
         LayerNorm layer({d.Size(3, 9)});
         CheckLayer(layer, {d.Normal({d.Size(1, 3), 4, layer.options().normalized_shape})});
       }},
      {"LayerNormPlain",
       [](Draw& d) {
         LayerNorm layer({d.Size(3, 9), 1e-3, false});
         CheckLayer(layer, {d.Normal({d.Size(1, 6), layer.options().normalized_shape})});
       }},
      {"Timesteps",
       [](Draw& d) {
         nn::Timesteps layer({.num_channels = 2 * d.Size(1, 6)});
         CheckLayer(layer, {d.random.UniformTensor({d.Size(1, 5)}, 0, 8)});
       }},
      {"TimestepsOddShifted",
       [](Draw& d) {
         nn::Timesteps layer({.num_channels = 2 * d.Size(2, 6) + 1,
                              .flip_sin_to_cos = false,
                              .downscale_freq_shift = 1,
                              .scale = 0.5});
         CheckLayer(layer, {d.random.UniformTensor({d.Size(1, 5)}, 0, 8)});
       }},
      {"TimestepEmbedding",
       [](Draw& d) {
         int64_t in = d.Size(1, 8);
         nn::TimestepEmbedding layer({in, d.Size(1, 8), "mish", d.Size(0, 5)});
         CheckLayer(layer, {d.Normal({d.Size(1, 3), in})});
       }},
      {"Downsample",
       [](Draw& d) {
         nn::Downsample2D layer({.channels = 3, .use_conv = true, .out_channels = d.Size(0, 5)});
         CheckLayer(layer, {d.Normal({d.Size(1, 3), 3, d.Size(2, 6), d.Size(2, 6)})});
       }},
      {"DownsamplePad0",
       [](Draw& d) {
         nn::Downsample2D layer({.channels = 3, .use_conv = true, .padding = 0});
         CheckLayer(layer, {d.Normal({d.Size(1, 3), 3, d.Size(2, 6), d.Size(2, 6)})});
       }},
      {"DownsampleMean",
       [](Draw& d) {
         nn::Downsample2D layer({.channels = 3});
         CheckLayer(layer, {d.Normal({d.Size(1, 3), 3, d.Size(2, 7), d.Size(2, 7)})});
       }},
      {"Upsample",
       [](Draw& d) {
         nn::Upsample2D layer({.channels = 3, .use_conv = true, .out_channels = d.Size(0, 5)});
         CheckLayer(layer, {d.Normal({d.Size(1, 3), 3, d.Size(1, 5), d.Size(1, 5)})});
       }},
      {"UpsampleNearest",
       [](Draw& d) {
         nn::Upsample2D layer({.channels = 3});
         CheckLayer(layer, {d.Normal({d.Size(1, 3), 3, d.Size(1, 5), d.Size(1, 5)})});
       }},
      {"ResnetTemb", [](Draw& d) { CheckResnet(d, [](auto&) {}); }},
      {"ResnetScaleShift",
       [](Draw& d) { CheckResnet(d, [](auto& o) { o.time_embedding_norm = "scale_shift"; }); }},
      {"ResnetSkipTimeAct",
       [](Draw& d) { CheckResnet(d, [](auto& o) { o.skip_time_act = true; }); }},
      {"ResnetNoTemb",
       [](Draw& d) {
         CheckResnet(d, [](auto& o) {
           o.temb_channels = 0;
           o.out_channels = 0;
         });
       }},
      {"ResnetUp",
       [](Draw& d) {
         CheckResnet(d, [](auto& o) {
           o.up = true;
           o.non_linearity = "gelu";
         });
       }},
      {"ResnetDown",
       [](Draw& d) {
         CheckResnet(d, [](auto& o) {
           o.down = true;
           o.output_scale_factor = 1.5;
         });
       }},
      {"ResnetShortcut",
       [](Draw& d) {
         CheckResnet(d, [](auto& o) {
           o.out_channels = 4;
           o.use_in_shortcut = true;
           o.conv_shortcut_bias = false;
           o.groups_out = 4;
         });
       }},
      {"ResnetTwoWidths",
       [](Draw& d) { CheckResnet(d, [](auto& o) { o.conv_2d_out_channels = 8; }); }},
      {"AttentionSelf",
       [](Draw& d) {
         CheckAttention(
             d, [](auto&) {}, "self");
       }},
      {"AttentionCross",
       [](Draw& d) {
         CheckAttention(
             d, [](auto& o) { o.bias = true; }, "cross");
       }},
      {"AttentionCrossShared",
       [](Draw& d) {
         CheckAttention(
             d, [](auto&) {}, "cross shared");
       }},
      {"AttentionCrossLayerNorm",
       [](Draw& d) {
         CheckAttention(
             d, [](auto& o) { o.cross_attention_norm = "layer_norm"; }, "cross");
       }},
      {"AttentionCrossGroupNorm",
       [](Draw& d) {
         CheckAttention(
             d,
             [](auto& o) {
               o.cross_attention_dim = 8;
               o.cross_attention_norm = "group_norm";
               o.cross_attention_norm_num_groups = 2;
             },
             "cross");
       }},
      {"AttentionQkNorm",
       [](Draw& d) {
         CheckAttention(
             d,
             [](auto& o) {
               o.qk_norm = "layer_norm";
               o.out_bias = false;
             },
             "self");
       }},
      {"AttentionPicture",
       [](Draw& d) {
         CheckAttention(
             d,
             [](auto& o) {
               o.norm_num_groups = 3;
               o.residual_connection = true;
               o.rescale_output_factor = 1.5;
             },
             "self picture");
       }},
      {"AttentionTokensGroupNorm",
       [](Draw& d) {
         CheckAttention(
             d, [](auto& o) { o.norm_num_groups = 2; }, "self");
       }},
      {"AttentionUnscaled",
       [](Draw& d) {
         CheckAttention(
             d, [](auto& o) { o.scale_qk = false; }, "cross picture");
       }},
      {"AttentionOutDim",
       [](Draw& d) {
         CheckAttention(
             d, [](auto& o) { o.out_dim = 8; }, "self");
       }},
      {"BlockCross", [](Draw& d) { CheckBlock(d, {.cross_attention_dim = 5}, true); }},
      {"BlockSelf", [](Draw& d) { CheckBlock(d, {.ff_inner_dim = 7}, false); }},
      {"BlockDoubleSelf",
       [](Draw& d) {
         CheckBlock(d, {.activation_fn = "gelu", .double_self_attention = true}, false);
       }},
      {"BlockOnlyCross",
       [](Draw& d) {
         CheckBlock(d,
                    {.cross_attention_dim = 5,
                     .attention_bias = true,
                     .only_cross_attention = true,
                     .norm_elementwise_affine = false},
                    true);
       }},
      {"BlockContextFromItself",
       [](Draw& d) {
         CheckBlock(d, {.cross_attention_dim = 6, .attention_out_bias = false}, false);
       }},
  };
  for (const char* name :
       {"silu", "swish", "gelu", "gelu-approximate", "quick_gelu", "mish", "relu", "identity"}) {
    std::string title = fmt::format("Activation_{}", name);
    std::ranges::replace(title, '-', '_');
    cases.push_back({title, [name](Draw& d) {
                       nn::Activation layer(name);
                       CheckLayer(layer, {d.Normal({d.Size(1, 5), d.Size(1, 5)})});
                     }});
  }
  for (const char* name :
       {"geglu", "swiglu", "gelu", "gelu-approximate", "geglu-approximate", "linear-silu"}) {
    std::string title = fmt::format("FeedForward_{}", name);
    std::ranges::replace(title, '-', '_');
    cases.push_back({title, [name](Draw& d) {
                       int64_t dim = d.Size(1, 5);
                       nn::FeedForward layer({.dim = dim,
                                              .dim_out = d.Size(0, 4),
                                              .mult = d.Size(1, 4),
                                              .activation_fn = name,
                                              .bias = d.Size(0, 1) == 1});
                       CheckLayer(layer, {d.Normal({d.Size(1, 3), d.Size(1, 4), dim})});
                     }});
  }
  for (bool linear : {false, true}) {
    cases.push_back({linear ? "TransformerLinear" : "TransformerConv", [linear](Draw& d) {
                       nn::Transformer2DModel layer({.num_attention_heads = 2,
                                                     .attention_head_dim = 3,
                                                     .in_channels = 4,
                                                     .num_layers = d.Size(1, 2),
                                                     .norm_num_groups = 2,
                                                     .cross_attention_dim = 5,
                                                     .use_linear_projection = linear});
                       int64_t batch = d.Size(1, 3);
                       CheckLayer(layer, {d.Normal({batch, 4, d.Size(1, 4), d.Size(1, 4)}),
                                          d.Normal({batch, d.Size(1, 5), 5})});
                     }});
  }
  return cases;
}

class EveryLayer : public ::testing::TestWithParam<LayerCase> {};

TEST_P(EveryLayer, MatchesFloat64AndFiniteDifferences) {
  for (uint64_t seed = 1; seed <= 2; ++seed) {
    SCOPED_TRACE(fmt::format("seed {}", seed));
    Draw draw{Random(seed, GetParam().name)};
    GetParam().run(draw);
  }
}
INSTANTIATE_TEST_SUITE_P(Layers, EveryLayer, ::testing::ValuesIn(LayerCases()),
                         [](const auto& info) { return info.param.name; });

// ---------------------------------------------------------------- single facts

TEST(TimestepsTest, AgreesWithFloat64) {
  // f_i and t f_i are rounded to float32 by definition; from there on sine and cosine are exact.
  for (bool flip : {false, true}) {
    nn::Timesteps layer({.num_channels = 64, .flip_sin_to_cos = flip, .downscale_freq_shift = 1});
    std::vector<int64_t> timesteps;
    for (int64_t t = 0; t < 1000; t += 37) timesteps.push_back(t);
    timesteps.push_back(999);
    auto count = static_cast<int64_t>(timesteps.size());
    Tensor y = layer.Forward(Tensor::From(Shape{count}, timesteps));
    ASSERT_EQ(y.shape(), Shape({count, 64}));
    double worst = 0, worst_exact = 0;
    for (int64_t b = 0; b < count; ++b) {
      for (int64_t i = 0; i < 32; ++i) {
        auto t = static_cast<double>(timesteps[b]);
        double exact = t * std::exp(-std::log(10000.0) * static_cast<double>(i) / 31);
        auto exponent = static_cast<float>(-std::log(10000.0)) * static_cast<float>(i) / 31.0f;
        float angle = static_cast<float>(t) * static_cast<float>(std::exp(double{exponent}));
        double sine = y.data()[b * 64 + i + (flip ? 32 : 0)];
        double cosine = y.data()[b * 64 + i + (flip ? 0 : 32)];
        worst = std::max({worst, std::abs(sine - std::sin(double{angle})),
                          std::abs(cosine - std::cos(double{angle}))});
        worst_exact = std::max(
            {worst_exact, std::abs(sine - std::sin(exact)), std::abs(cosine - std::cos(exact))});
      }
    }
    EXPECT_LT(worst, 3e-7);
    EXPECT_LT(worst_exact, 1e-4);
  }
}

TEST(UpsampleTest, ResizesToAnySize) {
  nn::Upsample2D layer({.channels = 2});
  ComputationGraph graph;
  graph.Output("out", layer.Resize(graph.Input("x", Shape{1, 2, 3, 2}), 5, 3));
  Tensor x = Random(1).NormalTensor({1, 2, 3, 2});
  Tensor y = Interpreter(graph).Run(std::span(&x, 1))[0];
  ASSERT_EQ(y.shape(), Shape({1, 2, 5, 3}));
  for (int64_t c = 0; c < 2; ++c) {
    for (int64_t i = 0; i < 5; ++i) {
      for (int64_t j = 0; j < 3; ++j) {
        EXPECT_EQ(y.data()[(c * 5 + i) * 3 + j], x.data()[(c * 3 + i * 3 / 5) * 2 + j * 2 / 3]);
      }
    }
  }
}

TEST(LayerErrorTest, OptionsAreChecked) {
  EXPECT_THAT(MessageOf<ValueError>([] { nn::Activation layer("sine"); }), HasSubstr("quick_gelu"));
  EXPECT_THAT(MessageOf<ValueError>([] { Linear layer({0, 3}); }), HasSubstr("in_features 0"));
  EXPECT_THAT(MessageOf<ValueError>([] { GroupNorm layer({3, 8}); }), HasSubstr("must divide"));
  EXPECT_THAT(
      MessageOf<ValueError>([] { nn::FeedForward layer({.dim = 3, .activation_fn = "x"}); }),
      HasSubstr("geglu"));
  EXPECT_THAT(
      MessageOf<UnsupportedError>([] { nn::FeedForward layer({.dim = 3, .dropout = 0.1}); }),
      HasSubstr("dropout"));
  EXPECT_THAT(MessageOf<UnsupportedError>(
                  [] { nn::ResnetBlock2D layer({.in_channels = 32, .dropout = 0.1}); }),
              HasSubstr("dropout"));
  EXPECT_THAT(MessageOf<UnsupportedError>([] {
                nn::ResnetBlock2D layer({.in_channels = 32, .time_embedding_norm = "ada_group"});
              }),
              HasSubstr("ada_group"));
  EXPECT_THAT(
      MessageOf<ValueError>([] {
        nn::ResnetBlock2D layer({.in_channels = 32, .out_channels = 64, .use_in_shortcut = false});
      }),
      HasSubstr("shortcut"));
  EXPECT_THAT(
      MessageOf<UnsupportedError>([] { Attention layer({.query_dim = 8, .dropout = 0.1}); }),
      HasSubstr("dropout"));
  EXPECT_THAT(
      MessageOf<UnsupportedError>([] { Attention layer({.query_dim = 8, .qk_norm = "rms_norm"}); }),
      HasSubstr("rms_norm"));
  EXPECT_THAT(
      MessageOf<UnsupportedError>([] { Attention layer({.query_dim = 8, .processor = "Sparse"}); }),
      HasSubstr("AttnProcessor2_0"));
  EXPECT_THAT(
      MessageOf<UnsupportedError>([] {
        Attention layer({.query_dim = 8, .scale_qk = false, .processor = "AttnProcessor2_0"});
      }),
      HasSubstr("scale"));
  EXPECT_THROW(nn::Timesteps layer({.num_channels = 2, .downscale_freq_shift = 1}), ValueError);
}

TEST(LayerErrorTest, InputsAreChecked) {
  Linear linear({3, 4});
  EXPECT_THAT(MessageOf<ShapeError>([&] {
                linear.Forward(Tensor::Zeros({2, 5}));
              }),
              HasSubstr("in_features = 3"));
  EXPECT_THAT(MessageOf<ShapeError>([&] { linear.Forward(Tensor()); }), HasSubstr("missing"));
  Conv2d conv({3, 4});
  EXPECT_THAT(MessageOf<ShapeError>([&] {
                conv.Forward(Tensor::Zeros({1, 2, 5, 5}));
              }),
              HasSubstr("3 channels"));
  Attention attention({.query_dim = 8, .cross_attention_dim = 6, .heads = 2, .dim_head = 4});
  EXPECT_THAT(MessageOf<ShapeError>([&] {
                attention.Forward(Tensor::Zeros({1, 3, 8}));
              }),
              HasSubstr("cross_attention_dim 6"));
  EXPECT_THAT(MessageOf<ShapeError>([&] {
                attention.Forward({Tensor::Zeros({2, 3, 8}), Tensor::Zeros({3, 2, 6})});
              }),
              HasSubstr("encoder_hidden_states [3, 2, 6]"));
}

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

  // A sub-layer loads by paths that start at itself.
  Outer outer;
  EXPECT_TRUE(outer.pair()->LoadParameters(source.SaveParameters()).complete());
  EXPECT_EQ(RelativeError(outer.pair()->Forward(Tensor::Full({1, 3}, 1)),
                          source.Forward(Tensor::Full({1, 3}, 1))),
            0);
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
