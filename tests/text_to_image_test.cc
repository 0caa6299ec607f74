// Stable Diffusion folders: pictures number for number as diffusers draws them (a tiny model in
// fixtures/stable_diffusion; make.py there says how the golden pictures were made), and what is
// wrong with damaged folders and options.
#include "pipelines/text_to_image.h"
#include "core/json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/parallel.h"
#include "graph/functions.h"
#include "io/jpeg.h"
#include "io/safetensors.h"
#include "pipelines/convert.h"
#include "pipelines/model_graphs.h"
#include "tests/expect_error.h"
#include "tests/temp_folder.h"

namespace calotype {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using test::ReadText;
using test::TempFolder;
using test::WriteText;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

const fs::path kFixtures = fs::path(CALOTYPE_TEST_DATA) / "fixtures/stable_diffusion";

// Largest difference, relative to the largest value expected.
double Difference(const Tensor& expected, const Tensor& actual) {
  EXPECT_EQ(expected.shape(), actual.shape());
  double largest = 0, difference = 0;
  for (int64_t i = 0; i < expected.elements(); ++i) {
    const double e = expected.data()[i];
    largest = std::max(largest, std::abs(e));
    difference = std::max(difference, std::abs(actual.data()[i] - e));
  }
  return difference == 0 ? 0 : difference / largest;
}

// Values that a picture file holds, in [0, 1].
Tensor Shown(const Tensor& picture) {
  Tensor result = picture.Clone();
  for (float& v : result.values()) v = std::clamp(v / 2 + 0.5f, 0.0f, 1.0f);
  return result;
}

void CopyFolder(const fs::path& from, const fs::path& to) {
  fs::create_directories(to.parent_path());
  fs::copy(from, to, fs::copy_options::recursive | fs::copy_options::overwrite_existing);
}

class StableDiffusionTest : public ::testing::Test {
 protected:
  StableDiffusionTest() {
    SetThreads(1);
    CopyFolder(kFixtures / "model", Model());
    CopyFolder(kFixtures / "model", Inpaint());
    CopyFolder(kFixtures / "inpaint", Inpaint());
  }
  fs::path Model() const { return folder_ / "model"; }
  fs::path Inpaint() const { return folder_ / "inpaint"; }
  // Replaces a text in a file of the model.
  void Edit(const std::string& file, const std::string& from, const std::string& to) {
    std::string text = ReadText(Model() / file);
    const size_t at = text.find(from);
    ASSERT_NE(at, text.npos) << file << ": " << from;
    WriteText(Model() / file, text.replace(at, from.size(), to));
  }
  static GenerateOptions Cat() {
    GenerateOptions options;
    options.prompts = {"the cat"};
    options.seeds = {7};
    options.steps = 4;
    return options;
  }

  TempFolder folder_;
};

GenerateOptions OptionsOf(const json& c) {
  GenerateOptions o;
  c.at("prompts").get_to(o.prompts);
  c.at("seeds").get_to(o.seeds);
  o.rng = c.at("rng");
  o.steps = c.at("num_inference_steps");
  // The model's own sampler needs no name.
  if (c.at("sampler") != "PNDMScheduler") o.sampler = c.at("sampler");
  if (c.contains("guidance_scale")) o.guidance_scale = c.at("guidance_scale").get<double>();
  o.guidance_rescale = c.value("guidance_rescale", 0.0);
  o.negative_prompt = c.value("negative_prompt", "");
  o.eta = c.value("eta", 0.0);
  o.clip_skip = c.value("clip_skip", 0);
  o.width = c.value("width", 0), o.height = c.value("height", 0);
  if (c.contains("strength")) o.strength = c.at("strength").get<double>();
  if (c.value("init", false)) o.init_image = ReadPicture(kFixtures / "init.png");
  if (c.value("mask", false)) o.mask_image = ReadPicture(kFixtures / "mask.png");
  o.batch_size = 2;
  return o;
}

// Every case on both back ends; the worst figures are printed.
TEST_F(StableDiffusionTest, PicturesAreThoseOfDiffusers) {
  const json cases = ParseJson(ReadText(kFixtures / "cases.json")).at("cases");
  const auto expected = ReadSafetensors(kFixtures / "results.safetensors").tensors;
  fs::path legacy = folder_ / "legacy";
  CopyFolder(Model(), legacy);
  json schedule = ParseJson(ReadText(legacy / "scheduler/scheduler_config.json"));
  schedule.erase("steps_offset"), schedule.erase("clip_sample");
  WriteText(legacy / "scheduler/scheduler_config.json", JsonText(schedule));
  ASSERT_EQ(cases.size() * 2, expected.size());
  for (Backend backend : {Backend::kEager, Backend::kJit}) {
    std::map<std::string, std::unique_ptr<TextToImagePipeline>> pipelines;
    for (const char* folder : {"model", "inpaint", "legacy"})
      pipelines[folder] = TextToImagePipeline::Load(folder_ / folder, backend);
    double worst_latents = 0, worst_picture = 0;
    for (const auto& [name, c] : cases.items()) {
      SCOPED_TRACE(fmt::format("{} {}", name, NameOf(backend)));
      GenerateOptions options = OptionsOf(c);
      Tensor latents;
      options.hooks.after_step = [&](const PictureBatch&, int64_t, Tensor sample) {
        return latents = sample;
      };
      std::vector<std::string> warnings;
      GenerateCallbacks callbacks;
      callbacks.warn = [&](const std::string& text) { warnings.push_back(text); };
      auto& pipeline =
          *pipelines.at(c.value("legacy", false) ? "legacy" : c.value("model", "model"));
      const Tensor picture = Shown(pipeline.Generate(options, callbacks));
      const double a = Difference(expected.at(name + ".latents"), latents);
      const double b = Difference(expected.at(name + ".picture"), picture);
      EXPECT_LT(a, 2e-5);
      EXPECT_LT(b, 5e-5);
      worst_latents = std::max(worst_latents, a), worst_picture = std::max(worst_picture, b);
      EXPECT_EQ(warnings.size(), name == "long-prompt" ? 1u : 0u);
      for (const std::string& warning : warnings) {
        // The words that diffusers names, too.
        EXPECT_THAT(warning, AllOf(HasSubstr("77"), HasSubstr("\"red the cat the red the cat")));
      }
    }
    fmt::print("{}: latents {:.1e}, pictures {:.1e}\n", NameOf(backend), worst_latents,
               worst_picture);
  }
}

TEST_F(StableDiffusionTest, AFolderIsWrittenAsItWasRead) {
  std::vector<std::string> warnings;
  auto model =
      DiffusionModel::Load(Model(), [&](const std::string& text) { warnings.push_back(text); });
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_THAT(warnings[0], AllOf(HasSubstr("feature_extractor"), HasSubstr("safety_checker")));
  EXPECT_EQ(model->factor(), 8);
  EXPECT_EQ(model->side(), 64);
  EXPECT_EQ(model->caption_tokens(), 77);
  EXPECT_FALSE(model->takes_mask());
  model->Save(folder_ / "again");
  warnings.clear();
  auto again = DiffusionModel::Load(folder_ / "again",
                                    [&](const std::string& text) { warnings.push_back(text); });
  EXPECT_TRUE(warnings.empty());
  auto a = model->SaveParameters(), b = again->SaveParameters();
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [name, tensor] : a) EXPECT_EQ(Difference(tensor, b.at(name)), 0) << name;
  for (const char* sampler : {"", "ddim", "euler", "dpm++-2m"})
    EXPECT_EQ(again->SchedulerFor(sampler), model->SchedulerFor(sampler)) << sampler;
  for (const char* file : {"vocab.json", "merges.txt", "tokenizer_config.json"})
    EXPECT_EQ(ReadText(Model() / "tokenizer" / file), ReadText(folder_ / "again/tokenizer" / file));
  // The class of the pipeline is that of the U-Net.
  DiffusionModel::Load(Inpaint())->Save(folder_ / "inpaint-again");
  for (auto [name, type] : {std::pair{"again", "StableDiffusionPipeline"},
                            {"inpaint-again", "StableDiffusionInpaintPipeline"}}) {
    const json index = ParseJson(ReadText(folder_ / name / "model_index.json"));
    EXPECT_EQ(index.at("_class_name"), type);
    EXPECT_EQ(index.at("tokenizer"), json::array({"transformers", "CLIPTokenizer"}));
  }
  EXPECT_TRUE(DiffusionModel::Load(folder_ / "inpaint-again")->takes_mask());
}

TEST_F(StableDiffusionTest, AConvertedFileIsAModel) {
  fs::remove(Inpaint() / "tokenizer/tokenizer_config.json");
  const fs::path file = folder_ / "inpaint.safetensors", back = folder_ / "back";
  ConvertModel({.in = Inpaint(), .out = file});
  ConvertModel({.in = file, .out = back, .tokenizer = Inpaint() / "tokenizer"});
  auto model = DiffusionModel::Load(back);
  EXPECT_TRUE(model->takes_mask());
  EXPECT_EQ(model->caption_tokens(), 77);
  EXPECT_EQ(ParseJson(ReadText(back / "model_index.json")).at("_class_name"),
            "StableDiffusionInpaintPipeline");
}

TEST_F(StableDiffusionTest, AnErrorLeavesClipSkipAsItWas) {
  auto model = DiffusionModel::Load(Model());
  EXPECT_THROW(EncoderGraph(*model, int64_t{1} << 62, 1), Error);
  EXPECT_EQ(model->text_encoder()->clip_skip(), 0);
}

// transformers writes tokenizer.json alone from version 5 on.
TEST_F(StableDiffusionTest, TheFastTokenizersFileIsEnough) {
  auto model = DiffusionModel::Load(Model());
  json fast = {{"model", {{"type", "BPE"}, {"merges", json::array()}}}};
  fast["model"]["vocab"] = ParseJson(ReadText(Model() / "tokenizer/vocab.json"));
  std::istringstream lines(ReadText(Model() / "tokenizer/merges.txt"));
  std::string line;
  std::getline(lines, line);
  while (std::getline(lines, line)) {
    const size_t space = line.find(' ');
    fast["model"]["merges"].push_back({line.substr(0, space), line.substr(space + 1)});
  }
  fs::remove(Model() / "tokenizer/vocab.json"), fs::remove(Model() / "tokenizer/merges.txt");
  WriteText(Model() / "tokenizer/tokenizer.json", JsonText(fast));
  auto other = DiffusionModel::Load(Model());
  const std::vector<std::string> texts{"The red cat lower.", "a caf\xc3\xa9", ""};
  Tensor a = model->Tokens(texts, {}), b = other->Tokens(texts, {});
  EXPECT_EQ(std::memcmp(a.raw(), b.raw(), static_cast<size_t>(a.bytes())), 0);
  other->Save(folder_ / "again");
  EXPECT_EQ(ParseJson(ReadText(folder_ / "again/model_index.json")).at("tokenizer"),
            json::array({"transformers", "CLIPTokenizerFast"}));
  DiffusionModel::Load(folder_ / "again");
  fast["model"]["type"] = "Unigram";
  WriteText(Model() / "tokenizer/tokenizer.json", JsonText(fast));
  EXPECT_THAT(MessageOf<UnsupportedError>([&] { DiffusionModel::Load(Model()); }),
              AllOf(HasSubstr("tokenizer.json"), HasSubstr("Unigram")));
}

TEST_F(StableDiffusionTest, DamagedFoldersAreNamed) {
  auto load = [&] { DiffusionModel::Load(Model()); };
  auto restore = [&] {
    fs::remove_all(Model());
    CopyFolder(kFixtures / "model", Model());
  };
  for (const char* part : {"unet", "vae", "text_encoder"}) {
    for (const char* file : {"config.json", std::strcmp(part, "text_encoder") == 0
                                                ? "model.safetensors"
                                                : "diffusion_pytorch_model.safetensors"}) {
      fs::remove(Model() / part / file);
      EXPECT_THAT(MessageOf<FileError>(load), HasSubstr(fmt::format("{}/{}", part, file)));
      restore();
    }
  }
  fs::remove(Model() / "tokenizer/merges.txt");
  EXPECT_THAT(MessageOf<FileError>(load), HasSubstr("tokenizer/merges.txt"));
  restore();
  fs::remove(Model() / "scheduler/scheduler_config.json");
  EXPECT_THAT(MessageOf<FileError>(load), HasSubstr("scheduler_config.json"));
  restore();

  Edit("model_index.json", "\"vae\"", "\"vae_\"");
  EXPECT_THAT(MessageOf<FileError>(load), AllOf(HasSubstr("model_index.json"), HasSubstr("vae")));
  restore();
  Edit("model_index.json", "CLIPTextModel", "T5EncoderModel");
  EXPECT_THAT(MessageOf<UnsupportedError>(load),
              AllOf(HasSubstr("text_encoder"), HasSubstr("T5EncoderModel")));
  restore();
  Edit("model_index.json", "StableDiffusionPipeline", "StableDiffusionXLPipeline");
  EXPECT_THAT(MessageOf<UnsupportedError>(load), HasSubstr("StableDiffusionXLPipeline"));
  restore();
  Edit("model_index.json", "PNDMScheduler", "HeunDiscreteScheduler");
  EXPECT_THAT(MessageOf<UnsupportedError>(load), HasSubstr("HeunDiscreteScheduler"));
  restore();
  Edit("model_index.json", "\"vae\": [", "\"vae\": 3, \"x\": [");
  EXPECT_THAT(MessageOf<FileError>(load), AllOf(HasSubstr("model_index.json"), HasSubstr("vae")));
  restore();

  Edit("text_encoder/config.json", "\"hidden_size\": 32", "\"hidden_size\": 16");
  EXPECT_THAT(MessageOf<FileError>(load), HasSubstr("cross_attention_dim"));
  restore();
  Edit("vae/config.json", "\"latent_channels\": 4", "\"latent_channels\": 8");
  EXPECT_THAT(MessageOf<FileError>(load), HasSubstr("latent_channels"));
  restore();
  Edit("tokenizer/tokenizer_config.json", "77", "99");
  EXPECT_THAT(MessageOf<FileError>(load), HasSubstr("model_max_length"));
  restore();
  Edit("unet/config.json", "CrossAttnDownBlock2D", "SkipDownBlock2D");
  EXPECT_THAT(MessageOf<UnsupportedError>(load),
              AllOf(HasSubstr("unet/config.json"), HasSubstr("SkipDownBlock2D")));
  restore();
  fs::path weights = Model() / "vae/diffusion_pytorch_model.safetensors";
  TensorFile file = ReadSafetensors(weights);
  file.tensors.erase("decoder.conv_out.bias");
  WriteSafetensors(weights, file);
  EXPECT_THAT(MessageOf<FileError>(load),
              AllOf(HasSubstr("vae"), HasSubstr("decoder.conv_out.bias")));
}

TEST_F(StableDiffusionTest, BadOptionsAreNamed) {
  auto pipeline = TextToImagePipeline::Load(Model(), Backend::kEager);
  auto inpaint = TextToImagePipeline::Load(Inpaint(), Backend::kEager);
  const Image init = ReadPicture(kFixtures / "init.png"),
              mask = ReadPicture(kFixtures / "mask.png");
  auto message = [&](auto change, TextToImagePipeline& with) {
    GenerateOptions options = Cat();
    change(options);
    return MessageOf<ValueError>([&] { with.Generate(options); });
  };
  EXPECT_THAT(message([](GenerateOptions& o) { o.width = 60; }, *pipeline),
              AllOf(HasSubstr("width"), HasSubstr("60"), HasSubstr("multiple of 8")));
  EXPECT_THAT(message([](GenerateOptions& o) { o.height = 4; }, *pipeline), HasSubstr("height"));
  EXPECT_THAT(message([](GenerateOptions& o) { o.clip_skip = 3; }, *pipeline),
              HasSubstr("clip_skip"));
  EXPECT_THAT(message([&](GenerateOptions& o) { o.mask_image = mask; }, *pipeline),
              HasSubstr("mask"));
  EXPECT_THAT(message([&](GenerateOptions& o) { o.strength = 0.5; }, *pipeline),
              HasSubstr("strength"));
  EXPECT_THAT(
      message([&](GenerateOptions& o) { o.init_image = init, o.strength = 1.5; }, *pipeline),
      HasSubstr("1.5"));
  EXPECT_THAT(
      message([&](GenerateOptions& o) { o.init_image = init, o.strength = 0.2; }, *pipeline),
      HasSubstr("none of 4 steps"));
  EXPECT_THAT(message(
                  [&](GenerateOptions& o) {
                    o.init_image = init;
                    o.mask_image = Image{2, 1, std::vector<uint8_t>(6)};
                  },
                  *pipeline),
              AllOf(HasSubstr("2 x 1"), HasSubstr("70 x 52")));
  EXPECT_THAT(message([](GenerateOptions&) {}, *inpaint), HasSubstr("inpainting"));
  EXPECT_THAT(message([](GenerateOptions& o) { o.prompts = {"\xff"}; }, *pipeline),
              HasSubstr("UTF-8"));
}

TEST_F(StableDiffusionTest, ParametersAreWhatOtherProgramsWrite) {
  auto model = DiffusionModel::Load(Model());
  GenerateOptions options = Cat();
  options.clip_skip = 1, options.rng = "torch", options.steps = 20;
  EXPECT_THAT(GenerationParameters(*model, options, 0),
              HasSubstr("the cat\nSteps: 20, Sampler: PLMS, CFG scale: 7.5, Seed: 7, Size: 64x64, "
                        "Clip skip: 2, RNG: CPU, Version: calotype"));
  options.init_image = ReadPicture(kFixtures / "init.png");
  EXPECT_THAT(GenerationParameters(*model, options, 0),
              HasSubstr("Size: 64x48, Denoising strength: 0.8, Clip skip"));
}

// Ready embeddings take the place of prompts: at each step, longer ones, and several with weights.
TEST_F(StableDiffusionTest, ContextsMayBeGiven) {
  auto pipeline = TextToImagePipeline::Load(Model(), Backend::kJit);
  GenerateOptions options = Cat();
  options.sampler = "ddim";
  auto embedding = [&](const std::string& text) {
    return pipeline->Encode(pipeline->model().Tokens(std::vector{text}, {})).Reshape({77, 32});
  };
  const Tensor none = embedding(""), cat = embedding("the cat"), low = embedding("low");
  const Tensor plain = pipeline->Generate(options);
  options.context = [&](size_t, int64_t, int64_t steps) {
    EXPECT_EQ(steps, 4);
    return PictureContext{none, {cat}, {}};
  };
  EXPECT_EQ(Difference(plain, pipeline->Generate(options)), 0);
  // Two halves of one prompt are the prompt.
  options.context = [&](size_t, int64_t, int64_t) {
    return PictureContext{none, {cat, cat}, {0.25, 0.75}};
  };
  EXPECT_LT(Difference(plain, pipeline->Generate(options)), 1e-4);
  // u + g (w1 (c1 - u) + w2 (c2 - u)) changes with the weights and without guidance.
  auto joined = [&](double a, double b, double scale) {
    GenerateOptions o = options;
    o.guidance_scale = scale;
    o.context = [&, a, b](size_t, int64_t, int64_t) {
      return PictureContext{none, {cat, low}, {a, b}};
    };
    return pipeline->Generate(o);
  };
  EXPECT_GT(Difference(joined(1, 1, 7.5), joined(1, 0.5, 7.5)), 1e-3);
  GenerateOptions alone = options;
  alone.guidance_scale = 1;
  alone.context = [&](size_t, int64_t, int64_t) { return PictureContext{{}, {cat}, {}}; };
  EXPECT_LT(Difference(pipeline->Generate(alone), joined(1, 0, 1)), 1e-4);
  // 154 tokens, and another prompt from the third step on.
  auto twice = [](const Tensor& x) {
    Tensor both({154, 32});
    std::copy_n(x.data(), x.elements(), both.data());
    std::copy_n(x.data(), x.elements(), both.data() + x.elements());
    return both;
  };
  std::vector<int64_t> steps;
  options.context = [&](size_t, int64_t step, int64_t) {
    steps.push_back(step);
    return PictureContext{twice(none), {twice(step < 2 ? cat : low)}, {}};
  };
  EXPECT_GT(Difference(plain, pipeline->Generate(options)), 1e-3);
  EXPECT_THAT(steps, ElementsAre(0, 0, 1, 2, 3));  // the first one to lay out the batches
  // Pictures of different contexts are computed apart, each as alone.
  options.prompts = {"", ""}, options.seeds = {7, 7}, options.batch_size = 2;
  options.context = [&](size_t picture, int64_t, int64_t) {
    return picture == 0 ? PictureContext{none, {cat}, {}}
                        : PictureContext{twice(none), {twice(low)}, {}};
  };
  Tensor both = pipeline->Generate(options);
  Tensor first(plain.shape());
  std::copy_n(both.data(), first.elements(), first.data());
  EXPECT_EQ(Difference(plain, first), 0);
  options.context = [&](size_t, int64_t step, int64_t) {
    return PictureContext{none, {step == 0 ? cat : twice(cat)}, {}};
  };
  EXPECT_THROW(pipeline->Generate(options), Error);
}

// A pipeline that was opened reads each part when its turn comes, and draws the same pictures.
TEST_F(StableDiffusionTest, PartsAreReadOnDemand) {
  GenerateOptions several = Cat(), inpaint = Cat();
  several.prompts = {"the cat", "low", "red"}, several.seeds = {7, 8, 9};
  several.batch_size = 2;  // two shapes of the U-Net
  inpaint.init_image = ReadPicture(kFixtures / "init.png");
  inpaint.mask_image = ReadPicture(kFixtures / "mask.png");
  inpaint.strength = 0.6;
  for (Backend backend : {Backend::kEager, Backend::kJit}) {
    SCOPED_TRACE(NameOf(backend));
    auto whole = TextToImagePipeline::Load(Model(), backend);
    std::vector<std::string> read;
    auto opened = TextToImagePipeline::Open(Model(), backend, {}, {},
                                            [&](Layer& part) { read.push_back(part.path()); });
    EXPECT_THAT(read, ElementsAre());
    EXPECT_THROW(opened->model().SaveParameters(), ValueError);
    EXPECT_EQ(Difference(whole->Generate(several), opened->Generate(several)), 0);
    const bool released = backend == Backend::kJit && !jit::CheckRequested();
    std::vector<std::string> expected{"text_encoder", "unet", "vae"};
    if (released) expected.insert(expected.begin() + 1, "unet");
    EXPECT_EQ(read, expected);
    EXPECT_THROW(opened->model().unet().NamedParameters(), ValueError);
    EXPECT_NO_THROW(opened->model().vae()->NamedParameters());
    read.clear();
    EXPECT_EQ(Difference(whole->Generate(inpaint), opened->Generate(inpaint)), 0);
    EXPECT_THAT(read, ElementsAre("text_encoder", "vae", "unet", "vae"));
  }
  // What is done to a part when it is read counts.
  auto changed = TextToImagePipeline::Open(Model(), Backend::kJit, {}, {}, [&](Layer& part) {
    if (part.path() == "unet") part.FindParameter("conv_out.bias")->Write().values()[0] += 0.5f;
  });
  auto plain = TextToImagePipeline::Open(Model(), Backend::kJit);
  EXPECT_GT(Difference(plain->Generate(Cat()), changed->Generate(Cat())), 1e-3);
}

TEST_F(StableDiffusionTest, OpeningFindsDamagedWeightsBeforeAnyAreRead) {
  auto error = [&] {
    return MessageOf<FileError>([&] { TextToImagePipeline::Open(Model(), Backend::kJit); });
  };
  const fs::path vae = Model() / "vae/diffusion_pytorch_model.safetensors";
  const auto size = fs::file_size(vae);
  TensorFile file = ReadSafetensors(vae);
  fs::resize_file(vae, size - 4);
  EXPECT_THAT(error(), HasSubstr(vae.string()));
  auto bias = file.tensors.extract("decoder.conv_in.bias");
  file.tensors["decoder.conv_in.bais"] = Tensor::Zeros({3});
  file.tensors.at("decoder.conv_out.bias") = Tensor::Zeros({5});
  file.tensors.at("quant_conv.bias") =
      Tensor::Zeros(file.tensors.at("quant_conv.bias").shape(), DType::kI64);
  WriteSafetensors(vae, file);
  EXPECT_THAT(error(), AllOf(HasSubstr(vae.string()), HasSubstr("decoder.conv_in.bias"),
                             HasSubstr("decoder.conv_in.bais"), HasSubstr("[5]"),
                             HasSubstr("quant_conv.bias: the tensor is i64")));
}

TEST_F(StableDiffusionTest, HooksSeeAndChangeTheUNetAndTheSample) {
  auto pipeline = TextToImagePipeline::Load(Model(), Backend::kJit);
  GenerateOptions options = Cat();
  options.sampler = "ddim";
  const Tensor plain = pipeline->Generate(options);
  options.hooks.denoise = [&](const PictureBatch& batch, ComputationGraph& graph, Value sample,
                              Value timestep, Value context) {
    EXPECT_EQ(batch.rows(), 2);
    Value factor = graph.Input("factor", Shape{1});
    Value out = pipeline->model().Denoise(sample, timestep, context);
    return std::vector{out * factor, Sum(context * context, {0, 1, 2})};
  };
  EXPECT_THAT(MessageOf<ValueError>([&] { pipeline->Generate(options); }), HasSubstr("key"));
  options.hooks.key = "scaled";
  float factor = 1;
  options.hooks.inputs = [&](const PictureBatch&, int64_t) {
    return std::vector{Tensor::Full({1}, factor)};
  };
  int calls = 0;
  options.hooks.outputs = [&](const PictureBatch& batch, int64_t step,
                              std::span<const Tensor> outputs) {
    EXPECT_EQ(step, calls++);
    EXPECT_EQ(batch.size(), 1);
    ASSERT_EQ(outputs.size(), 1u);
    EXPECT_NE(outputs[0].Item(), 0);
  };
  EXPECT_LT(Difference(plain, pipeline->Generate(options)), 1e-5);
  EXPECT_EQ(calls, 4);
  factor = 0.5, calls = 0;
  EXPECT_GT(Difference(plain, pipeline->Generate(options)), 1e-3);
  options.hooks = {};
  options.hooks.after_step = [](const PictureBatch&, int64_t, Tensor x) {
    return Tensor::Zeros(x.shape());
  };
  const Tensor black = pipeline->Generate(options);
  EXPECT_EQ(Difference(pipeline->Decode(Tensor::Zeros({1, 4, 8, 8})), black), 0);
}

}  // namespace
}  // namespace calotype
