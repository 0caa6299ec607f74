// Every building block against float64 and finite differences, and the facts that are special to
// one.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>

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
#include "tests/expect_error.h"
#include "tests/layer_gradient.h"

namespace calotype {
namespace {

using nn::Attention;
using nn::Conv2d;
using nn::GroupNorm;
using nn::LayerNorm;
using nn::Linear;
using ::testing::HasSubstr;

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

TEST(AttentionTest, Masks) {
  Random random(1);
  Tensor x = random.NormalTensor({2, 5, 6}), context = random.NormalTensor({2, 4, 7});
  auto run = [&](const char* processor, const Tensor& e, const Tensor& mask) {
    Attention layer({.query_dim = 6,
                     .cross_attention_dim = 7,
                     .heads = 3,
                     .dim_head = 2,
                     .processor = processor});
    return layer.Forward({x, e, mask});
  };
  for (const char* processor : {"AttnProcessor", "AttnProcessor2_0"}) {
    SCOPED_TRACE(processor);
    Tensor plain = run(processor, context, Tensor());
    EXPECT_EQ(RelativeError(run(processor, context, Tensor::Zeros({2, 1, 4})), plain), 0);
    // Dropping the last two tokens by a mask is leaving them out.
    Tensor mask = Tensor::Zeros({2, 1, 4}), shorter({2, 2, 7});
    for (int64_t b = 0; b < 2; ++b) {
      mask.data()[b * 4 + 2] = mask.data()[b * 4 + 3] = -10000;
      std::copy_n(std::as_const(context).data() + b * 28, 14, shorter.data() + b * 14);
    }
    Tensor masked = run(processor, context, mask);
    EXPECT_LT(RelativeError(masked, run(processor, shorter, Tensor())), 1e-6);
    EXPECT_GT(RelativeError(masked, plain), 1e-2);
    // The same for every query, and for every head: [B, T, S] and [B * heads, 1, S].
    Tensor by_query({2, 5, 4}), by_head({6, 1, 4});
    for (int64_t i = 0; i < by_query.elements(); ++i) {
      by_query.data()[i] = mask.data()[i / 20 * 4 + i % 4];
    }
    for (int64_t i = 0; i < by_head.elements(); ++i) {
      by_head.data()[i] = mask.data()[i / 12 * 4 + i % 4];
    }
    EXPECT_LT(RelativeError(run(processor, context, by_query), masked), 1e-6);
    EXPECT_LT(RelativeError(run(processor, context, by_head), masked), 1e-6);
    // Rows b * heads + h: a mask of one head of one sample changes that sample only.
    by_head = Tensor::Zeros({6, 1, 4});
    for (int64_t j = 1; j < 4; ++j) by_head.data()[4 * 4 + j] = -10000;
    Tensor one = run(processor, context, by_head);
    for (int64_t i = 0; i < 30; ++i) EXPECT_EQ(one.data()[i], plain.data()[i]);
    EXPECT_GT(RelativeError(one, plain), 1e-3);

    for (const Shape& wrong : {Shape{2, 4}, Shape{2, 1, 3}, Shape{3, 1, 4}, Shape{2, 2, 4}}) {
      EXPECT_THAT(MessageOf<ShapeError>([&] { run(processor, context, Tensor::Zeros(wrong)); }),
                  HasSubstr("attention_mask " + wrong.ToString()));
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

}  // namespace
}  // namespace calotype
