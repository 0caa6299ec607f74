// The parts of Stable Diffusion beside the U-Net: AutoencoderKL, CLIPTextModel, CLIPTokenizer and
// the folders that they are read from. Golden outputs and gradients are in conformance_test.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <numeric>

#include "graph/functions.h"
#include "graph/interpreter.h"
#include "io/safetensors.h"
#include "layer_gradient.h"
#include "pipelines/model_folder.h"
#include "temp_folder.h"
#include "tests/expect_error.h"
#include "tests/tiny_vocabulary.h"

namespace calotype {
namespace {

namespace fs = std::filesystem;
using test::TempFolder;
using test::TinyVocabulary;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

fs::path Fixture(const std::string& name) {
  return fs::path(CALOTYPE_TEST_DATA) / "fixtures" / name;
}

// Runs what `build` makes of an input of this value.
template <class F>
std::vector<Tensor> Evaluate(const Tensor& input, const F& build) {
  ComputationGraph graph;
  size_t count = 0;
  for (Value value : build(graph.Input("x", input.type()))) {
    graph.Output(fmt::format("y{}", count++), value);
  }
  return Interpreter(graph).Run(std::vector{input});
}

// ---------------------------------------------------------------- AutoencoderKL

AutoencoderKLConfig TinyVae() {
  return {.down_block_types = {"DownEncoderBlock2D", "DownEncoderBlock2D"},
          .up_block_types = {"UpDecoderBlock2D", "UpDecoderBlock2D"},
          .block_out_channels = {4, 8},
          .norm_num_groups = 2,
          .sample_size = 16};
}

// The model in one piece, with a sampled latent.
class VaeWithNoise : public Layer {
 public:
  VaeWithNoise() : Layer("VaeWithNoise") { vae_ = AddLayer<AutoencoderKL>("vae", TinyVae()); }
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override {
    LatentDistribution latents = vae_->Encode(inputs[0]);
    std::vector<Value> outputs = vae_->ExportComputationGraph(graph, inputs);
    outputs.push_back(latents.KlDivergence());
    return outputs;
  }
  AutoencoderKL* vae_;
};

TEST(AutoencoderKLTest, SampledLatentsAndGradients) {
  VaeWithNoise layer;
  Random random(1);
  CheckLayer(layer, {random.UniformTensor({2, 3, 6, 4}, -1, 1), random.NormalTensor({2, 4, 3, 2})});
}

TEST(AutoencoderKLTest, SampleAndKlFollowTheirFormulas) {
  VaeWithNoise layer;
  layer.SetTrainingMode(false);
  layer.Initialize(3);
  Random random(1);
  Tensor x = random.UniformTensor({2, 3, 4, 4}, -1, 1), noise = random.NormalTensor({2, 4, 2, 2});
  std::vector<Tensor> out = layer.Forward(std::vector{x, noise});
  const Tensor &mean = out[1], &logvar = out[2], &kl = out[3];
  Tensor z(mean.shape());
  for (int64_t b = 0; b < 2; ++b) {
    double sum = 0;
    for (int64_t i = b * 16; i < (b + 1) * 16; ++i) {
      double m = mean.data()[i], l = logvar.data()[i];
      sum += 0.5 * (m * m + std::exp(l) - 1 - l);
      z.data()[i] = static_cast<float>(m + std::exp(0.5 * l) * noise.data()[i]);
    }
    EXPECT_NEAR(kl.data()[b], sum, 1e-5 * sum);
  }
  Tensor decoded = Evaluate(z, [&](Value v) { return std::vector{layer.vae_->Decode(v)}; })[0];
  EXPECT_LT(RelativeError(out[0], decoded), 2e-6);
  // Without noise: the mode.
  decoded = Evaluate(mean, [&](Value v) { return std::vector{layer.vae_->Decode(v)}; })[0];
  EXPECT_LT(RelativeError(layer.vae_->Forward(x), decoded), 2e-6);
  EXPECT_GT(RelativeError(out[0], decoded), 1e-3);
}

TEST(AutoencoderKLTest, LatentsAreScaled) {
  AutoencoderKLConfig config = TinyVae();
  config.scaling_factor = 0.25;
  config.shift_factor = 2.0;
  AutoencoderKL vae(config);
  Tensor z = Tensor::From({2}, std::vector<float>{1, 6});
  auto out = Evaluate(z, [&](Value v) {
    return std::vector{vae.ScaleLatents(v), vae.UnscaleLatents(vae.ScaleLatents(v))};
  });
  EXPECT_THAT(out[0].values<float>(), ElementsAre(-0.25f, 1.0f));
  EXPECT_EQ(RelativeError(out[1], z), 0);
}

TEST(AutoencoderKLTest, StableDiffusionSizes) {
  AutoencoderKLConfig config{.down_block_types = std::vector<std::string>(4, "DownEncoderBlock2D"),
                             .up_block_types = std::vector<std::string>(4, "UpDecoderBlock2D"),
                             .block_out_channels = {128, 256, 512, 512},
                             .layers_per_block = 2,
                             .sample_size = 512};
  AutoencoderKL vae(config);
  EXPECT_EQ(vae.ParameterCount(), 83'653'863);
  EXPECT_EQ(vae.ParameterShapes().size(), 248u);
  int64_t encoder = 0;
  for (const auto& [name, shape] : vae.ParameterShapes()) {
    if (name.starts_with("encoder.")) encoder += shape.elements();
  }
  EXPECT_EQ(encoder, 34'163'592);
  // The U-Net's latents are an eighth of the picture.
  config.block_out_channels = {32, 32, 32, 32};
  AutoencoderKL narrow(config);
  ComputationGraph graph = narrow.Export({{"sample", {DType::kF32, {1, 3, 64, 96}}}});
  EXPECT_EQ(graph.type(graph.outputs()[1].value).shape, (Shape{1, 4, 8, 12}));
  EXPECT_EQ(graph.type(graph.outputs()[0].value).shape, (Shape{1, 3, 64, 96}));
}

// diffusers' tiled_decode and tiled_encode in plain loops, with `apply` for the network.
template <class F>
Tensor TiledByLoops(const Tensor& x, int64_t size, int64_t stride, int64_t band, int64_t limit,
                    const F& apply) {
  auto crop = [](const Tensor& t, int64_t y0, int64_t x0, int64_t h, int64_t w) {
    const Shape& s = t.shape();
    h = std::min(h, s[2] - y0), w = std::min(w, s[3] - x0);
    Tensor part({s[0], s[1], h, w});
    for (int64_t p = 0; p < s[0] * s[1]; ++p) {
      for (int64_t i = 0; i < h; ++i) {
        for (int64_t j = 0; j < w; ++j) {
          part.data()[(p * h + i) * w + j] = t.data()[(p * s[2] + y0 + i) * s[3] + x0 + j];
        }
      }
    }
    return part;
  };
  auto blend = [&](const Tensor& a, Tensor& b, int axis) {
    const Shape &sa = a.shape(), &sb = b.shape();
    int64_t extent = std::min({sa[axis], sb[axis], band});
    for (int64_t p = 0; p < sb[0] * sb[1]; ++p) {
      for (int64_t i = 0; i < (axis == 2 ? extent : sb[2]); ++i) {
        for (int64_t j = 0; j < (axis == 3 ? extent : sb[3]); ++j) {
          int64_t k = axis == 2 ? i : j;
          int64_t ai = axis == 2 ? sa[2] - extent + i : i, aj = axis == 3 ? sa[3] - extent + j : j;
          double w = static_cast<double>(k) / static_cast<double>(extent);
          float& to = b.data()[(p * sb[2] + i) * sb[3] + j];
          to = static_cast<float>(a.data()[(p * sa[2] + ai) * sa[3] + aj] * (1 - w) + to * w);
        }
      }
    }
  };
  std::vector<std::vector<Tensor>> rows;
  for (int64_t i = 0; i < x.shape()[2]; i += stride) {
    rows.emplace_back();
    for (int64_t j = 0; j < x.shape()[3]; j += stride) {
      rows.back().push_back(apply(crop(x, i, j, size, size)).Clone());
    }
  }
  std::vector<std::vector<Tensor>> cut(rows.size());
  int64_t height = 0, width = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    for (size_t j = 0; j < rows[i].size(); ++j) {
      if (i > 0) blend(rows[i - 1][j], rows[i][j], 2);
      if (j > 0) blend(rows[i][j - 1], rows[i][j], 3);
      cut[i].push_back(crop(rows[i][j], 0, 0, limit, limit));
      if (i == 0) width += cut[i].back().shape()[3];
    }
    height += cut[i][0].shape()[2];
  }
  const Shape& s = cut[0][0].shape();
  Tensor joined({s[0], s[1], height, width});
  int64_t y0 = 0;
  for (auto& row : cut) {
    int64_t x0 = 0;
    for (Tensor& part : row) {
      const Shape& t = part.shape();
      for (int64_t p = 0; p < t[0] * t[1]; ++p) {
        for (int64_t i = 0; i < t[2]; ++i) {
          for (int64_t j = 0; j < t[3]; ++j) {
            joined.data()[(p * height + y0 + i) * width + x0 + j] =
                std::as_const(part).data()[(p * t[2] + i) * t[3] + j];
          }
        }
      }
      x0 += t[3];
    }
    y0 += row[0].shape()[2];
  }
  return joined;
}

TEST(AutoencoderKLTest, TilesAreBlendedAsInDiffusers) {
  AutoencoderKL vae(TinyVae());
  vae.SetTrainingMode(false);
  vae.Initialize(5);
  Random random(2);
  Tensor x = random.UniformTensor({1, 3, 32, 20}, -1, 1), z = random.NormalTensor({1, 4, 18, 9});
  auto encode = [&](const Tensor& t) {
    return Evaluate(t, [&](Value v) { return std::vector{vae.Encode(v).mean}; })[0];
  };
  auto decode = [&](const Tensor& t) {
    return Evaluate(t, [&](Value v) { return std::vector{vae.Decode(v)}; })[0];
  };
  Tensor whole = decode(z);
  Tensor mean = TiledByLoops(x, 16, 12, 2, 6, encode), y = TiledByLoops(z, 8, 6, 4, 12, decode);
  ASSERT_EQ(mean.shape(), (Shape{1, 4, 16, 10}));
  ASSERT_EQ(y.shape(), whole.shape());
  vae.SetTiling(VaeTiling{});
  EXPECT_LT(RelativeError(encode(x), mean), 2e-6);
  EXPECT_LT(RelativeError(decode(z), y), 2e-6);
  EXPECT_GT(RelativeError(y, whole), 1e-4);  // tiles see less
  // What fits into one tile is not cut.
  Tensor small = random.NormalTensor({1, 4, 8, 6});
  Tensor tiled = decode(small);
  vae.SetTiling({});
  EXPECT_EQ(RelativeError(decode(small), tiled), 0);
  EXPECT_EQ(RelativeError(decode(z), whole), 0);
}

TEST(AutoencoderKLTest, TilingBoundsMemory) {
  AutoencoderKL vae(TinyVae());
  vae.SetTrainingMode(false);
  Tensor z = Random(1).NormalTensor({1, 4, 64, 64});
  auto peak = [&] {
    ComputationGraph graph;
    graph.Output("y", vae.Decode(graph.Input("z", z.type())));
    Interpreter interpreter(graph);
    int64_t before = MemoryStats::LiveBytes();
    MemoryStats::ResetPeak();
    interpreter.Run(std::vector{z});
    return MemoryStats::PeakBytes() - before;
  };
  int64_t whole = peak();
  vae.SetTiling(VaeTiling{});
  EXPECT_LT(peak(), whole / 3);
}

TEST(AutoencoderKLTest, TilingIsChecked) {
  AutoencoderKL vae(TinyVae());
  vae.SetTiling(VaeTiling{.sample_size = 16});
  const uint64_t revision = vae.Revision();
  auto error = [&](VaeTiling tiling) {
    return MessageOf<ValueError>([&] { vae.SetTiling(tiling); });
  };
  EXPECT_THAT(error({.sample_size = 16, .overlap = 0.7}), HasSubstr("overlap 0.7"));
  EXPECT_THAT(error({.sample_size = 15}), HasSubstr("tiles of 15 pixels"));
  EXPECT_THAT(error({.sample_size = 16, .overlap = 0.2}), HasSubstr("fit together"));
  EXPECT_EQ(vae.Revision(), revision);  // the model is as it was
}

TEST(AutoencoderKLTest, ConfigRoundTripAndErrors) {
  AutoencoderKLConfig config = TinyVae();
  config.shift_factor = 0.5;
  config.use_quant_conv = false;
  EXPECT_EQ(AutoencoderKLConfig::FromJson(config.ToJson()), config);
  auto error = [](const std::string& json) {
    return MessageOf<ValueError>([&] { AutoencoderKLConfig::FromJson(json); });
  };
  EXPECT_THAT(error("[1"), HasSubstr("not a JSON object"));
  EXPECT_THAT(error(R"({"latent_chanels": 4})"), HasSubstr("'latent_chanels'"));
  EXPECT_THAT(error(R"({"latent_channels": "4"})"), HasSubstr("'latent_channels' is \"4\""));
  EXPECT_THAT(error(R"({"_class_name": "VQModel"})"), HasSubstr("VQModel"));
  EXPECT_THAT(error(R"({"down_block_types": ["AttnDownEncoderBlock2D"]})"),
              HasSubstr("'AttnDownEncoderBlock2D', which is not supported"));
  EXPECT_THAT(error(R"({"block_out_channels": [32, 64]})"), HasSubstr("down_block_types"));
  EXPECT_THAT(error(R"({"norm_num_groups": 5})"), HasSubstr("must divide"));
  EXPECT_THAT(error(R"({"latents_mean": [0, 0, 0, 0]})"), HasSubstr("'latents_mean'"));
}

TEST(AutoencoderKLTest, OldNamesAndBadFiles) {
  TempFolder folder;
  fs::path source = Fixture("vae/kl-tiny");
  auto tensors = ReadSafetensors(source / "diffusion_pytorch_model.safetensors").tensors;
  folder.Write("vae/config.json", test::ReadText(source / "config.json"));
  fs::path weights = folder / "vae/diffusion_pytorch_model.safetensors";
  auto expected = LoadAutoencoderKL(source)->SaveParameters();

  std::map<std::string, Tensor> old;
  int renamed = 0;
  for (const auto& [name, tensor] : tensors) {
    std::string key = name;
    for (auto [now, then] : {std::pair("to_q", "query"), std::pair("to_k", "key"),
                             std::pair("to_v", "value"), std::pair("to_out.0", "proj_attn")}) {
      if (auto at = key.find(now); at != key.npos) {
        key.replace(at, std::string(now).size(), then), ++renamed;
      }
    }
    old[key] = tensor;
  }
  EXPECT_EQ(renamed, 16);
  WriteSafetensors(weights, {old, {}});
  auto loaded = LoadAutoencoderKL(folder / "vae")->SaveParameters();
  ASSERT_EQ(loaded.size(), expected.size());
  for (const auto& [name, tensor] : expected) EXPECT_EQ(RelativeError(loaded[name], tensor), 0);

  auto error = [&](const std::map<std::string, Tensor>& content) {
    WriteSafetensors(weights, {content, {}});
    return MessageOf<Error>([&] { LoadAutoencoderKL(folder / "vae"); });
  };
  old["encoder.mid_block.attentions.0.to_q.weight"] = Tensor::Zeros({16, 16});
  EXPECT_THAT(error(old), HasSubstr("twice"));
  auto missing = tensors;
  missing.erase("quant_conv.bias");
  EXPECT_THAT(error(missing), HasSubstr("missing (1):\n  quant_conv.bias"));
  EXPECT_THAT(error(missing), HasSubstr(weights.string()));
  auto wrong = tensors;
  wrong["quant_conv.bias"] = Tensor::Zeros({9});
  EXPECT_THAT(error(wrong), HasSubstr("quant_conv.bias: the tensor has shape [9]"));
}

// ---------------------------------------------------------------- folders

TEST(ModelFolderTest, ShardsAndVariants) {
  TempFolder folder;
  fs::path source = Fixture("vae/kl-tiny");
  auto tensors = ReadSafetensors(source / "diffusion_pytorch_model.safetensors").tensors;
  std::map<std::string, Tensor> halves[2];
  std::string map;
  for (const auto& [name, tensor] : tensors) {
    int shard = name.starts_with("encoder");
    halves[shard][name] = tensor;
    map += fmt::format("{}\"{}\": \"part-{}.safetensors\"", map.empty() ? "" : ", ", name, shard);
  }
  folder.Write("vae/config.json", test::ReadText(source / "config.json"));
  auto write = [&](const std::string& weight_map) {
    folder.Write("vae/diffusion_pytorch_model.safetensors.index.json",
                 R"({"metadata": {"total_size": 1}, "weight_map": {)" + weight_map + "}}");
  };
  auto error = [&] { return MessageOf<FileError>([&] { LoadAutoencoderKL(folder / "vae"); }); };
  EXPECT_THAT(error(), HasSubstr("diffusion_pytorch_model.safetensors: no such file"));
  write(map);
  for (int i : {0, 1}) {
    WriteSafetensors(folder / fmt::format("vae/part-{}.safetensors", i), {halves[i], {}});
  }
  auto loaded = LoadAutoencoderKL(folder / "vae")->SaveParameters();
  for (const auto& [name, tensor] : tensors) EXPECT_EQ(RelativeError(loaded[name], tensor), 0);

  write(map + R"(, "more": "part-1.safetensors")");
  EXPECT_THAT(error(), HasSubstr("part-1.safetensors lacks tensor 'more'"));
  write(map + R"(, "more": "../part-1.safetensors")");
  EXPECT_THAT(error(), HasSubstr("no file name"));
  write(map.substr(map.find(", ") + 2));
  EXPECT_THAT(error(), HasSubstr("not listed"));
  write(map);
  fs::resize_file(folder / "vae/part-1.safetensors",
                  fs::file_size(folder / "vae/part-1.safetensors") - 8);
  EXPECT_THAT(error(), HasSubstr("part-1.safetensors"));
  fs::remove(folder / "vae/part-1.safetensors");
  EXPECT_THAT(error(), HasSubstr("part-1.safetensors"));

  // A model of which there is a half-precision file only; the name decides, not the content.
  fs::remove(folder / "vae/diffusion_pytorch_model.safetensors.index.json");
  WriteSafetensors(folder / "vae/diffusion_pytorch_model.fp16.safetensors", {tensors, {}});
  EXPECT_EQ(LoadAutoencoderKL(folder / "vae")->SaveParameters().size(), tensors.size());

  // What is saved loads again.
  auto vae = LoadAutoencoderKL(source);
  SaveAutoencoderKL(folder / "copy", *vae);
  auto copy = LoadAutoencoderKL(folder / "copy");
  EXPECT_EQ(copy->config(), vae->config());
  EXPECT_EQ(RelativeError(copy->GetParameters(), vae->GetParameters()), 0);
}

// ---------------------------------------------------------------- CLIPTextModel

CLIPTextConfig TinyClip() {
  return {.vocab_size = 11,
          .hidden_size = 8,
          .intermediate_size = 12,
          .num_hidden_layers = 3,
          .num_attention_heads = 2,
          .max_position_embeddings = 6,
          .bos_token_id = 9,
          .eos_token_id = 10};
}

Tensor Ids(const Shape& shape, const std::vector<int64_t>& ids) { return Tensor::From(shape, ids); }

TEST(CLIPTextModelTest, Gradients) {
  for (const char* act : {"quick_gelu", "gelu"}) {
    CLIPTextConfig config = TinyClip();
    config.hidden_act = act;
    CLIPTextModel model(config);
    CheckLayer(model, {Ids({2, 5}, {9, 3, 4, 10, 10, 9, 1, 10, 2, 0})});
  }
}

TEST(CLIPTextModelTest, ClipSkipAndPooling) {
  for (int64_t eos : {5, 2}) {
    CLIPTextConfig config = TinyClip();
    config.eos_token_id = eos;
    CLIPTextModel model(config);
    model.SetTrainingMode(false);
    Tensor ids = Ids({3, 5}, {9, 3, 4, 10, 10, 3, 5, 9, 5, 1, 0, 1, 3, 5, 5});
    auto run = [&] {
      return Evaluate(ids, [&](Value v) {
        CLIPTextModel::Output output = model.Build(v);
        std::vector<Value> values = {output.last_hidden_state, output.pooler_output};
        values.insert(values.end(), output.hidden_states.begin(), output.hidden_states.end());
        return values;
      });
    };
    auto plain = run();
    ASSERT_EQ(plain.size(), 6u);
    // The first eos, or the first token if there is none; with eos 2 the largest id.
    std::vector<int64_t> ends = {0, 1, 3};
    if (eos == 2) ends = {3, 2, 3};
    for (int64_t b = 0; b < 3; ++b) {
      for (int64_t c = 0; c < 8; ++c) {
        EXPECT_EQ(plain[1].data()[b * 8 + c],
                  plain[0].data()[(b * 5 + ends[static_cast<size_t>(b)]) * 8 + c]);
      }
    }
    // Skipping k layers is a model of k layers less.
    for (int64_t skip : {1, 2}) {
      model.SetClipSkip(skip);
      auto skipped = run();
      CLIPTextConfig shorter = config;
      shorter.num_hidden_layers -= skip;
      CLIPTextModel small(shorter);
      small.LoadParameters(model.SaveParameters(), /*strict=*/false);
      small.SetTrainingMode(false);
      EXPECT_LT(RelativeError(skipped[0], small.Forward(ids)), 1e-6);
      EXPECT_EQ(RelativeError(skipped[1], plain[1]), 0);  // the pooled state is not skipped
      EXPECT_GT(RelativeError(skipped[0], plain[0]), 1e-3);
    }
    model.SetClipSkip(0);
    EXPECT_EQ(RelativeError(model.Forward(ids), plain[0]), 0);
    EXPECT_THROW(model.SetClipSkip(3), ValueError);
  }
}

TEST(CLIPTextModelTest, EarlierTokensDoNotSeeLaterOnes) {
  CLIPTextModel model(TinyClip());
  model.SetTrainingMode(false);
  Tensor a = model.Forward(Ids({1, 5}, {9, 3, 4, 5, 10}));
  Tensor b = model.Forward(Ids({1, 5}, {9, 3, 4, 6, 10}));
  for (int64_t i = 0; i < 3 * 8; ++i) EXPECT_EQ(a.data()[i], b.data()[i]);
  EXPECT_GT(RelativeError(a, b), 1e-3);
}

TEST(CLIPTextModelTest, StableDiffusionSizes) {
  CLIPTextModel model({.hidden_size = 768,
                       .intermediate_size = 3072,
                       .num_attention_heads = 12,
                       .eos_token_id = 2});
  EXPECT_EQ(model.ParameterCount(), 123'060'480);
  EXPECT_EQ(model.ParameterShapes().size(), 196u);
}

TEST(CLIPTextModelTest, ConfigAndFileNames) {
  CLIPTextConfig config = TinyClip();
  EXPECT_EQ(CLIPTextConfig::FromJson(config.ToJson()), config);
  auto error = [](const std::string& json) {
    return MessageOf<ValueError>([&] { CLIPTextConfig::FromJson(json); });
  };
  EXPECT_THAT(error(R"({"hidden_sice": 4})"), HasSubstr("'hidden_sice'"));
  EXPECT_THAT(error(R"({"model_type": "clip_vision_model"})"), HasSubstr("clip_vision_model"));
  EXPECT_THAT(error(R"({"architectures": ["CLIPTextModelWithProjection"]})"),
              HasSubstr("WithProjection"));
  EXPECT_THAT(error(R"({"hidden_act": "tanh"})"), HasSubstr("tanh"));
  EXPECT_THAT(error(R"({"num_attention_heads": 7})"), HasSubstr("must divide"));
  EXPECT_THAT(error(R"({"attention_dropout": 0.1})"), HasSubstr("attention_dropout"));
  EXPECT_THAT(error(R"({"eos_token_id": 49408})"), HasSubstr("eos_token_id"));

  // With and without the prefix, and with the old constant.
  auto model = LoadCLIPTextModel(Fixture("clip/tiny"));
  auto tensors = model->SaveParameters();
  TempFolder folder;
  folder.Write("a/config.json", test::ReadText(Fixture("clip/tiny") / "config.json"));
  tensors["text_model.embeddings.position_ids"] = Tensor({1, 20}, DType::kI64);
  WriteSafetensors(folder / "a/model.safetensors", {tensors, {}});
  EXPECT_EQ(RelativeError(LoadCLIPTextModel(folder / "a")->GetParameters(), model->GetParameters()),
            0);
  tensors["text_model.more"] = Tensor::Zeros({1});
  WriteSafetensors(folder / "a/model.safetensors", {tensors, {}});
  EXPECT_THAT(MessageOf<FileError>([&] { LoadCLIPTextModel(folder / "a"); }),
              HasSubstr("unexpected (1):\n  text_model.more"));
}

// ---------------------------------------------------------------- CLIPTokenizer

const std::vector<std::string> kPairs = {"l o",      "lo w</w>", "e r</w>", "t h",
                                         "th e</w>", "c a",      "ca t</w>"};

TEST(CLIPTokenizerTest, FollowsThePublishedRules) {
  TinyVocabulary v(kPairs);
  ASSERT_EQ(v.size, 521);
  CLIPTokenizer tokenizer(v.vocab, v.merges);
  auto ids = [&](const std::string& text) {
    std::vector<int64_t> ids = tokenizer.Tokenize(text);
    ids.insert(ids.begin(), tokenizer.bos());
    ids.push_back(tokenizer.eos());
    return ids;
  };
  EXPECT_THAT(ids("The  cat lower."), ElementsAre(519, 516, 518, 512, 86, 514, 269, 520));
  EXPECT_THAT(ids(""), ElementsAre(519, 520));
  EXPECT_THAT(ids("<|endoftext|> x"), ElementsAre(519, 520, 343, 520));
  EXPECT_THAT(ids("a!!! 123 don't  CAFÉ"), ElementsAre(519, 320, 0, 0, 256, 272, 273, 274, 67, 78,
                                                       333, 6, 339, 517, 69, 127, 358, 520));
  // Decomposed and composed accents are the same text.
  EXPECT_EQ(ids("cafe\u0301"), ids("CAF\u00c9"));
  EXPECT_EQ(ids("\u00a0the\u3000 cat\n"), ids("the cat"));
  EXPECT_EQ(tokenizer.Decode(ids("The  cat lower: CAFÉ!")), "the cat lower : café !");

  CLIPTokenizer eight(v.vocab, v.merges, {.model_max_length = 8});
  auto low = eight.Encode("low");
  EXPECT_THAT(low.ids, ElementsAre(519, 513, 520, 520, 520, 520, 520, 520));
  EXPECT_EQ(low.tokens, 1);
  EXPECT_EQ(low.cut, "");
  auto letters = eight.Encode("l o w e r t h e c a t x y");
  EXPECT_THAT(letters.ids, ElementsAre(519, 331, 334, 342, 324, 337, 339, 520));
  EXPECT_EQ(letters.tokens, 13);
  EXPECT_EQ(letters.cut, "h e c a t x y");
  EXPECT_EQ(eight.EncodeAll(std::vector<std::string>{"low", "cat"}).shape(), (Shape{2, 8}));
}

TEST(CLIPTokenizerTest, MergesByRankNotByPlace) {
  // "abab": the stronger "b a" first, although "a b" comes first in the text.
  TinyVocabulary v({"b a", "a b"});
  CLIPTokenizer tokenizer(v.vocab, v.merges);
  EXPECT_THAT(tokenizer.Tokenize("abab"),
              ElementsAre(tokenizer.IdOf("a"), tokenizer.IdOf("ba"), tokenizer.IdOf("b</w>")));
}

TEST(CLIPTokenizerTest, BadFilesAreRefused) {
  TinyVocabulary v(kPairs);
  auto error = [](const std::string& vocab, const std::string& merges,
                  CLIPTokenizerConfig config = {}) {
    return MessageOf<ValueError>([&] { CLIPTokenizer tokenizer(vocab, merges, config); });
  };
  EXPECT_THAT(error(v.vocab, v.merges + "q z\n"),
              HasSubstr("line 9 of the merges needs token 'qz'"));
  EXPECT_THAT(error(v.vocab, v.merges + "l o\n"),
              HasSubstr("line 9 of the merges, 'l o', is there"));
  EXPECT_THAT(error(v.vocab, v.merges + "lo\n"), HasSubstr("two tokens"));
  EXPECT_THAT(error(v.vocab, v.merges + "\nl l\n"), HasSubstr("line 9"));
  EXPECT_THAT(error(v.vocab, "l o\n"), HasSubstr("#version"));
  EXPECT_THAT(error(v.vocab, ""), HasSubstr("empty"));
  EXPECT_THAT(error("[]", v.merges), HasSubstr("object"));
  EXPECT_THAT(error("{", v.merges), HasSubstr("not a JSON object"));
  std::string open = v.vocab.substr(0, v.vocab.size() - 1);
  EXPECT_THAT(error(open + R"(, "lo": 700})", v.merges), HasSubstr("'lo' twice"));
  EXPECT_THAT(error(open + R"(, "new": 7})", v.merges), HasSubstr("same id 7"));
  EXPECT_THAT(error(open + R"(, "new": -7})", v.merges), HasSubstr("-7"));
  EXPECT_THAT(error(open + R"(, "new": "7"})", v.merges), HasSubstr("'new'"));
  EXPECT_THAT(error(v.vocab, v.merges, {.pad_token = "<pad>"}), HasSubstr("'<pad>'"));
  CLIPTokenizer tokenizer(v.vocab, v.merges);
  EXPECT_THAT(MessageOf<ValueError>([&] { tokenizer.Encode("ab\xff"); }), HasSubstr("byte 2"));
  EXPECT_THAT(MessageOf<ValueError>([&] { tokenizer.Decode(std::vector<int64_t>{521}); }),
              HasSubstr("521"));
}

// What transformers 5.23 writes for a tokenizer that has been called.
TEST(CLIPTokenizerTest, ConfigFileOfTransformers5) {
  CLIPTokenizerConfig config = CLIPTokenizerConfig::FromJson(R"({
    "add_prefix_space": false, "backend": "tokenizers", "bos_token": "<|startoftext|>",
    "do_lower_case": true, "eos_token": "<|endoftext|>", "errors": "replace", "is_local": true,
    "local_files_only": false, "max_length": 77, "model_max_length": 77,
    "pad_to_multiple_of": null, "pad_token": "<|endoftext|>", "pad_token_type_id": 0,
    "padding_side": "right", "stride": 0, "tokenizer_class": "CLIPTokenizer",
    "truncation_side": "right", "truncation_strategy": "longest_first",
    "unk_token": "<|endoftext|>"})");
  EXPECT_EQ(config.model_max_length, 77);
  EXPECT_EQ(config.bos_token, "<|startoftext|>");
  EXPECT_EQ(config.pad_token, "<|endoftext|>");
}

TEST(CLIPTokenizerTest, ConfigFile) {
  CLIPTokenizerConfig config = CLIPTokenizerConfig::FromJson(
      R"({"add_prefix_space": false, "bos_token": {"__type": "AddedToken", "content": "<b>"},
          "do_lower_case": true, "eos_token": "<e>", "errors": "replace", "model_max_length": 16,
          "pad_token": "!", "tokenizer_class": "CLIPTokenizer", "unk_token": "<e>"})");
  EXPECT_EQ(config.bos_token, "<b>");
  EXPECT_EQ(config.pad_token, "!");
  EXPECT_EQ(config.model_max_length, 16);
  auto error = [](const std::string& json) {
    return MessageOf<ValueError>([&] { CLIPTokenizerConfig::FromJson(json); });
  };
  EXPECT_THAT(error(R"({"do_lower_case": false})"), HasSubstr("do_lower_case"));
  EXPECT_THAT(error(R"({"model_max_length": 1})"), HasSubstr("model_max_length"));
  EXPECT_THAT(error(R"({"tokenizer_class": "T5Tokenizer"})"), HasSubstr("T5Tokenizer"));
  EXPECT_THAT(error(R"({"bos_tokn": "x"})"), HasSubstr("bos_tokn"));
  EXPECT_THAT(error(R"({"padding_side": "left"})"), HasSubstr("padding_side"));
  EXPECT_THAT(error(R"({"truncation_side": "left"})"), HasSubstr("truncation_side"));
  EXPECT_THAT(error(R"({"pad_token_type_id": 1})"), HasSubstr("pad_token_type_id"));
  EXPECT_THAT(error(R"({"bos_token": 3})"), HasSubstr("bos_token"));
}

}  // namespace
}  // namespace calotype
