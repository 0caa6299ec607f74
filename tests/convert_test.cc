// Stable Diffusion models as files: the names of the original single-file layout, conversion in
// both directions, half precision, and files that are wrong.
#include "pipelines/convert.h"
#include "core/json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>

#include "core/random.h"
#include "core/sha256.h"
#include "diffusion/noise_schedule.h"
#include "io/half.h"
#include "models/original_config.h"
#include "pipelines/model_folder.h"
#include "tests/expect_error.h"
#include "tests/run_program.h"
#include "tests/temp_folder.h"

namespace calotype {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using test::ReadText;
using test::TempFolder;
using test::WriteText;
using ::testing::AllOf;
using ::testing::HasSubstr;

fs::path Fixture(const std::string& name) {
  return fs::path(CALOTYPE_TEST_DATA) / "fixtures" / name;
}

// ---------------------------------------------------------------- names

// Stable Diffusion 1.5 and 2.1 at full size.
OriginalConfigs StableDiffusion(bool v2) {
  OriginalConfigs c;
  c.unet.sample_size = 64;
  c.unet.cross_attention_dim = {v2 ? 1024 : 768};
  c.unet.use_linear_projection = v2;
  if (v2) c.unet.attention_head_dim = {5, 10, 20, 20};
  c.vae.down_block_types.assign(4, "DownEncoderBlock2D");
  c.vae.up_block_types.assign(4, "UpDecoderBlock2D");
  c.vae.block_out_channels = {128, 256, 512, 512};
  c.vae.layers_per_block = 2;
  c.vae.sample_size = 512;
  c.text_encoder.hidden_size = v2 ? 1024 : 768;
  c.text_encoder.intermediate_size = v2 ? 4096 : 3072;
  c.text_encoder.num_hidden_layers = v2 ? 23 : 12;
  c.text_encoder.num_attention_heads = v2 ? 16 : 12;
  c.text_encoder.hidden_act = v2 ? "gelu" : "quick_gelu";
  c.text_encoder.bos_token_id = 0;
  c.text_encoder.eos_token_id = 2;
  c.text_encoder.projection_dim = v2 ? 512 : 768;
  c.layout = v2 ? TextLayout::kOpenClip : TextLayout::kTransformers;
  return c;
}

std::vector<std::pair<std::string, std::vector<OriginalKey>>> AllKeys(const OriginalConfigs& c) {
  return {{"unet", OriginalUNetKeys(c.unet)},
          {"vae", OriginalVaeKeys(c.vae)},
          {"text_encoder", OriginalTextKeys(c.text_encoder, c.layout)}};
}

TEST(OriginalKeysTest, AreThoseThatDiffusersConverts) {
  json golden = ParseJson(ReadText(Fixture("original") / "keys.json"));
  for (bool v2 : {false, true}) {
    const json& expected = golden.at(v2 ? "sd21" : "sd15");
    std::set<std::string> lines;
    for (const auto& [folder, keys] : AllKeys(StableDiffusion(v2))) {
      for (const OriginalKey& key : keys) {
        for (const auto& part : key.parts) {
          lines.insert(fmt::format("{} {}/{}\n", key.original, folder, part.name));
        }
      }
    }
    EXPECT_EQ(lines.size(), expected.at("count"));
    for (const std::string line : expected.at("some")) EXPECT_TRUE(lines.contains(line + "\n"));
    std::string text;
    for (const std::string& line : lines) text += line;
    EXPECT_EQ(Sha256Of(text), expected.at("sha256"));
  }
}

TEST(OriginalKeysTest, ConfigsFollowFromShapes) {
  for (bool v2 : {false, true}) {
    const OriginalConfigs expected = StableDiffusion(v2);
    std::map<std::string, Shape> shapes;
    for (const auto& [folder, keys] : AllKeys(expected)) {
      for (const OriginalKey& key : keys) shapes[key.original] = key.OriginalShape();
    }
    if (v2) {  // files of SD 2.x have a last layer that nobody uses
      shapes["cond_stage_model.model.transformer.resblocks.23.ln_1.weight"] = {1024};
    }
    OriginalConfigs derived = DeriveOriginalConfigs(shapes);
    EXPECT_EQ(derived.unet, expected.unet);
    EXPECT_EQ(derived.vae, expected.vae);
    EXPECT_EQ(derived.text_encoder, expected.text_encoder);
    EXPECT_EQ(derived.layout, expected.layout);
  }
}

// ---------------------------------------------------------------- conversion

// A small Stable Diffusion folder; `v2` with the text encoder and the projections of 2.x; `wide`
// with the 32 groups of the full size, so that its configurations follow from its tensors.
void WriteFolder(const fs::path& folder, bool v2, bool wide = false) {
  WriteText(
      folder / "model_index.json",
      R"({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})");
  UNet2DConditionConfig u = UNet2DConditionConfig::FromJson(
      ReadText(Fixture(v2 ? "unet/sd21-tiny" : "unet/sd15-tiny") / "config.json"));
  u.cross_attention_dim = {16};
  u.layers_per_block = {2};
  if (wide) u.block_out_channels = {32, 64}, u.norm_num_groups = 32;
  UNet2DConditionModel unet(u);
  unet.Initialize(1);
  SaveUNet(folder / "unet", unet);
  AutoencoderKLConfig a =
      AutoencoderKLConfig::FromJson(ReadText(Fixture("vae/kl-tiny") / "config.json"));
  if (wide) a.block_out_channels = {32, 64}, a.norm_num_groups = 32;
  AutoencoderKL vae(a);
  vae.Initialize(2);
  SaveAutoencoderKL(folder / "vae", vae);
  CLIPTextConfig t = CLIPTextConfig::FromJson(ReadText(Fixture("clip/tiny") / "config.json"));
  if (v2) t.hidden_act = "gelu";
  t.vocab_size = 49408;  // of the tokenizer
  CLIPTextModel text(t);
  text.Initialize(3);
  SaveCLIPTextModel(folder / "text_encoder", text);
  WriteText(folder / "scheduler/scheduler_config.json",
            ToJson(SchedulerConfig{.type = "DDIMScheduler", .prediction_type = "v_prediction"}));
  for (const char* name : {"vocab.json", "merges.txt"}) {
    WriteText(folder / "tokenizer" / name, ReadText(Fixture("clip/tokenizer") / name));
  }
}

const char* const kWeights[] = {"unet/diffusion_pytorch_model.safetensors",
                                "vae/diffusion_pytorch_model.safetensors",
                                "text_encoder/model.safetensors"};

TEST(ConvertTest, RoundTripsAreExact) {
  for (bool v2 : {false, true}) {
    for (const char* dtype : {"", "float32", "float16", "bfloat16"}) {
      if (v2 && *dtype == 'b') continue;
      SCOPED_TRACE(fmt::format("{} {}", v2, dtype));
      TempFolder folder;
      WriteFolder(folder / "sd", v2);
      ConvertOptions there{.in = folder / "sd", .out = folder / "sd.safetensors"};
      if (*dtype) there.dtype = ParseFloatFormat(dtype);
      EXPECT_EQ(ConvertModel(there).size(), 3u);
      ConvertOptions back{.in = folder / "sd.safetensors", .out = folder / "back/"};
      back.tokenizer = folder / "sd/tokenizer";
      ConvertModel(back);
      EXPECT_EQ(folder.Entries(), 3);  // nothing unfinished
      ConvertModel({.in = folder / "back", .out = folder / "again.safetensors"});
      EXPECT_EQ(ReadText(folder / "again.safetensors"), ReadText(folder / "sd.safetensors"));

      const bool half = std::string(dtype).ends_with("16");
      for (const char* name : {"unet/config.json", "vae/config.json", "text_encoder/config.json",
                               "scheduler/scheduler_config.json", "tokenizer/merges.txt"}) {
        EXPECT_EQ(ReadText(folder / "back" / name), ReadText(folder / "sd" / name)) << name;
      }
      for (const char* name : kWeights) {
        if (!half) {
          EXPECT_EQ(ReadText(folder / "back" / name), ReadText(folder / "sd" / name)) << name;
          continue;
        }
        auto header = ReadSafetensorsHeader(folder / "back" / name);
        for (const auto& entry : header.entries) {
          EXPECT_EQ(entry.dtype, *dtype == 'b' ? "BF16" : "F16");
        }
      }
      const json tokenizer = ParseJson(ReadText(folder / "back/tokenizer/tokenizer_config.json"));
      EXPECT_EQ(tokenizer.at("model_max_length"), 20);
      EXPECT_EQ(tokenizer.at("pad_token"), v2 ? "!" : "<|endoftext|>");
      // The folder is a model.
      json index = ParseJson(ReadText(folder / "back/model_index.json"));
      EXPECT_EQ(index.at("safety_checker"), json::array({nullptr, nullptr}));
      EXPECT_EQ(index.at("scheduler"), json::array({"diffusers", "DDIMScheduler"}));
      EXPECT_EQ(LoadUNet(folder / "back/unet")->ParameterCount(),
                LoadUNet(folder / "sd/unet")->ParameterCount());
      LoadAutoencoderKL(folder / "back/vae");
      LoadCLIPTextModel(folder / "back/text_encoder");
      LoadCLIPTokenizer(folder / "back/tokenizer");
    }
  }
}

// Values land where the names say: the stacked rows of OpenCLIP are queries, keys, values.
TEST(ConvertTest, ValuesStayWithTheirNames) {
  TempFolder folder;
  WriteFolder(folder / "sd", /*v2=*/true);
  ConvertModel({.in = folder / "sd", .out = folder / "sd.safetensors"});
  auto file = ReadSafetensors(folder / "sd.safetensors").tensors;
  auto text = ReadSafetensors(folder / "sd/text_encoder/model.safetensors").tensors;
  auto vae = ReadSafetensors(folder / "sd" / kWeights[1]).tensors;
  auto same = [](const Tensor& a, int64_t row, const Tensor& b) {
    int64_t start = row * (b.shape().rank() > 1 ? b.shape()[1] : 1);
    return std::memcmp(a.data() + start, b.data(), static_cast<size_t>(b.bytes())) == 0;
  };
  const Tensor& in = file.at("cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight");
  EXPECT_EQ(in.shape(), Shape({48, 16}));
  int64_t row = 0;
  for (std::string part : {"q", "k", "v"}) {
    const Tensor& rows =
        text.at(fmt::format("text_model.encoder.layers.1.self_attn.{}_proj.weight", part));
    EXPECT_TRUE(same(in, row, rows)) << part;
    row += 16;
  }
  EXPECT_EQ(file.at("first_stage_model.decoder.mid.attn_1.k.weight").shape(),
            Shape({16, 16, 1, 1}));
  EXPECT_TRUE(same(file.at("first_stage_model.decoder.up.1.block.0.conv1.weight"), 0,
                   vae.at("decoder.up_blocks.0.resnets.0.conv1.weight")));
}

// Without metadata the configurations come from --config; averages and constants are left out.
TEST(ConvertTest, FilesOfOthers) {
  TempFolder folder;
  WriteFolder(folder / "sd", /*v2=*/false);
  ConvertModel({.in = folder / "sd", .out = folder / "whole.safetensors"});
  TensorFile file = ReadSafetensors(folder / "whole.safetensors");
  file.metadata = {{"format", "pt"}};
  NoiseSchedule schedule(SchedulerConfig{.type = "DDIMScheduler"});
  file.tensors["alphas_cumprod"] = Tensor::From<float>({1000}, schedule.alphas_cumprod());
  file.tensors["model_ema.decay"] = Tensor::Scalar(0.5f);
  file.tensors["model_ema.num_updates"] = Tensor::From<int32_t>({}, std::vector<int32_t>{7});
  file.tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] =
      Tensor::Zeros({1, 20}, DType::kI64);
  WriteSafetensors(folder / "other.safetensors", file);
  ConvertOptions options{.in = folder / "other.safetensors", .out = folder / "out"};
  options.config = folder / "sd";
  std::vector<std::string> lines = ConvertModel(options);
  EXPECT_THAT(lines, testing::IsSupersetOf({"left out: 2 tensors, averaged weights (model_ema)",
                                            "left out: 1 tensors, constants of the noise schedule",
                                            "left out: 1 tensors, position_ids"}));
  for (const char* name : kWeights) {
    EXPECT_EQ(ReadText(folder / "out" / name), ReadText(folder / "sd" / name)) << name;
  }
  EXPECT_TRUE(fs::exists(folder / "out/tokenizer/vocab.json"));
  // The constants may be rounded to another format.
  for (FloatFormat format : {FloatFormat::kF16, FloatFormat::kBF16}) {
    file.formats["alphas_cumprod"] = format;
    WriteSafetensors(folder / "other.safetensors", file);
    fs::remove_all(folder / "out");
    EXPECT_NO_THROW(ConvertModel(options));
  }

  // Its noise schedule is not that of the configuration.
  fs::remove_all(folder / "out");
  file.tensors["alphas_cumprod"].data()[500] *= 1.01f;
  WriteSafetensors(folder / "other.safetensors", file);
  EXPECT_THAT(MessageOf<FileError>([&] { ConvertModel(options); }), HasSubstr("alphas_cumprod"));
  EXPECT_FALSE(fs::exists(folder / "out"));

  // A tokenizer that is not the text encoder's.
  fs::create_directories(folder / "more");
  fs::copy(folder / "sd/tokenizer/merges.txt", folder / "more/merges.txt");
  std::string vocabulary = ReadText(folder / "sd/tokenizer/vocab.json");
  WriteText(folder / "more/vocab.json",
            vocabulary.insert(vocabulary.rfind('}'), ", \"qqzzqq</w>\": 49408"));
  file.tensors["alphas_cumprod"].data()[500] /= 1.01f;
  WriteSafetensors(folder / "other.safetensors", file);
  options.tokenizer = folder / "more";
  EXPECT_THAT(
      MessageOf<FileError>([&] { ConvertModel(options); }),
      HasSubstr("more: the tokenizer has 49409 tokens, the text encoder's vocab_size is 49408"));
  EXPECT_FALSE(fs::exists(folder / "out"));
  options.tokenizer.clear();

  // A folder of configurations that is none.
  options.config = folder / "sdd";
  EXPECT_THAT(MessageOf<FileError>([&] { ConvertModel(options); }), HasSubstr("sdd: not a folder"));
  options.config = folder / "sd/unet";
  EXPECT_THAT(MessageOf<FileError>([&] { ConvertModel(options); }),
              HasSubstr("sd/unet: not a model folder"));
}

// Models of 2.x that predict the velocity are those for 768 pixels.
TEST(ConvertTest, SampleSizesFollowFromThePrediction) {
  TempFolder folder;
  WriteFolder(folder / "sd", /*v2=*/true, /*wide=*/true);
  ConvertModel({.in = folder / "sd", .out = folder / "sd.safetensors"});
  TensorFile file = ReadSafetensors(folder / "sd.safetensors");
  for (const char* part : {"unet", "vae", "scheduler"})
    file.metadata.erase(fmt::format("calotype.{}", part));
  WriteSafetensors(folder / "other.safetensors", file);
  auto sizes = [&](const ConvertOptions& options) {
    ConvertModel(options);
    auto result =
        std::pair(ReadUNetConfig(options.out / "unet/config.json").sample_size.value_or(0),
                  ReadAutoencoderKLConfig(options.out / "vae/config.json").sample_size);
    fs::remove_all(options.out);
    return result;
  };
  ConvertOptions options{.in = folder / "other.safetensors", .out = folder / "out"};
  options.prediction_type = "epsilon";
  EXPECT_EQ(sizes(options), std::pair(int64_t{64}, int64_t{512}));
  options.prediction_type = "v_prediction";
  EXPECT_EQ(sizes(options), std::pair(int64_t{96}, int64_t{768}));
  // What a configuration says counts.
  WriteText(folder / "config/vae/config.json", ReadText(folder / "sd/vae/config.json"));
  options.config = folder / "config";
  EXPECT_EQ(sizes(options), std::pair(int64_t{96}, int64_t{16}));
}

struct BadFile {
  const char* what;
  std::function<void(TensorFile&)> change;
  std::vector<std::string> says;
};

TEST(ConvertTest, WrongFilesAreNamed) {
  TempFolder folder;
  WriteFolder(folder / "sd", /*v2=*/false);
  ConvertModel({.in = folder / "sd", .out = folder / "sd.safetensors"});
  const TensorFile good = ReadSafetensors(folder / "sd.safetensors");
  const std::string unet = "model.diffusion_model.";
  const std::vector<BadFile> cases = {
      {"missing",
       [&](TensorFile& f) {
         f.tensors.erase(unet + "out.2.bias");
         f.tensors.erase("first_stage_model.quant_conv.bias");
       },
       {"2 missing", "out.2.bias", "first_stage_model.quant_conv.bias"}},
      {"wrong shape",
       [&](TensorFile& f) { f.tensors[unet + "out.2.bias"] = Tensor::Zeros({5}); },
       {"1 of a wrong shape", "out.2.bias is F32[5], expected [4]"}},
      {"wrong dtype",
       [&](TensorFile& f) { f.tensors[unet + "out.2.bias"] = Tensor::Zeros({4}, DType::kI32); },
       {"1 of a wrong dtype", "out.2.bias is I32[4], expected F32, F16 or BF16"}},
      {"doubles",
       [&](TensorFile& f) { f.tensors[unet + "out.2.bias"] = Tensor::Zeros({4}, DType::kF64); },
       {"1 of a wrong dtype", "out.2.bias is F64[4], expected F32, F16 or BF16"}},
      {"unknown",
       [&](TensorFile& f) {
         f.tensors["control_model.a"] = f.tensors["control_model.b"] = Tensor::Zeros({1});
       },
       {"2 unknown: control_model.a, control_model.b", "--allow-unmatched"}},
      {"no U-Net",
       [&](TensorFile& f) {
         std::erase_if(f.tensors, [&](auto& t) { return t.first.starts_with(unet); });
       },
       {"input_blocks.0.0.weight", "not a Stable Diffusion checkpoint"}},
      {"metadata",
       [&](TensorFile& f) { f.metadata["calotype.unet"] = R"({"in_chanels": 4})"; },
       {"'in_chanels'"}},
      {"block type",
       [&](TensorFile& f) {
         json config = ParseJson(f.metadata["calotype.unet"]);
         config["down_block_types"][0] = "AttnDownBlock2D";
         f.metadata["calotype.unet"] = JsonText(config);
       },
       {"AttnDownBlock2D"}},
  };
  for (const BadFile& bad : cases) {
    SCOPED_TRACE(bad.what);
    TensorFile file = good;
    bad.change(file);
    WriteSafetensors(folder / "bad.safetensors", file);
    std::string message = MessageOf<Error>(
        [&] { ConvertModel({.in = folder / "bad.safetensors", .out = folder / "out"}); });
    EXPECT_THAT(message, HasSubstr("bad.safetensors: "));
    for (const std::string& part : bad.says) EXPECT_THAT(message, HasSubstr(part));
    EXPECT_FALSE(fs::exists(folder / "out"));
    EXPECT_EQ(folder.Entries(), 3);  // nothing unfinished
  }
  // Unknown tensors may be left out.
  TensorFile file = good;
  file.tensors["control_model.a"] = Tensor::Zeros({1});
  WriteSafetensors(folder / "bad.safetensors", file);
  EXPECT_THAT(
      ConvertModel(
          {.in = folder / "bad.safetensors", .out = folder / "out", .allow_unmatched = true})[0],
      HasSubstr("control_model.a"));
  EXPECT_THAT(MessageOf<FileError>(
                  [&] { ConvertModel({.in = folder / "sd.safetensors", .out = folder / "out"}); }),
              HasSubstr("exists"));
  // A file of 2.x that nobody knows the prediction type of; other containers; wrong options.
  auto message = [](const ConvertOptions& o) { return MessageOf<Error>([&] { ConvertModel(o); }); };
  WriteFolder(folder / "sd2", /*v2=*/true);
  ConvertModel({.in = folder / "sd2", .out = folder / "sd2.safetensors"});
  file = ReadSafetensors(folder / "sd2.safetensors");
  file.metadata.erase("calotype.scheduler");
  WriteSafetensors(folder / "v2.safetensors", file);
  EXPECT_THAT(message({.in = folder / "v2.safetensors", .out = folder / "o"}),
              HasSubstr("--prediction-type"));
  folder.Write("x.ckpt", "pickle");
  EXPECT_THAT(message({.in = folder / "x.ckpt", .out = folder / "o"}), HasSubstr(".safetensors"));
  EXPECT_THAT(message({.in = folder / "none", .out = folder / "o"}), HasSubstr("no such file"));
  EXPECT_THAT(message({.in = folder / "sd", .out = folder / "o.bin"}), HasSubstr("o.bin"));
  EXPECT_THAT(
      message({.in = folder / "sd", .out = folder / "o.safetensors", .prediction_type = "epsilon"}),
      HasSubstr("--prediction-type"));
}

// A model saved in half precision is the rounded model.
TEST(ModelFolderTest, SavesHalves) {
  TempFolder folder;
  auto vae = LoadAutoencoderKL(Fixture("vae/kl-tiny"));
  SaveAutoencoderKL(folder / "vae", *vae, FloatFormat::kBF16);
  for (const auto& entry : ReadSafetensorsHeader(folder / kWeights[1]).entries) {
    EXPECT_EQ(entry.dtype, "BF16");
  }
  Tensor expected = vae->GetParameters();
  Tensor loaded = LoadAutoencoderKL(folder / "vae")->GetParameters();
  for (int64_t i = 0; i < loaded.elements(); ++i) {
    ASSERT_EQ(loaded.data()[i], BrainToFloat(FloatToBrain(expected.data()[i])));
  }
}

// ---------------------------------------------------------------- wrong folders

struct BadFolder {
  const char* what;
  std::function<void(const fs::path&)> change;
  std::string file;               // named in the message
  std::vector<std::string> says;  // and the key
  bool unsupported = false;       // else a FileError
};

void Replace(const fs::path& path, const std::string& from, const std::string& to) {
  std::string text = ReadText(path);
  size_t at = text.find(from);
  ASSERT_NE(at, std::string::npos) << path;
  WriteText(path, text.replace(at, from.size(), to));
}

void ChangeTensors(const fs::path& path, const std::function<void(TensorFile&)>& change) {
  TensorFile file = ReadSafetensors(path);
  change(file);
  WriteSafetensors(path, file);
}

// Splits the weights into two shards with an index.
void Shard(const fs::path& folder) {
  TensorFile file = ReadSafetensors(folder / "diffusion_pytorch_model.safetensors"), shards[2];
  json map = json::object();
  int i = 0;
  for (const auto& [name, tensor] : file.tensors) {
    shards[i % 2].tensors[name] = tensor;
    map[name] = fmt::format("part-{}.safetensors", i++ % 2);
  }
  for (int k : {0, 1}) WriteSafetensors(folder / fmt::format("part-{}.safetensors", k), shards[k]);
  WriteText(folder / "diffusion_pytorch_model.safetensors.index.json",
            JsonText(json({{"metadata", json::object()}, {"weight_map", map}})));
  fs::remove(folder / "diffusion_pytorch_model.safetensors");
}

TEST(ModelFolderTest, WrongFilesAreNamed) {
  const std::vector<BadFolder> cases = {
      {"missing tensors",
       [](const fs::path& f) {
         ChangeTensors(f / kWeights[0], [](TensorFile& file) {
           file.tensors.erase("conv_in.bias");
           file.tensors.erase("conv_out.bias");
         });
       },
       kWeights[0],
       {"conv_in.bias", "conv_out.bias", "missing (2)"}},
      {"wrong shape",
       [](const fs::path& f) {
         ChangeTensors(f / kWeights[2], [](TensorFile& file) {
           file.tensors["text_model.final_layer_norm.bias"] = Tensor::Zeros({17});
         });
       },
       kWeights[2],
       {"text_model.final_layer_norm.bias", "[17]"}},
      {"unknown tensor",
       [](const fs::path& f) {
         ChangeTensors(f / kWeights[1],
                       [](TensorFile& file) { file.tensors["more"] = Tensor::Zeros({1}); });
       },
       kWeights[1],
       {"more"}},
      {"unknown block type",
       [](const fs::path& f) {
         Replace(f / "unet/config.json", "CrossAttnDownBlock2D", "KCrossAttnDownBlock2D");
       },
       "unet/config.json",
       {"'down_block_types'", "KCrossAttnDownBlock2D"},
       true},
      {"unknown field",
       [](const fs::path& f) { Replace(f / "vae/config.json", "sample_size", "sample_sise"); },
       "vae/config.json",
       {"'sample_sise'"}},
      {"config is not JSON",
       [](const fs::path& f) { WriteText(f / "text_encoder/config.json", "{"); },
       "text_encoder/config.json",
       {"not a JSON object"}},
      {"truncated weights",
       [](const fs::path& f) {
         fs::resize_file(f / kWeights[1], fs::file_size(f / kWeights[1]) - 4);
       },
       kWeights[1],
       {"data byte"}},
      {"truncated shard",
       [](const fs::path& f) {
         Shard(f / "unet");
         fs::resize_file(f / "unet/part-1.safetensors",
                         fs::file_size(f / "unet/part-1.safetensors") / 2);
       },
       "unet/part-1.safetensors",
       {"data byte"}},
      {"missing shard",
       [](const fs::path& f) {
         Shard(f / "unet");
         fs::remove(f / "unet/part-0.safetensors");
       },
       "unet/part-0.safetensors",
       {"No such file"}},
      {"a shard lacks a tensor",
       [](const fs::path& f) {
         Shard(f / "vae");
         ChangeTensors(f / "vae/part-0.safetensors",
                       [](TensorFile& file) { file.tensors.erase(file.tensors.begin()); });
       },
       "vae/diffusion_pytorch_model.safetensors.index.json",
       {"part-0.safetensors lacks tensor"}},
      {"no weights",
       [](const fs::path& f) { fs::remove(f / kWeights[2]); },
       kWeights[2],
       {"no such file"}},
      {"merge of unknown tokens",
       [](const fs::path& f) {
         WriteText(f / "tokenizer/merges.txt", ReadText(f / "tokenizer/merges.txt") + "zq qz\n");
       },
       "tokenizer/{vocab.json, merges.txt}",
       {"line", "of the merges", "'zq'"}},
      {"vocabulary with a gap",
       [](const fs::path& f) { Replace(f / "tokenizer/vocab.json", "49407", "49999"); },
       "tokenizer/{vocab.json, merges.txt}",
       {"vocabulary", "none with id 49407"}},
      {"no vocabulary",
       [](const fs::path& f) { fs::remove(f / "tokenizer/vocab.json"); },
       "tokenizer/vocab.json",
       {"No such file"}},
  };
  TempFolder folder;
  WriteFolder(folder / "good", /*v2=*/false);
  for (const BadFolder& bad : cases) {
    SCOPED_TRACE(bad.what);
    fs::remove_all(folder / "bad");
    fs::copy(folder / "good", folder / "bad", fs::copy_options::recursive);
    bad.change(folder / "bad");
    // A model that is there already stays as it was.
    auto unet = LoadUNet(folder / "good/unet");
    Tensor before = unet->GetParameters();
    auto load = [&] {
      LoadWeightsOf(*unet, folder / "bad/unet");
      LoadUNet(folder / "bad/unet");
      LoadAutoencoderKL(folder / "bad/vae");
      LoadCLIPTextModel(folder / "bad/text_encoder");
      LoadCLIPTokenizer(folder / "bad/tokenizer");
    };
    std::string message =
        bad.unsupported ? MessageOf<UnsupportedError>(load) : MessageOf<FileError>(load);
    EXPECT_THAT(message, HasSubstr((folder / "bad" / bad.file).string()));
    for (const std::string& part : bad.says) EXPECT_THAT(message, HasSubstr(part));
    if (bad.file == kWeights[0]) {
      Tensor after = unet->GetParameters();
      EXPECT_EQ(std::memcmp(after.raw(), before.raw(), static_cast<size_t>(after.bytes())), 0);
    }
  }
}

// ---------------------------------------------------------------- the program

TEST(ConvertTest, Program) {
  const std::string program = std::string(CALOTYPE_BIN_DIR) + "/calotype";
  TempFolder folder;
  WriteFolder(folder / "sd", /*v2=*/false);
  const std::string sd = folder / "sd", file = folder / "sd.safetensors";
  test::ProgramResult run =
      test::RunProgram({program, "convert", sd, "--out", file, "--dtype", "float16"});
  EXPECT_EQ(run.code, 0) << run.err;
  EXPECT_THAT(run.out, AllOf(HasSubstr("unet: "), HasSubstr("wrote " + file)));
  EXPECT_EQ(ReadSafetensorsHeader(file).entries.at(0).dtype, "F16");
  // Exit codes: 2 for a wrong option, 3 for a file.
  EXPECT_EQ(test::RunProgram({program, "convert", sd, "--out", file}).code, 3);
  EXPECT_EQ(test::RunProgram({program, "convert", folder / "none", "--out", file}).code, 3);
  EXPECT_EQ(
      test::RunProgram({program, "convert", sd, "--out", folder / "x.safetensors", "--dtype", "f8"})
          .code,
      2);
  EXPECT_EQ(test::RunProgram({program, "convert", sd}).code, 2);
  Replace(folder / "sd/unet/config.json", "sample_size", "sample_sise");
  run = test::RunProgram({program, "convert", sd, "--out", folder / "x.safetensors"});
  EXPECT_EQ(run.code, 3);
  EXPECT_THAT(run.err, AllOf(HasSubstr("unet/config.json"), HasSubstr("sample_sise")));
}

}  // namespace
}  // namespace calotype
