// diffusers' own tests of its blocks, replayed: parameters and inputs are the numbers that PyTorch
// draws after manual_seed(0), and the results are compared with the numbers published there.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "core/torch_random.h"
#include "layers/activation.h"
#include "layers/attention.h"
#include "layers/resample.h"
#include "layers/resnet.h"
#include "layers/timesteps.h"
#include "layers/transformer.h"
#include "models/unet_2d_condition.h"
#include "models/unet_blocks.h"
#include "models/vae_blocks.h"

namespace calotype {
namespace {

// Sorts modules into the order in which diffusers constructs them: in a block the resnet and the
// attention of each layer, then the sampler; in a U-Net the middle block before the up blocks.
std::string ConstructionOrder(const std::string& path) {
  std::string key;
  for (size_t begin = 0; begin < path.size();) {
    const size_t end = std::min(path.find('.', begin), path.size());
    const std::string part = path.substr(begin, end - begin);
    const char digit = end + 1 < path.size() ? path[end + 1] : '0';
    if (part == "resnets" || part == "attentions") {
      return key + digit + (part == "resnets" ? "0" : "1");
    }
    if (part == "downsamplers" || part == "upsamplers") return key + "9";
    const std::vector<std::string> parts{"conv_in",   "time_embedding", "down_blocks",
                                         "mid_block", "up_blocks",      "conv_out"};
    const auto found = std::find(parts.begin(), parts.end(), part);
    if (found != parts.end()) {
      key += static_cast<char>('0' + (found - parts.begin()));
      if (part == "down_blocks" || part == "up_blocks") key += digit;
    }
    begin = end + 1;
  }
  return key;
}

// What the constructors of PyTorch's Linear and Conv2d draw: kaiming_uniform(a = sqrt(5)) for the
// weight, then the bias. Norms draw nothing.
void DrawParameters(Layer& layer, TorchRandom& random) {
  std::vector<ParameterPtr> parameters = layer.NamedParameters();
  std::stable_sort(parameters.begin(), parameters.end(),
                   [](const ParameterPtr& a, const ParameterPtr& b) {
                     return ConstructionOrder(a->name()) < ConstructionOrder(b->name());
                   });
  std::map<std::string, Tensor> values;
  double fan_in = 0;  // of the weight before
  for (const ParameterPtr& parameter : parameters) {
    const std::string& name = parameter->name();
    const Shape& shape = parameter->value().shape();
    const bool weight = name.ends_with(".weight");
    if (weight) fan_in = shape.rank() > 1 ? static_cast<double>(shape.elements() / shape[0]) : 0;
    if (fan_in == 0) {
      values[name] = Tensor::Full(shape, weight ? 1 : 0);
      continue;
    }
    const double bound =
        weight ? std::sqrt(3.0) * (std::sqrt(1.0 / 3) / std::sqrt(fan_in)) : 1 / std::sqrt(fan_in);
    values[name] = random.UniformTensor(shape, -bound, bound);
  }
  layer.LoadParameters(values);
  layer.SetTrainingMode(false);
}

// The last 3 x 3 pixels of the last channel of the first picture, to the published digits.
void ExpectSlice(const Tensor& y, const std::vector<double>& expected) {
  const int64_t C = y.shape()[1], H = y.shape()[2], W = y.shape()[3];
  for (int64_t k = 0; k < 9; ++k) {
    const int64_t row = H - 3 + k / 3, column = W - 3 + k % 3;
    EXPECT_NEAR(y.data()[((C - 1) * H + row) * W + column], expected[static_cast<size_t>(k)], 2e-4)
        << row << ", " << column;
  }
}

// --- Layers: seed 0, sample, then temb, then the layer.

TEST(TorchSeed, ResnetBlock2D) {
  auto run = [](const nn::ResnetBlock2D::Options& options) {
    TorchRandom random(0);
    const Tensor sample = random.NormalTensor({1, 32, 64, 64}),
                 temb = random.NormalTensor({1, 128});
    nn::ResnetBlock2D layer(options);
    DrawParameters(layer, random);
    return layer.Forward({sample, temb});
  };
  nn::ResnetBlock2D::Options o{.in_channels = 32, .temb_channels = 128};
  ExpectSlice(run(o),
              {-1.9010, -0.2974, -0.8245, -1.3533, 0.8742, -0.9645, -2.0584, 1.3387, -0.4746});
  o.use_in_shortcut = true;
  ExpectSlice(run(o), {0.2226, -1.0791, -0.1629, 0.3659, -0.2889, -1.2376, 0.0582, 0.9206, 0.0044});
  o.use_in_shortcut.reset();
  o.up = true;
  ExpectSlice(run(o),
              {1.2130, -0.8753, -0.9027, 1.5783, -0.5362, -0.5001, 1.0726, -0.7732, -0.4182});
  o.up = false, o.down = true;
  ExpectSlice(run(o),
              {-0.3002, -0.7135, 0.1359, 0.0561, -0.7935, 0.0113, -0.1766, -0.6714, -0.0436});
}

TEST(TorchSeed, Resampling) {
  TorchRandom random(0);
  Tensor sample = random.NormalTensor({1, 32, 32, 32});
  nn::Upsample2D up({.channels = 32, .use_conv = true});
  DrawParameters(up, random);
  ExpectSlice(up.Forward(sample),
              {0.7145, 1.3773, 0.3492, 0.8448, 1.0839, -0.3341, 0.5956, 0.1250, -0.4841});
  random = TorchRandom(0);
  sample = random.NormalTensor({1, 32, 64, 64});
  nn::Downsample2D down({.channels = 32, .use_conv = true});
  DrawParameters(down, random);
  ExpectSlice(down.Forward(sample),
              {0.9267, 0.5878, 0.3337, 1.2321, -0.1191, -0.3984, -0.7532, -0.0715, -0.3913});
}

TEST(TorchSeed, Transformer2DModel) {
  TorchRandom random(0);
  Tensor sample = random.NormalTensor({1, 32, 64, 64});
  nn::Transformer2DModel own(
      {.num_attention_heads = 1, .attention_head_dim = 32, .in_channels = 32});
  DrawParameters(own, random);
  ExpectSlice(own.Forward(sample),
              {-1.9455, -0.0066, -1.3933, -1.5878, 0.5325, -0.6486, -1.8648, 0.7515, -0.9689});
  random = TorchRandom(0);
  sample = random.NormalTensor({1, 64, 64, 64});
  nn::Transformer2DModel cross({.num_attention_heads = 2,
                                .attention_head_dim = 32,
                                .in_channels = 64,
                                .cross_attention_dim = 64});
  DrawParameters(cross, random);
  const Tensor context = random.NormalTensor({1, 4, 64});
  ExpectSlice(cross.Forward({sample, context}),
              {0.0143, -0.6909, -2.1547, -1.8893, 1.4097, 0.1359, -0.2521, -1.3359, 0.2598});
}

// No random numbers: rows 23 to 25, columns 47 to 49 of the sinusoids of timesteps 0 to 127.
TEST(TorchSeed, Timesteps) {
  std::vector<float> steps;
  for (int t = 0; t < 128; ++t) steps.push_back(static_cast<float>(t));
  auto expect = [&](const nn::Timesteps::Options& options, const std::vector<double>& expected) {
    const Tensor y = nn::Timesteps(options).Forward(Tensor::From({128}, steps));
    for (int64_t k = 0; k < 9; ++k) {
      EXPECT_NEAR(y.data()[(23 + k / 3) * 64 + 47 + k % 3], expected[static_cast<size_t>(k)], 1e-4);
    }
  };
  expect({.num_channels = 64, .flip_sin_to_cos = false, .downscale_freq_shift = 1},
         {0.9646, 0.9804, 0.9892, 0.9615, 0.9787, 0.9882, 0.9582, 0.9769, 0.9872});
  expect({.num_channels = 64, .flip_sin_to_cos = true, .downscale_freq_shift = 0},
         {0.3019, 0.2280, 0.1716, 0.3146, 0.2377, 0.1790, 0.3272, 0.2474, 0.1864});
}

TEST(TorchSeed, Activations) {
  for (const char* name : {"silu", "gelu", "mish"}) {
    const Tensor x = Tensor::From<float>({5}, std::vector<float>{-200, -100, -1, 0, 20});
    const Tensor y = nn::Activation(name).Forward(x);
    EXPECT_EQ(y.data()[0], 0) << name;
    if (name != std::string("mish")) {
      EXPECT_EQ(y.data()[1], 0) << name;
    }
    EXPECT_NE(y.data()[2], 0) << name;
    EXPECT_EQ(y.data()[3], 0) << name;
    EXPECT_EQ(y.data()[4], 20) << name;
  }
}

// --- Blocks of one layer and 32 channels, without encoder_hidden_states.

class Blocks : public ::testing::Test {
 protected:
  // Draws the inputs in the order of diffusers' tests, then the parameters.
  void Draw(Layer& layer, bool temb = true, bool skip = false) {
    TorchRandom random(0);
    hidden_ = random.NormalTensor({4, 32, 32, 32});
    if (temb) temb_ = random.NormalTensor({4, 128});
    if (skip) {
      random = TorchRandom(1);
      skip_ = random.NormalTensor({4, 32, 32, 32});
    }
    DrawParameters(layer, random);
  }
  static nn::UNetBlockOptions Options(bool attention) {
    return {.temb_channels = 128,
            .eps = 1e-6,
            .attention = attention,
            .heads = 1,
            .cross_attention_dim = 32};
  }
  Tensor hidden_, temb_, skip_;
};

TEST_F(Blocks, Down) {
  for (bool attention : {false, true}) {
    nn::UNetDownBlock2D block({.in_channels = 32, .out_channels = 32, .block = Options(attention)});
    Draw(block);
    ExpectSlice(block.Forward({hidden_, temb_}),
                attention ? std::vector{0.2238, -0.7396, -0.2255, -0.3829, 0.1925, 1.1665, 0.0603,
                                        -0.7295, 0.1983}
                          : std::vector{-0.0232, -0.9869, 0.8054, -0.0637, -0.1688, -1.4264, 0.4470,
                                        -1.3394, 0.0904});
  }
}

TEST_F(Blocks, Middle) {
  nn::UNetMidBlock2D block({.in_channels = 32, .block = Options(true)});
  Draw(block);
  ExpectSlice(block.Forward({hidden_, temb_}),
              {0.0187, 2.4220, 0.4484, 1.1203, -0.6121, -1.5122, -0.8270, 0.7851, 1.8335});
}

TEST_F(Blocks, Up) {
  for (bool attention : {false, true}) {
    nn::UNetUpBlock2D block({.in_channels = 32,
                             .out_channels = 32,
                             .skip_channels = {32},
                             .block = Options(attention)});
    Draw(block, /*temb=*/true, /*skip=*/true);
    ExpectSlice(block.Forward({hidden_, temb_, Tensor(), Tensor(), skip_}),
                attention ? std::vector{-0.1403, -0.3515, -0.0420, -0.1425, 0.3167, 0.5094, -0.2181,
                                        0.5931, 0.5582}
                          : std::vector{-0.2041, -0.4165, -0.3022, 0.0041, -0.6628, -0.7053, 0.1928,
                                        -0.0325, 0.0523});
  }
}

// Two blocks of diffusers with arguments that no model here uses: DownEncoderBlock2D with its
// default padding of 1, and UNetMidBlock2D with a time embedding and 32 heads.
class Encoder : public Layer {
 public:
  Encoder() : Layer("Encoder") {
    resnet_ = AddLayer<nn::ResnetBlock2D>(
        "resnets.0", nn::ResnetBlock2D::Options{.in_channels = 32, .temb_channels = 0});
    downsampler_ = AddLayer<nn::Downsample2D>(
        "downsamplers.0", nn::Downsample2D::Options{.channels = 32, .use_conv = true});
  }
  std::vector<Value> ExportComputationGraph(ComputationGraph&,
                                            std::span<const Value> inputs) override {
    return {downsampler_->Call(resnet_->Call(inputs[0]))};
  }

 private:
  Layer *resnet_, *downsampler_;
};

class Middle : public Layer {
 public:
  Middle() : Layer("Middle") {
    const nn::ResnetBlock2D::Options resnet{.in_channels = 32, .temb_channels = 128};
    resnet_0_ = AddLayer<nn::ResnetBlock2D>("resnets.0", resnet);
    attention_ = AddLayer<nn::Attention>("attentions.0",
                                         nn::Attention::Options{.query_dim = 32,
                                                                .heads = 32,
                                                                .dim_head = 1,
                                                                .bias = true,
                                                                .norm_num_groups = 32,
                                                                .eps = 1e-6,
                                                                .residual_connection = true});
    resnet_1_ = AddLayer<nn::ResnetBlock2D>("resnets.1", resnet);
  }
  std::vector<Value> ExportComputationGraph(ComputationGraph&,
                                            std::span<const Value> inputs) override {
    Value x = attention_->Call(resnet_0_->Call({inputs[0], inputs[1]}));
    return {resnet_1_->Call({x, inputs[1]})};
  }

 private:
  Layer *resnet_0_, *attention_, *resnet_1_;
};

TEST_F(Blocks, Autoencoder) {
  Encoder down;
  Draw(down, /*temb=*/false);
  ExpectSlice(down.Forward(hidden_),
              {1.1102, 0.5302, 0.4872, -0.0023, -0.8042, 0.0483, -0.3489, -0.5632, 0.7626});
  nn::VaeBlock2D up(32, 32, 1, nn::VaeBlock2D::Resample::kUp, {});
  Draw(up, /*temb=*/false);
  ExpectSlice(up.Forward(hidden_),
              {0.4404, 0.1998, -0.9886, -0.3320, -0.3128, -0.7034, -0.6955, -0.2338, -0.3137});
  Middle middle;
  Draw(middle);
  ExpectSlice(middle.Forward({hidden_, temb_}),
              {-0.1062, 1.7248, 0.3494, 1.4569, -0.0910, -1.2421, -0.9984, 0.6736, 1.0028});
}

// --- Whole U-Nets of seed 0 and their gradient.

struct UNetCase {
  std::vector<int64_t> channels;
  std::vector<std::string> down, up;
  int64_t layers, groups;
  double sum, mean, first[4], loss, gradient_norm;
  bool simple = false;  // blocks with added keys and values
};

TEST(TorchSeed, UNets) {
  const std::string plain = "DownBlock2D", cross = "CrossAttnDownBlock2D", up = "UpBlock2D",
                    cross_up = "CrossAttnUpBlock2D";
  const UNetCase cases[] = {
      {{32, 64},
       {cross, plain},
       {up, cross_up},
       2,
       32,
       -228.61345,
       0.2599761,
       {-0.007781, -0.283641, -0.078541, -0.197548},
       0.6079741,
       2.418729},
      {{4, 8},
       {plain, cross},
       {cross_up, up},
       1,
       2,
       -26.34976,
       0.2385199,
       {0.240114, 0.080246, 0.203513, 0.231662},
       0.6010774,
       1.093749},
      {{32, 64},
       {"SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"},
       {"ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"},
       1,
       32,
       -155.47493,
       0.2998885,
       {0.010753, 0.075574, 0.106158, 0.022506},
       0.6408914,
       3.121738,
       true},
  };
  auto fill = [](const Shape& shape, double step, double start) {
    Tensor x(shape);
    for (int64_t k = 0; k < x.elements(); ++k)
      x.data()[k] = static_cast<float>(std::sin(step * static_cast<double>(k) + start));
    return x;
  };
  for (const UNetCase& c : cases) {
    SCOPED_TRACE(c.down[0]);
    UNet2DConditionConfig config;
    config.block_out_channels = c.channels;
    config.down_block_types = c.down;
    config.up_block_types = c.up;
    config.layers_per_block.assign(c.channels.size(), c.layers);
    config.cross_attention_dim.assign(c.channels.size(), 32);
    config.norm_num_groups = c.groups;
    if (c.simple) config.mid_block_type = "UNetMidBlock2DSimpleCrossAttn";
    UNet2DConditionModel unet(config);
    TorchRandom random(0);
    DrawParameters(unet, random);
    unet.SetTrainingMode(true);

    const Tensor x = fill({2, 4, 16, 16}, 0.11, 0), target = fill(x.shape(), 0.07, 1);
    const Tensor y = unet.Forward({x, Tensor::From<int64_t>({2}, std::vector<int64_t>{10, 700}),
                                   fill({2, 7, 32}, 0.23, 0.5)});
    double sum = 0, magnitude = 0, loss = 0;
    Tensor dy(y.shape());
    const double n = static_cast<double>(y.elements());
    for (int64_t k = 0; k < y.elements(); ++k) {
      const double difference = double{y.data()[k]} - target.data()[k];
      sum += y.data()[k], magnitude += std::fabs(y.data()[k]), loss += difference * difference / n;
      dy.data()[k] = static_cast<float>(2 * difference / n);
    }
    EXPECT_NEAR(sum, c.sum, 2e-3);
    EXPECT_NEAR(magnitude / n, c.mean, 2e-6);
    for (int k = 0; k < 4; ++k) EXPECT_NEAR(y.data()[k], c.first[k], 5e-6);
    EXPECT_NEAR(loss, c.loss, 2e-6);
    unet.Backward(dy);
    double squares = 0;
    const Tensor gradients = unet.GetParameterGradients();
    for (float g : gradients.values()) squares += double{g} * g;
    EXPECT_NEAR(std::sqrt(squares), c.gradient_norm, 2e-5 * c.gradient_norm);
  }
}

}  // namespace
}  // namespace calotype
