// Models: golden fixtures of diffusers through Layer::Forward and Layer::Backward, configurations,
// the caption encoder. (conformance_test runs more fixtures, on both back ends.)
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/json.h"
#include "core/random.h"
#include "io/safetensors.h"
#include "layers/diffusion_cross_attention.h"
#include "layers/flash_attention_layer.h"
#include "models/caption_encoder.h"
#include "models/presets.h"
#include "models/unet_2d_condition.h"
#include "tests/expect_error.h"
#include "tests/temp_folder.h"

namespace calotype {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using test::ReadText;
using ::testing::HasSubstr;

fs::path Fixture(const std::string& name) {
  return fs::path(CALOTYPE_TEST_DATA) / "fixtures" / name;
}

double Largest(const Tensor& t) {
  double largest = 0;
  for (float x : t.values()) largest = std::max(largest, std::abs(static_cast<double>(x)));
  return largest;
}

double LargestDifference(const Tensor& a, const Tensor& b) {
  EXPECT_EQ(a.shape(), b.shape());
  double largest = 0;
  for (int64_t i = 0; i < a.elements(); ++i) {
    largest = std::max(largest, std::abs(static_cast<double>(a.data()[i]) - b.data()[i]));
  }
  return largest;
}

// Loads the case's parameters into `layer`, runs it on the inputs of these names (absent ones
// undefined), compares outputs and all gradients.
void CheckFixture(Layer& layer, const fs::path& folder, const std::vector<std::string>& names,
                  double output_tolerance, double gradient_tolerance) {
  SCOPED_TRACE(folder.string());
  std::map<std::string, Tensor> tensors = ReadSafetensors(folder / "tensors.safetensors").tensors;
  std::map<std::string, Tensor> parameters;
  if (fs::exists(folder / "diffusion_pytorch_model.safetensors")) {
    parameters = ReadSafetensors(folder / "diffusion_pytorch_model.safetensors").tensors;
  } else {
    for (const auto& [name, tensor] : tensors) {
      if (name.starts_with("param.")) parameters[name.substr(6)] = tensor;
    }
  }
  EXPECT_TRUE(layer.LoadParameters(parameters).complete());

  double largest_gradient = 0;
  for (const auto& [name, tensor] : tensors) {
    if (name.starts_with("grad.")) largest_gradient = std::max(largest_gradient, Largest(tensor));
  }
  std::vector<Tensor> inputs;
  for (const std::string& name : names) {
    auto it = tensors.find("input." + name);
    inputs.push_back(it == tensors.end() ? Tensor() : it->second);
  }
  Tensor out = layer.Forward(inputs).at(0);
  double worst_output = LargestDifference(out, tensors.at("output.out")) /
                        (output_tolerance * Largest(tensors.at("output.out")));
  EXPECT_LE(worst_output, 1);

  std::vector<Tensor> gradients = layer.Backward(tensors.at("cotangent.out"));
  double worst = 0;
  int compared = 0;
  auto compare = [&](const std::string& name, const Tensor& actual) {
    auto it = tensors.find(name);
    if (it == tensors.end()) return;
    double bound = gradient_tolerance * Largest(it->second) + 1e-6 * largest_gradient;
    double share = LargestDifference(actual, it->second) / bound;
    EXPECT_LE(share, 1) << name;
    worst = std::max(worst, share);
    ++compared;
  };
  for (size_t i = 0; i < names.size(); ++i) compare("grad.input." + names[i], gradients[i]);
  for (const ParameterPtr& parameter : layer.NamedParameters()) {
    EXPECT_TRUE(tensors.contains("grad.param." + parameter->name())) << parameter->name();
    compare("grad.param." + parameter->name(), parameter->gradient);
  }
  EXPECT_GT(compared, 0);
  fmt::print("{:45} outputs {:3.0f} %, {:3} gradients {:3.0f} % of the tolerance\n",
             folder.filename().string(), 100 * worst_output, compared, 100 * worst);
}

// ---------------------------------------------------------------- fixtures

TEST(ModelFixtureTest, UNets) {
  for (const char* name : {"sd15-tiny", "sd21-tiny", "pixel-3level"}) {
    fs::path folder = Fixture("unet") / name;
    UNet2DConditionModel unet(UNet2DConditionConfig::FromJson(ReadText(folder / "config.json")));
    CheckFixture(unet, folder, {"sample", "timestep", "encoder_hidden_states"}, 8e-6, 3e-4);
  }
}

TEST(ModelFixtureTest, NamedLayers) {
  int cases = 0;
  for (const auto& entry : fs::directory_iterator(Fixture("layers"))) {
    json document = ParseJson(ReadText(entry.path() / "case.json"));
    const json& c = document.at("config");
    if (document.at("kind") == "DiffusionCrossAttention") {
      nn::DiffusionCrossAttention layer(c.at("query_dim"), c.at("context_dim"), c.at("num_heads"),
                                        c.at("spatial_size"));
      CheckFixture(layer, entry.path(), {"input", "context"}, 2e-6, 3e-5);
    } else {
      ASSERT_EQ(document.at("kind"), "FlashAttentionLayer");
      for (bool recompute : {true, false}) {
        nn::FlashAttentionConfig config{.use_causal_mask = c.at("use_causal_mask"),
                                        .recompute_in_backward = recompute};
        if (!c.at("scale_factor").is_null()) config.scale_factor = c.at("scale_factor");
        nn::FlashAttentionLayer layer(c.at("sequence_length"), c.at("embedding_dimension"),
                                      c.at("head_count"), config);
        CheckFixture(layer, entry.path(), {"input"}, 2e-6, 3e-5);
      }
    }
    ++cases;
  }
  EXPECT_EQ(cases, 7);
}

// ---------------------------------------------------------------- U-Net

TEST(UNetTest, ParameterCounts) {
  EXPECT_EQ(UNet2DConditionModel(UNetPreset("toy16")).ParameterCount(), 1001251);
  int64_t live = MemoryStats::LiveBytes();
  UNet2DConditionModel sd15(UNetPreset("sd15"));
  EXPECT_EQ(sd15.ParameterCount(), 859520964);
  EXPECT_EQ(sd15.ParameterShapes().size(), 686u);
  EXPECT_EQ(MemoryStats::LiveBytes(), live)
      << "a model of 3.4 GB must not be allocated to be counted";
  std::map<std::string, int64_t> parts;
  for (const auto& [name, shape] : sd15.ParameterShapes()) {
    std::string part = name.substr(0, name.find('.'));
    if (part.ends_with("blocks")) part = name.substr(0, part.size() + 2);
    parts[part] += shape.elements();
  }
  std::map<std::string, int64_t> expected = {
      {"down_blocks.0", 10524480}, {"down_blocks.1", 36818560}, {"down_blocks.2", 139992320},
      {"down_blocks.3", 62277120}, {"mid_block", 97038080},     {"up_blocks.0", 162241280},
      {"up_blocks.1", 258330880},  {"up_blocks.2", 71413120},   {"up_blocks.3", 18810560},
      {"time_embedding", 2050560}, {"conv_in", 11840},          {"conv_out", 11524},
      {"conv_norm_out", 640}};
  EXPECT_EQ(parts, expected);

  // The blocks with added keys and values, of diffusers' smallest tests.
  UNet2DConditionConfig simple;
  simple.block_out_channels = {32, 64};
  simple.down_block_types = {"SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"};
  simple.mid_block_type = "UNetMidBlock2DSimpleCrossAttn";
  simple.up_block_types = {"ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"};
  simple.cross_attention_dim = {32};
  simple.layers_per_block = {1};
  UNet2DConditionModel c(simple);
  EXPECT_EQ(c.ParameterCount(), 735140);
  EXPECT_EQ(c.ParameterShapes().size(), 176u);
}

TEST(UNetTest, ConfigRoundTrip) {
  for (const char* name : {"sd15-tiny", "sd21-tiny", "pixel-3level", "simple", "simple-options",
                           "class-ids", "class-vectors", "class-steps"}) {
    std::string text = ReadText(Fixture("unet") / name / "config.json");
    UNet2DConditionConfig config = UNet2DConditionConfig::FromJson(text);
    EXPECT_EQ(UNet2DConditionConfig::FromJson(config.ToJson()), config);
    // The very fields and values that diffusers wrote.
    EXPECT_EQ(ParseJson(config.ToJson()), ParseJson(text)) << name;
    EXPECT_EQ(config.ToJson().back(), '\n');
  }
  for (std::string_view name : UNetPresetNames()) {
    UNet2DConditionConfig config = UNetPreset(name);
    EXPECT_EQ(UNet2DConditionConfig::FromJson(config.ToJson()), config);
  }
  // Numbers and equal lists say the same.
  EXPECT_EQ(UNet2DConditionConfig::FromJson(R"({"attention_head_dim": [8, 8, 8, 8]})"),
            UNet2DConditionConfig::FromJson(R"({"attention_head_dim": 8})"));
  EXPECT_EQ(UNet2DConditionConfig::FromJson("{}"), UNet2DConditionConfig());
  UNet2DConditionConfig projected;
  projected.encoder_hid_dim = 8;  // the type is the default then
  EXPECT_EQ(UNet2DConditionConfig::FromJson(projected.ToJson()), projected);
}

TEST(UNetTest, ConfigErrorsNameTheField) {
  auto error = [](const std::string& text) {
    return MessageOf<ValueError>([&] { UNet2DConditionConfig::FromJson(text); });
  };
  auto unsupported = [](const std::string& text) {
    return MessageOf<UnsupportedError>([&] { UNet2DConditionConfig::FromJson(text); });
  };
  EXPECT_THAT(error(R"({"block_out_chanels": [32]})"), HasSubstr("'block_out_chanels'"));
  EXPECT_THAT(error("{"), HasSubstr("not a JSON object"));
  EXPECT_THAT(error("[]"), HasSubstr("object"));
  EXPECT_THAT(error(R"({"in_channels": "four"})"), HasSubstr("'in_channels'"));
  EXPECT_THAT(error(R"({"in_channels": 4.5})"), HasSubstr("'in_channels'"));
  EXPECT_THAT(error(R"({"layers_per_block": 0})"), HasSubstr("'layers_per_block'"));
  EXPECT_THAT(error(R"({"layers_per_block": [1, 2]})"), HasSubstr("'layers_per_block'"));
  // What a damaged file asks for must not become memory or an overflow first.
  EXPECT_THAT(error(R"({"layers_per_block": 1000000000})"), HasSubstr("'layers_per_block'"));
  EXPECT_THAT(error(R"({"in_channels": 4611686018427387904})"), HasSubstr("'in_channels'"));
  EXPECT_THAT(error(R"({"in_channels": 18446744073709551615})"), HasSubstr("'in_channels'"));
  EXPECT_THAT(error(R"({"conv_in_kernel": 4611686018427387905})"), HasSubstr("'conv_in_kernel'"));
  EXPECT_THAT(error(R"({"up_block_types": ["UpBlock2D"]})"), HasSubstr("'up_block_types'"));
  EXPECT_THAT(error(R"({"act_fn": "sine"})"), HasSubstr("'sine'"));
  EXPECT_THAT(error(R"({"norm_num_groups": 33})"), HasSubstr("norm_num_groups"));
  EXPECT_THAT(error(R"({"attention_head_dim": 7})"), HasSubstr("attention_head_dim"));
  EXPECT_THAT(error(R"({"transformer_layers_per_block": [[1, 1], 1, 1, 1]})"),
              HasSubstr("'transformer_layers_per_block'"));
  EXPECT_THAT(unsupported(R"({"class_embed_type": "text"})"), HasSubstr("'class_embed_type'"));
  EXPECT_THAT(error(R"({"class_embed_type": "projection"})"),
              HasSubstr("'projection_class_embeddings_input_dim'"));
  EXPECT_THAT(error(R"({"num_class_embeds": 0})"), HasSubstr("'num_class_embeds'"));
  EXPECT_THAT(error(R"({"class_embeddings_concat": true})"), HasSubstr("class_embeddings_concat"));
  EXPECT_THAT(error(R"({"encoder_hid_dim_type": "text_proj"})"), HasSubstr("encoder_hid_dim"));
  EXPECT_THAT(unsupported(R"({"encoder_hid_dim": 8, "encoder_hid_dim_type": "image_proj"})"),
              HasSubstr("'image_proj'"));
  EXPECT_THAT(error(R"({"encoder_hid_dim": 8, "cross_attention_dim": [4, 4, 4, 8]})"),
              HasSubstr("one cross_attention_dim"));
  EXPECT_THAT(unsupported(R"({"cross_attention_norm": "batch_norm"})"), HasSubstr("'batch_norm'"));
  EXPECT_THAT(error(R"({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
                        "cross_attention_norm": "layer_norm", "cross_attention_dim": 768})"),
              HasSubstr("cross_attention_dim 768 to be block_out_channels 1280"));
  EXPECT_THAT(error(R"({"time_embedding_act_fn": "sine"})"), HasSubstr("'sine'"));
  EXPECT_THAT(unsupported(R"({"addition_embed_type": "text_time"})"),
              HasSubstr("'addition_embed_type'"));
  EXPECT_THAT(unsupported(R"({"num_attention_heads": 8})"), HasSubstr("'num_attention_heads'"));
  EXPECT_THAT(unsupported(R"({"dropout": 0.1})"), HasSubstr("'dropout'"));
  EXPECT_THAT(unsupported(R"({"mid_block_type": "UNetMidBlock3D"})"),
              HasSubstr("'UNetMidBlock3D'"));
  EXPECT_THAT(unsupported(R"({"time_embedding_type": "fourier"})"), HasSubstr("fourier"));
  EXPECT_THAT(unsupported(R"({"_class_name": "AutoencoderKL"})"), HasSubstr("AutoencoderKL"));
  EXPECT_THAT(
      unsupported(
          R"({"down_block_types": ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D"]})"),
      HasSubstr("AttnDownBlock2D"));
  UNet2DConditionConfig config;
  config.resnet_time_scale_shift = "ada_group";
  EXPECT_THAT(MessageOf<UnsupportedError>([&] { UNet2DConditionModel model(config); }),
              HasSubstr("ada_group"));
}

UNet2DConditionConfig Tiny() {
  return UNet2DConditionConfig::FromJson(
      R"({"in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": [8, 8, 16],
          "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
          "up_block_types": ["UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
          "cross_attention_dim": 6, "attention_head_dim": 2, "norm_num_groups": 4})");
}

struct Inputs {
  Tensor sample, timestep, context;
};
Inputs RandomInputs(const UNet2DConditionConfig& config, int64_t batch, int64_t height,
                    int64_t width, uint64_t seed = 1) {
  Random random(seed);
  return {random.NormalTensor({batch, config.in_channels, height, width}),
          random.UniformTensor({batch}, 0, 999),
          random.NormalTensor({batch, 5, config.cross_attention_dim[0]})};
}

// As in diffusers: a type goes before the table, and the others lie idle.
TEST(UNetTest, FieldsWithoutEffectAreAccepted) {
  UNet2DConditionConfig typed = Tiny();
  typed.class_embed_type = "timestep";
  UNet2DConditionConfig idle = typed;
  idle.num_class_embeds = 3;
  idle.projection_class_embeddings_input_dim = 7;
  idle.cross_attention_norm = "layer_norm";
  idle = UNet2DConditionConfig::FromJson(idle.ToJson());
  EXPECT_EQ(idle.num_class_embeds, 3);
  UNet2DConditionModel a(typed), b(idle);
  EXPECT_EQ(a.ParameterShapes(), b.ParameterShapes());
  Tensor x = Random(1).NormalTensor({1, typed.in_channels, 8, 8}), t = Tensor::Zeros({1}),
         e = Random(2).NormalTensor({1, 5, typed.context_width()}),
         label = Tensor::From({1}, std::vector<float>{20});
  EXPECT_EQ(
      LargestDifference(a.Forward({x, t, e, {}, {}, label}), b.Forward({x, t, e, {}, {}, label})),
      0);
}

TEST(UNetTest, EveryInputCounts) {
  UNet2DConditionModel unet(Tiny());
  unet.Initialize(3);
  unet.SetTrainingMode(false);
  Inputs in = RandomInputs(unet.config(), 2, 8, 8), other = RandomInputs(unet.config(), 2, 8, 8, 2);
  Tensor y = unet.Forward({in.sample, in.timestep, in.context});
  EXPECT_EQ(y.shape(), in.sample.shape());
  EXPECT_EQ(LargestDifference(y, unet.Forward({in.sample, in.timestep, in.context})), 0);
  EXPECT_GT(LargestDifference(y, unet.Forward({in.sample, other.timestep, in.context})), 1e-3);
  EXPECT_GT(LargestDifference(y, unet.Forward({in.sample, in.timestep, other.context})), 1e-3);
  EXPECT_GT(LargestDifference(y, unet.Forward({other.sample, in.timestep, in.context})), 1e-1);

  // Each sample has its own timestep; one timestep, or one context, serves all.
  Tensor same = Tensor::Full({2}, 500), one = Tensor::Full({1}, 500);
  Tensor integer = Tensor::From(Shape{2}, std::vector<int64_t>{500, 500});
  Tensor expected = unet.Forward({in.sample, same, in.context});
  EXPECT_EQ(LargestDifference(expected, unet.Forward({in.sample, integer, in.context})), 0);
  EXPECT_LT(LargestDifference(expected, unet.Forward({in.sample, one, in.context})), 1e-6);
  Tensor first = Tensor::From({1, 5, 6}, std::as_const(in.context).values().first(30));
  Tensor twice({2, 5, 6});
  std::ranges::copy(std::as_const(first).values(), twice.data());
  std::ranges::copy(std::as_const(first).values(), twice.data() + 30);
  EXPECT_LT(LargestDifference(unet.Forward({in.sample, same, twice}),
                              unet.Forward({in.sample, same, first})),
            1e-6);

  // A mask equals leaving the masked tokens out; a mask of ones equals no mask.
  Tensor mask = Tensor::Full({2, 5}, 1);
  Tensor masked = unet.Forward({in.sample, same, in.context, mask});
  EXPECT_EQ(LargestDifference(expected, masked), 0);
  for (int64_t b = 0; b < 2; ++b) mask.data()[b * 5 + 3] = mask.data()[b * 5 + 4] = 0;
  Tensor shorter({2, 3, 6});
  for (int64_t b = 0; b < 2; ++b) {
    std::copy_n(in.context.data() + b * 30, 18, shorter.data() + b * 18);
  }
  EXPECT_LT(LargestDifference(unet.Forward({in.sample, same, shorter}),
                              unet.Forward({in.sample, same, in.context, mask})),
            1e-6);
}

TEST(UNetTest, OddSizes) {
  UNet2DConditionModel unet(Tiny());
  for (auto [height, width] : {std::pair(5, 7), {9, 6}, {1, 1}, {13, 4}}) {
    Inputs in = RandomInputs(unet.config(), 1, height, width);
    Tensor y = unet.Forward({in.sample, in.timestep, in.context});
    EXPECT_EQ(y.shape(), in.sample.shape());
    auto gradients = unet.Backward(Tensor::Full(y.shape(), 1));
    EXPECT_EQ(gradients[0].shape(), in.sample.shape());
  }
}

// Residuals sin(step k + start) of a T2I-Adapter beside the inputs of a fixture; sums, elements and
// norms of the gradients are diffusers' (0.42.1, float64).
struct AdapterCase {
  const char* fixture;
  std::vector<Shape> shapes;
  std::vector<double> steps;
  double sum, mean;
  std::vector<double> first, gradient_norms;
};

TEST(UNetTest, AdapterResiduals) {
  const AdapterCase cases[] = {{"sd15-tiny",
                                {{2, 8, 8, 8}, {2, 16, 4, 4}},
                                {0.3, 0.2},
                                55.5104103,
                                0.423353006,
                                {0.37343238, 0.3922516, 0.46936478, 0.3783478},
                                {5.29773777, 3.46133933}},
                               // With a block that has no attention, but a downsampler.
                               {"pixel-3level",
                                {{2, 8, 4, 4}, {2, 8, 4, 4}, {2, 16, 2, 2}},
                                {0.3, 0.2, 0.1},
                                67.0939522,
                                0.538619683,
                                {0.091061157, -0.49040233, 0.0095266041, 0.33924992},
                                {6.13674753, 2.5954354, 1.39241948}}};
  for (const AdapterCase& c : cases) {
    SCOPED_TRACE(c.fixture);
    fs::path folder = Fixture("unet") / c.fixture;
    UNet2DConditionModel unet(UNet2DConditionConfig::FromJson(ReadText(folder / "config.json")));
    unet.LoadParameters(ReadSafetensors(folder / "diffusion_pytorch_model.safetensors").tensors);
    auto tensors = ReadSafetensors(folder / "tensors.safetensors").tensors;
    constexpr size_t kFirstSkip = UNet2DConditionModel::kMidResidual + 1;
    std::vector<Tensor> inputs(kFirstSkip + unet.skips());
    inputs[0] = tensors.at("input.sample");
    inputs[1] = tensors.at("input.timestep");
    inputs[2] = tensors.at("input.encoder_hidden_states");
    for (size_t i = 0; i < c.shapes.size(); ++i) {
      Tensor& residual = inputs.emplace_back(c.shapes[i]);
      for (int64_t k = 0; k < residual.elements(); ++k) {
        residual.data()[k] = static_cast<float>(
            std::sin(c.steps[i] * static_cast<double>(k) + static_cast<double>(i)));
      }
    }
    Tensor y = unet.Forward(inputs)[0];
    double sum = 0, magnitude = 0;
    for (float v : y.values()) sum += v, magnitude += std::abs(v);
    EXPECT_NEAR(sum, c.sum, 1e-3);
    EXPECT_NEAR(magnitude / static_cast<double>(y.elements()), c.mean, 3e-6);
    for (size_t k = 0; k < 4; ++k) EXPECT_NEAR(y.data()[k], c.first[k], 1e-5);
    std::vector<Tensor> gradients = unet.Backward(tensors.at("cotangent.out"));
    for (size_t i = 0; i < c.shapes.size(); ++i) {
      double squares = 0;
      for (float v : gradients[kFirstSkip + unet.skips() + i].values()) squares += double{v} * v;
      EXPECT_NEAR(std::sqrt(squares), c.gradient_norms[i], 1e-4 * c.gradient_norms[i]);
    }
    // One that is absent, and wrong ones.
    inputs.back() = Tensor();
    EXPECT_GT(LargestDifference(unet.Forward(inputs)[0], y), 1e-3);
    inputs.back() = Tensor::Zeros({2, 3, 4, 4});
    EXPECT_THAT(MessageOf<ShapeError>([&] { unet.Forward(inputs); }),
                HasSubstr("down_intrablock_additional_residual"));
    inputs.emplace_back();
    EXPECT_THAT(MessageOf<ShapeError>([&] { unet.Forward(inputs); }), HasSubstr("down blocks"));
    inputs.resize(kFirstSkip + 2);
    inputs[kFirstSkip] = Tensor::Zeros({2, 8, 8, 8});
    EXPECT_THAT(MessageOf<ShapeError>([&] { unet.Forward(inputs); }),
                HasSubstr("1 down_block_additional_residuals given"));
  }
}

TEST(UNetTest, OptionsHaveAnEffect) {
  Inputs in = RandomInputs(Tiny(), 1, 8, 8);
  auto run = [&](const UNet2DConditionConfig& config) {
    UNet2DConditionModel unet(config);
    unet.SetTrainingMode(false);
    return unet.Forward({in.sample, in.timestep, in.context});
  };
  Tensor plain = run(Tiny());
  auto differs = [&](const char* what, auto change) {
    UNet2DConditionConfig config = Tiny();
    change(config);
    Tensor y = run(config);
    EXPECT_EQ(y.shape(), plain.shape());
    EXPECT_GT(LargestDifference(y, plain), 1e-4) << what;
  };
  using Config = UNet2DConditionConfig;
  differs("center_input_sample", [](Config& c) { c.center_input_sample = true; });
  differs("flip_sin_to_cos", [](Config& c) { c.flip_sin_to_cos = false; });
  differs("freq_shift", [](Config& c) { c.freq_shift = 1; });
  differs("downsample_padding", [](Config& c) { c.downsample_padding = 0; });
  differs("mid_block_scale_factor", [](Config& c) { c.mid_block_scale_factor = 2; });
  differs("act_fn", [](Config& c) { c.act_fn = "gelu"; });
  differs("norm_eps", [](Config& c) { c.norm_eps = 0.1; });
  differs("norm_num_groups", [](Config& c) { c.norm_num_groups = 2; });
  differs("attention_head_dim", [](Config& c) { c.attention_head_dim = {1, 1, 4}; });
  differs("scale_shift", [](Config& c) { c.resnet_time_scale_shift = "scale_shift"; });
  differs("conv_in_kernel", [](Config& c) { c.conv_in_kernel = 1; });
  differs("conv_out_kernel", [](Config& c) { c.conv_out_kernel = 5; });
  differs("layers_per_block", [](Config& c) { c.layers_per_block = {1, 2, 1}; });
  differs("transformer_layers", [](Config& c) { c.transformer_layers_per_block = {2, 1, 1}; });
  differs("only_cross_attention", [](Config& c) { c.only_cross_attention = {true, false, false}; });
  differs("block types", [](Config& c) {
    c.down_block_types[1] = "CrossAttnDownBlock2D";
    c.up_block_types[1] = "CrossAttnUpBlock2D";
  });

  // Linear and convolutional projections are the same function of the same numbers.
  UNet2DConditionModel conv(Tiny()), linear([] {
    UNet2DConditionConfig config = Tiny();
    config.use_linear_projection = true;
    return config;
  }());
  conv.Initialize(5);
  linear.SetParameters(conv.GetParameters());
  EXPECT_LT(LargestDifference(conv.Forward({in.sample, in.timestep, in.context}),
                              linear.Forward({in.sample, in.timestep, in.context})),
            1e-5);
}

// diffusers' FreeU leaves the blocks with added keys alone.
TEST(UNetTest, FreeUOfMixedBlocks) {
  Inputs in = RandomInputs(Tiny(), 1, 8, 8);
  auto change = [&](const UNet2DConditionConfig& config, const UNet2DConditionModel::FreeU& freeu) {
    UNet2DConditionModel unet(config);
    Tensor y = unet.Forward({in.sample, in.timestep, in.context});
    unet.SetFreeU(freeu);
    return LargestDifference(unet.Forward({in.sample, in.timestep, in.context}), y);
  };
  UNet2DConditionConfig config = Tiny();
  EXPECT_GT(change(config, {.s1 = 0.5}), 1e-4);
  EXPECT_GT(change(config, {.b2 = 1.5}), 1e-4);
  config.up_block_types[0] = "ResnetUpsampleBlock2D";
  EXPECT_EQ(change(config, {.s1 = 0.5, .b1 = 1.5}), 0);
  EXPECT_GT(change(config, {.b2 = 1.5}), 1e-4);
  config.up_block_types[1] = "SimpleCrossAttnUpBlock2D";
  EXPECT_THAT(MessageOf<UnsupportedError>([&] { change(config, {}); }), HasSubstr("FreeU"));
}

// The golden cases have tables, two layers and timesteps; one layer and none do what they say.
TEST(UNetTest, ClassLabels) {
  UNet2DConditionConfig config = Tiny();
  config.class_embed_type = "simple_projection";
  config.projection_class_embeddings_input_dim = 3;
  UNet2DConditionModel projected(config);
  projected.Initialize(4);
  config.class_embed_type = "identity";
  UNet2DConditionModel identity(config), plain(Tiny());
  auto parameters = projected.SaveParameters();
  Tensor w = parameters.extract("class_embedding.weight").mapped(),
         b = parameters.extract("class_embedding.bias").mapped();
  identity.LoadParameters(parameters);
  plain.LoadParameters(parameters);
  Inputs in = RandomInputs(config, 2, 8, 8);
  Tensor labels = Random(9).NormalTensor({2, 3});
  Tensor embedded({2, 32});
  for (int64_t i = 0; i < 64; ++i) {
    double sum = b.data()[i % 32];
    for (int64_t j = 0; j < 3; ++j) {
      sum += double{w.data()[i % 32 * 3 + j]} * labels.data()[i / 32 * 3 + j];
    }
    embedded.data()[i] = static_cast<float>(sum);
  }
  auto run = [&](UNet2DConditionModel& unet, const Tensor& labels) {
    return unet.Forward({in.sample, in.timestep, in.context, {}, {}, labels});
  };
  Tensor y = run(projected, labels), without = run(plain, {});
  EXPECT_LT(LargestDifference(run(identity, embedded), y), 1e-5);
  EXPECT_GT(LargestDifference(y, without), 1e-2);
  EXPECT_EQ(LargestDifference(run(identity, Tensor::Zeros({1, 32})), without), 0);
  auto error = [&](UNet2DConditionModel& unet, const Tensor& labels) {
    return MessageOf<ShapeError>([&] { run(unet, labels); });
  };
  EXPECT_THAT(error(projected, {}), HasSubstr("class_labels are missing"));
  EXPECT_THAT(error(projected, embedded), HasSubstr("must be [B, 3]"));
  EXPECT_THAT(error(identity, Tensor::Zeros({3, 32})), HasSubstr("2 timesteps"));
  EXPECT_THAT(error(plain, labels), HasSubstr("no class embedding"));
  EXPECT_THAT(MessageOf<ShapeError>([&] {
                plain.Forward({in.sample, in.timestep, in.context, {}, {}, {}, labels});
              }),
              HasSubstr("there is no cond_proj_dim"));
}

// One timestep for all conditions, as well as one condition for all timesteps.
TEST(UNetTest, RowsOfTheTimestepCondition) {
  auto config = Tiny();
  config.time_cond_proj_dim = 5;
  UNet2DConditionModel unet(config);
  unet.Initialize(3);
  unet.SetTrainingMode(false);
  Inputs in = RandomInputs(config, 2, 8, 8);
  Tensor cond = Random(9).NormalTensor({2, 5});
  auto run = [&](const std::vector<float>& t, const Tensor& cond) {
    return unet.Forward({in.sample,
                         Tensor::From({static_cast<int64_t>(t.size())}, t),
                         in.context,
                         {},
                         {},
                         {},
                         cond});
  };
  EXPECT_EQ(LargestDifference(run({300}, cond), run({300, 300}, cond)), 0);
  Tensor row = Random(9).NormalTensor({1, 5});
  EXPECT_GT(LargestDifference(run({300}, cond), run({300}, row)), 1e-4);
  auto error = [&](const std::vector<float>& t, const Tensor& cond) {
    return MessageOf<ShapeError>([&] { run(t, cond); });
  };
  EXPECT_THAT(error({300, 20}, Tensor::Zeros({3, 5})), HasSubstr("must be [2 or 1, 5]"));
  EXPECT_THAT(error({300}, Tensor::Zeros({2, 4})), HasSubstr("must be [any, 5]"));
  EXPECT_THAT(error({300}, Tensor::Zeros({3, 5})), HasSubstr("temb [3, "));
}

// With only_cross_attention the blocks with added keys do without keys of their own: the same
// parameters but for to_k and to_v, another result.
TEST(UNetTest, OnlyAddedKeys) {
  auto config = UNet2DConditionConfig::FromJson(ReadText(Fixture("unet") / "simple/config.json"));
  config.mid_block_only_cross_attention.reset();
  config.only_cross_attention = {false};
  UNet2DConditionModel all(config);
  config.only_cross_attention = {true};
  UNet2DConditionModel only(config);
  std::map<std::string, Tensor> parameters = all.SaveParameters(), kept;
  for (const auto& [name, shape] : only.ParameterShapes()) kept[name] = parameters.at(name);
  EXPECT_LT(kept.size(), parameters.size());
  for (const auto& [name, tensor] : parameters) {
    if (kept.contains(name)) continue;
    EXPECT_TRUE(name.find(".to_k.") != name.npos || name.find(".to_v.") != name.npos) << name;
  }
  only.LoadParameters(kept);
  Inputs in = RandomInputs(config, 1, 8, 8);
  EXPECT_GT(LargestDifference(all.Forward({in.sample, in.timestep, in.context}),
                              only.Forward({in.sample, in.timestep, in.context})),
            1e-4);
}

TEST(UNetTest, InputErrorsSayWhatIsWrong) {
  UNet2DConditionModel unet(Tiny());
  Inputs in = RandomInputs(unet.config(), 2, 8, 8);
  auto error = [&](std::vector<Tensor> inputs) {
    return MessageOf<ShapeError>([&] { unet.Forward(inputs); });
  };
  EXPECT_THAT(error({in.sample, in.timestep}), HasSubstr("encoder_hidden_states"));
  EXPECT_THAT(error({Tensor::Zeros({2, 4, 8, 8}), in.timestep, in.context}), HasSubstr("sample"));
  EXPECT_THAT(error({in.sample, Tensor::Zeros({3}), in.context}), HasSubstr("timestep"));
  EXPECT_THAT(error({in.sample, in.timestep, Tensor::Zeros({2, 5, 7})}),
              HasSubstr("encoder_hidden_states"));
  EXPECT_THAT(error({in.sample, in.timestep, in.context, Tensor::Zeros({2, 4})}),
              HasSubstr("down_blocks.0.attentions.0.transformer_blocks.0.attn2"));
}

TEST(UNetTest, LabelsAreModulePaths) {
  UNet2DConditionModel unet(Tiny());
  ComputationGraph graph = unet.Export({{"sample", {DType::kF32, {1, 3, 8, 8}}},
                                        {"timestep", {DType::kF32, {1}}},
                                        {"encoder_hidden_states", {DType::kF32, {1, 5, 6}}}});
  std::set<std::string> labels;
  for (size_t i = 0; i < graph.nodes().size(); ++i) {
    labels.insert(graph.label_of(static_cast<int32_t>(i)));
  }
  for (const char* label :
       {"conv_in", "time_proj", "time_embedding.linear_1", "down_blocks.0.resnets.0.conv1",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "down_blocks.0.downsamplers.0.conv", "mid_block.attentions.0.proj_in",
        "up_blocks.0.upsamplers.0.conv", "conv_norm_out"}) {
    EXPECT_TRUE(labels.contains(label)) << label;
  }
}

// ---------------------------------------------------------------- captions

TEST(CaptionTokenizerTest, WordsAndIds) {
  EXPECT_EQ(CaptionWords("A small, RED-hot circle!"),
            (std::vector<std::string>{"a", "small", "red", "hot", "circle"}));
  EXPECT_EQ(CaptionWords("  "), std::vector<std::string>{});
  EXPECT_EQ(CaptionWords("piñata 2"), (std::vector<std::string>{"piñata", "2"}));

  std::vector<std::string> captions = {"a red dog", "A blue dog."};
  CaptionTokenizer tokenizer(CaptionTokenizer::BuildVocabulary(captions), 4);
  EXPECT_EQ(tokenizer.vocabulary(),
            (std::vector<std::string>{"<pad>", "<unk>", "<start>", "a", "blue", "dog", "red"}));
  EXPECT_EQ(tokenizer.capacity(), 3);
  auto encoded = tokenizer.Encode("a RED cat, cat and dog dog");
  EXPECT_EQ(encoded.ids, (std::vector<int64_t>{2, 3, 6, 1}));
  EXPECT_EQ(encoded.unknown, (std::vector<std::string>{"cat", "and"}));
  EXPECT_EQ(encoded.cut, (std::vector<std::string>{"cat", "and", "dog", "dog"}));
  EXPECT_EQ(encoded.words, 7);
  EXPECT_EQ(tokenizer.Encode("").ids, (std::vector<int64_t>{2, 0, 0, 0}));
  encoded = tokenizer.Tokenize("a RED cat, cat and dog dog");
  EXPECT_EQ(encoded.ids, (std::vector<int64_t>{3, 6, 1, 1, 1, 5, 5}));
  EXPECT_EQ(encoded.cut, std::vector<std::string>{});
  Tensor rows = tokenizer.EncodeAll(captions);
  EXPECT_EQ(rows.shape(), Shape({2, 4}));
  EXPECT_EQ(rows.data<int64_t>()[4 + 2], 4);

  // A vocabulary without a start token: its rows have none.
  CaptionTokenizer bare({"<pad>", "<unk>", "a", "dog"}, 2);
  EXPECT_FALSE(bare.start());
  EXPECT_EQ(bare.Encode("a dog a").ids, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(bare.Encode("a dog a").cut, std::vector<std::string>{"a"});

  EXPECT_THAT(MessageOf<ValueError>([] { CaptionTokenizer({"a"}, 4); }), HasSubstr("<pad>"));
  EXPECT_THAT(MessageOf<ValueError>([] {
                CaptionTokenizer({"<pad>", "<unk>", "Dog"}, 4);
              }),
              HasSubstr("'Dog'"));
  EXPECT_THAT(MessageOf<ValueError>([] {
                CaptionTokenizer({"<pad>", "<unk>", "a", "a"}, 4);
              }),
              HasSubstr("twice"));
  EXPECT_THAT(MessageOf<ValueError>([] {
                CaptionTokenizer({"<pad>", "<unk>"}, 0);
              }),
              HasSubstr("length"));
  EXPECT_THAT(MessageOf<ValueError>([] {
                CaptionTokenizer({"<pad>", "<unk>", "<start>"}, 1);
              }),
              HasSubstr("behind <start>"));
  EXPECT_THAT(MessageOf<ValueError>([] {
                CaptionTokenizer({"<pad>", "<unk>", "a", "<start>"}, 4);
              }),
              HasSubstr("'<start>'"));
}

TEST(CaptionEncoderTest, ConfigRoundTripAndErrors) {
  CaptionEncoderConfig config{.vocabulary = {"<pad>", "<unk>", "blue", "piñata"},
                              .max_length = 5,
                              .hidden_size = 12,
                              .num_layers = 2,
                              .num_attention_heads = 3,
                              .causal = true,
                              .final_layer_norm = true};
  EXPECT_EQ(CaptionEncoderConfig::FromJson(config.ToJson()), config);
  auto error = [](const std::string& text) {
    return MessageOf<ValueError>([&] { CaptionEncoderConfig::FromJson(text); });
  };
  EXPECT_THAT(error(R"({"hidden": 3})"), HasSubstr("'hidden'"));
  EXPECT_THAT(error(R"({"hidden_size": 10})"), HasSubstr("num_attention_heads"));
  EXPECT_THAT(error(R"({"num_layers": 1000000000})"), HasSubstr("'num_layers'"));
  EXPECT_THAT(error(R"({"vocabulary": ["dog"]})"), HasSubstr("<pad>"));
  EXPECT_THAT(error(R"({"_class_name": "CLIPTextModel"})"), HasSubstr("CLIPTextModel"));
}

TEST(CaptionEncoderTest, FormulaAndTraining) {
  CaptionEncoderConfig config{
      .vocabulary = {"<pad>", "<unk>", "a", "b"}, .max_length = 3, .hidden_size = 8};
  CaptionEncoder plain(config);
  Tensor ids = Tensor::From(Shape{2, 3}, std::vector<int64_t>{2, 3, 0, 3, 2, 1});
  Tensor y = plain.Forward(ids);
  ASSERT_EQ(y.shape(), Shape({2, 3, 8}));
  Tensor words = plain.FindParameter("token_embedding.weight")->value();
  Tensor places = plain.FindParameter("position_embedding.weight")->value();
  for (int64_t i = 0; i < y.elements(); ++i) {
    int64_t word = ids.data<int64_t>()[i / 8], place = i / 8 % 3;
    EXPECT_EQ(y.data()[i], words.data()[word * 8 + i % 8] + places.data()[place * 8 + i % 8]);
  }

  // With blocks a word's vector depends on the other words; the gradient reaches every parameter.
  config.num_layers = 2;
  config.final_layer_norm = true;
  CaptionEncoder deep(config);
  deep.Initialize(1);
  Tensor before = deep.Forward(ids);
  Random random(9);
  deep.Backward(random.NormalTensor(before.shape()));
  for (const ParameterPtr& parameter : deep.NamedParameters()) {
    EXPECT_GT(Largest(parameter->gradient), 0) << parameter->name();
  }
  Tensor changed = Tensor::From(Shape{2, 3}, std::vector<int64_t>{2, 3, 1, 3, 2, 1});
  Tensor after = deep.Forward(changed);
  EXPECT_GT(std::abs(after.data()[0] - before.data()[0]), 1e-4);
  EXPECT_EQ(after.data()[3 * 8], before.data()[3 * 8]);

  // A causal one reads the words before a word alone: the first is as if it stood alone.
  config.causal = true;
  CaptionEncoder causal(config);
  causal.Initialize(1);
  before = causal.Forward(ids), after = causal.Forward(changed);
  Tensor alone = causal.Forward(Tensor::From(Shape{2, 1}, std::vector<int64_t>{2, 3}));
  for (int64_t d = 0; d < 8; ++d) {
    EXPECT_EQ(after.data()[d], before.data()[d]);
    EXPECT_EQ(after.data()[8 + d], before.data()[8 + d]);
    EXPECT_NEAR(before.data()[d], alone.data()[d], 1e-5);
    EXPECT_NEAR(before.data()[3 * 8 + d], alone.data()[8 + d], 1e-5);
  }
  EXPECT_GT(std::abs(after.data()[2 * 8] - before.data()[2 * 8]), 1e-4);

  EXPECT_THROW(deep.Forward(Tensor::From(Shape{1, 4}, std::vector<int64_t>{0, 0, 0, 0})),
               ShapeError);
  EXPECT_THROW(deep.Forward(Tensor::From(Shape{1, 1}, std::vector<int64_t>{4})), ValueError);
}

}  // namespace
}  // namespace calotype
