// Training and sampling: batches, runs that stop and continue, model folders, pictures from
// prompts.
#include "core/json.h"
#include "pipelines/batch_source.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <tuple>

#include "core/parallel.h"
#include "io/checkpoint.h"
#include "io/file.h"
#include "io/png.h"
#include "io/safetensors.h"
#include "io/shapes.h"
#include "pipelines/model_folder.h"
#include "pipelines/text_to_image.h"
#include "pipelines/trainer.h"
#include "pipelines/training_setup.h"
#include "tests/expect_error.h"
#include "tests/run_program.h"
#include "tests/trainer_fixture.h"

namespace calotype {
namespace {

namespace fs = std::filesystem;
using test::ReadText;
using test::TempFolder;
using test::TrainerTest;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

bool SameBits(const Tensor& a, const Tensor& b) {
  return a.type() == b.type() && std::memcmp(a.raw(), b.raw(), static_cast<size_t>(a.bytes())) == 0;
}

double LargestDifference(const Tensor& a, const Tensor& b) {
  double largest = 0;
  for (int64_t i = 0; i < a.elements(); ++i)
    largest = std::max<double>(largest, std::abs(a.data()[i] - b.data()[i]));
  return largest;
}

// --- Batches.

Tensor NumberedTokens(const Dataset& data) {
  Tensor tokens({data.size() + 1, 1}, DType::kI64);
  for (int64_t i = 0; i <= data.size(); ++i) tokens.data<int64_t>()[i] = i;
  return tokens;
}

TEST(BatchSourceTest, EveryCaptionComesOnceARound) {
  ShapesDataset data;
  BatchSource source(data, NumberedTokens(data), {.batch_size = 24, .seed = 3});
  std::vector<int64_t> first, second;
  for (int i = 0; i < 8; ++i) {
    Batch batch = source.Next();
    for (int64_t token : batch.text.values<int64_t>()) (i < 4 ? first : second).push_back(token);
  }
  EXPECT_EQ(std::set<int64_t>(first.begin(), first.end()).size(), 96u);
  EXPECT_EQ(std::set<int64_t>(second.begin(), second.end()).size(), 96u);
  EXPECT_NE(first, second);
}

TEST(BatchSourceTest, HeldOutCaptionsAreNeverTrainedOn) {
  ShapesDataset data;
  BatchSource source(data, NumberedTokens(data),
                     {.batch_size = 50, .validation_fraction = 0.1, .seed = 3});
  EXPECT_EQ(source.validation_captions(), 10);
  std::set<int64_t> trained, held_out;
  for (int i = 0; i < 10; ++i) {
    Batch batch = source.Next();
    for (int64_t token : batch.text.values<int64_t>()) trained.insert(token);
  }
  std::vector<int64_t> timesteps;
  for (const Batch& batch : source.ValidationBatches()) {
    for (int64_t token : batch.text.values<int64_t>()) held_out.insert(token);
    for (int64_t t : batch.timesteps.values<int64_t>()) timesteps.push_back(t);
  }
  EXPECT_EQ(trained.size(), 86u);
  EXPECT_EQ(held_out.size(), 10u);
  for (int64_t caption : held_out) EXPECT_EQ(trained.count(caption), 0u);
  // Ten timesteps a caption, one in each tenth of the range.
  std::vector<int> tenths(10);
  for (int64_t t : timesteps) ++tenths[static_cast<size_t>(t / 100)];
  EXPECT_EQ(tenths, std::vector<int>(10, 10));
}

TEST(BatchSourceTest, ContinuesFromItsState) {
  ShapesDataset data;
  BatchSource::Options options{.batch_size = 7, .caption_dropout = 0.5, .seed = 9};
  BatchSource whole(data, NumberedTokens(data), options), rest(data, NumberedTokens(data), options);
  for (int i = 0; i < 20; ++i) whole.Next();
  rest.SetState(whole.State());
  for (int i = 0; i < 3; ++i) {
    Batch a = whole.Next(), b = rest.Next();
    EXPECT_TRUE(SameBits(a.images, b.images) && SameBits(a.noise, b.noise) &&
                SameBits(a.timesteps, b.timesteps) && SameBits(a.text, b.text));
  }
  std::map<std::string, uint64_t> state = whole.State();
  state.erase("noise");
  EXPECT_THAT(MessageOf<FileError>([&] { rest.SetState(state); }), HasSubstr("noise"));
}

TEST(BatchSourceTest, DropsTheRequestedShareOfCaptions) {
  ShapesDataset data;
  BatchSource source(data, NumberedTokens(data),
                     {.batch_size = 100, .caption_dropout = 0.1, .seed = 1});
  int dropped = 0;
  for (int i = 0; i < 100; ++i) {
    Batch batch = source.Next();
    for (int64_t token : batch.text.values<int64_t>()) dropped += token == 96;
  }
  EXPECT_NEAR(dropped, 1000, 4 * std::sqrt(10000 * 0.1 * 0.9));
}

// Two pictures, the second with three captions.
class ThreeCaptions : public Dataset {
 public:
  int64_t size() const override { return 2; }
  int side() const override { return 1; }
  std::string caption(int64_t index) const override { return captions(index)[0]; }
  std::vector<std::string> captions(int64_t index) const override {
    return index == 0 ? std::vector<std::string>{"a"} : std::vector<std::string>{"b", "c", "d"};
  }
  Tensor image(int64_t index, Random&) const override {
    return Tensor::Full({3, 1, 1}, static_cast<float>(index));
  }
};

TEST(BatchSourceTest, EachCaptionOfAPictureIsDrawnAsOften) {
  ThreeCaptions data;
  Tensor rows = Tensor::From({5, 1}, std::vector<int64_t>{0, 1, 2, 3, 4});
  BatchSource source(data, rows, {.batch_size = 2});
  std::map<int64_t, int> count;
  for (int i = 0; i < 3000; ++i) {
    Batch batch = source.Next();
    for (int64_t b = 0; b < 2; ++b) {
      int64_t row = batch.text.data<int64_t>()[b];
      EXPECT_EQ(batch.images.data()[3 * b], row > 0 ? 1 : 0);
      ++count[row];
    }
  }
  EXPECT_EQ(count[0], 3000);
  for (int64_t row : {1, 2, 3}) EXPECT_NEAR(count[row], 1000, 5 * std::sqrt(667)) << row;
}

TEST(BatchSourceTest, OptionsOutOfRangeAreErrors) {
  ShapesDataset data;
  EXPECT_THROW(BatchSource(data, NumberedTokens(data), {.batch_size = 0}), ValueError);
  EXPECT_THROW(BatchSource(data, NumberedTokens(data), {.caption_dropout = 1.5}), ValueError);
  EXPECT_THROW(BatchSource(data, NumberedTokens(data), {.validation_fraction = 1}), ValueError);
  EXPECT_THROW(BatchSource(data, NumberedTokens(data), {.validation_fraction = 0.999}), ValueError);
}

// --- Options.

TEST(TrainOptionsTest, RoundTripThroughJson) {
  TrainOptions options;
  options.learning_rate = 0.1 + 0.2;
  options.data = "a \"folder\"";
  options.seed = std::numeric_limits<uint64_t>::max();
  EXPECT_EQ(ToJson(ParseTrainOptions(ToJson(options), "x")), ToJson(options));
  EXPECT_THAT(MessageOf<FileError>([] { ParseTrainOptions("{}", "run/train.json"); }),
              HasSubstr("run/train.json"));
  nlohmann::json more = ParseJson(ToJson(options));
  more["colour"] = 1;
  EXPECT_THAT(MessageOf<FileError>([&] { ParseTrainOptions(JsonText(more), "x"); }),
              HasSubstr("colour"));
}

TEST(TrainOptionsTest, AContinuedRunKeepsWhatDecidesIt) {
  TrainOptions stored, given;
  stored.learning_rate = 0.5;
  given.checkpointing_steps = 7;
  given.backend = "jit";
  TrainOptions merged = MergeForResume(stored, given, {"checkpointing_steps"});
  EXPECT_EQ(merged.learning_rate, 0.5);
  EXPECT_EQ(merged.checkpointing_steps, 7);
  EXPECT_EQ(merged.backend, "eager");
  EXPECT_THAT(MessageOf<ValueError>([&] { MergeForResume(stored, given, {"learning_rate"}); }),
              HasSubstr("learning_rate"));
}

TEST(TrainOptionsTest, BadValuesAreNamed) {
  auto message = [](auto change) {
    TrainOptions options;
    change(options);
    return MessageOf<ValueError>([&] { Validate(options); });
  };
  EXPECT_THAT(message([](TrainOptions& o) { o.optimizer = "lion"; }), HasSubstr("lion"));
  EXPECT_THAT(message([](TrainOptions& o) { o.learning_rate = NAN; }), HasSubstr("learning_rate"));
  EXPECT_THAT(message([](TrainOptions& o) { o.train_batch_size = 0; }),
              HasSubstr("train_batch_size"));
  EXPECT_THAT(message([](TrainOptions& o) { o.ema_decay = 1.1; }), HasSubstr("ema_decay"));
}

// --- Models and pictures.

class PipelineTest : public TrainerTest {
 protected:
  std::unique_ptr<DiffusionModel> Model() {
    auto data = OpenDataset(options_, {});
    return MakeModel(options_, *data);
  }
  GenerateOptions Prompts(std::vector<std::string> prompts) const {
    GenerateOptions options;
    for (size_t i = 0; i < prompts.size(); ++i) options.seeds.push_back(i);
    options.prompts = std::move(prompts);
    options.steps = 4;
    return options;
  }
};

TEST_F(PipelineTest, AModelFolderHoldsTheModel) {
  auto model = Model();
  model->Save(Folder("model"));
  auto loaded = DiffusionModel::Load(Folder("model"));
  auto a = model->SaveParameters(), b = loaded->SaveParameters();
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [name, tensor] : a) EXPECT_TRUE(SameBits(tensor, b.at(name))) << name;
  EXPECT_EQ(loaded->unet().config(), model->unet().config());
  EXPECT_EQ(loaded->caption_encoder()->config(), model->caption_encoder()->config());
  EXPECT_EQ(loaded->scheduler(), Resolved(model->scheduler()));
  // Saving what was loaded gives the same bytes.
  loaded->Save(Folder("again"));
  for (const char* file : {"unet/config.json", "unet/diffusion_pytorch_model.safetensors",
                           "caption_encoder/config.json", "caption_encoder/model.safetensors",
                           "scheduler/scheduler_config.json", "model_index.json"}) {
    EXPECT_EQ(ReadText(Folder("model") / file), ReadText(Folder("again") / file)) << file;
  }
}

// U-Nets that need more than a sample, a timestep and a context.
TEST_F(PipelineTest, ModelsWithFurtherInputsAreRefusedAtOnce) {
  const std::string tiny = test::kTinyUNet;
  for (auto [field, value, input] : {std::tuple{"time_cond_proj_dim", "5", "timestep_cond"},
                                     {"num_class_embeds", "3", "class_labels"},
                                     {"class_embed_type", "\"timestep\"", "class_labels"}}) {
    const std::string with =
        fmt::format("{}, \"{}\": {}}}", tiny.substr(0, tiny.rfind('}')), field, value);
    const auto said = AllOf(HasSubstr(field), HasSubstr(input), HasSubstr("`calotype unet`"));
    // A new model.
    TrainOptions fresh = options_;
    fresh.unet = folder_ / "more.json";
    folder_.Write("more.json", with);
    EXPECT_THAT(MessageOf<UnsupportedFileError>([&] { MakeModel(fresh, *OpenDataset(fresh, {})); }),
                AllOf(said, HasSubstr("more.json: ")));
    // A given one: it can be read and saved, neither sampled nor trained.
    CaptionEncoderConfig encoder;
    encoder.vocabulary = {"<pad>", "<unk>", "a"};
    encoder.hidden_size = 8;
    DiffusionModel model(UNet2DConditionConfig::FromJson(with), encoder, {});
    model.Initialize(1);
    EXPECT_THAT(
        MessageOf<UnsupportedFileError>([&] { TextToImagePipeline(model, Backend::kEager); }),
        said);
    fs::remove_all(Folder("more"));
    model.Save(Folder("more"));
    const auto in_folder = AllOf(said, HasSubstr("more/unet/config.json: "));
    EXPECT_THAT(MessageOf<UnsupportedFileError>(
                    [&] { TextToImagePipeline::Open(Folder("more"), Backend::kEager); }),
                in_folder);
    TrainOptions given = options_;
    given.unet = TrainOptions().unet;
    given.model = Folder("more");
    auto data = OpenDataset(given, {});
    EXPECT_THAT(MessageOf<UnsupportedFileError>(
                    [&] { BeginTraining(given, {}, Folder("run"), false, {}, {}); }),
                in_folder);
    given.class_data = Folder("class");
    given.class_prompt = "a";
    given.num_class_images = 2;
    EXPECT_THAT(MessageOf<UnsupportedFileError>(
                    [&] { BeginTraining(given, {}, Folder("run"), false, {}, {}); }),
                in_folder);
    auto loaded = DiffusionModel::Load(Folder("more"));
    EXPECT_THAT(
        MessageOf<UnsupportedFileError>([&] { Trainer(*loaded, *data, options_, Folder("run")); }),
        in_folder);
    EXPECT_FALSE(fs::exists(Folder("run")));
    EXPECT_FALSE(fs::exists(Folder("class")));
  }
}

// With encoder_hid_dim the U-Net projects a context of that width to its own.
TEST_F(PipelineTest, TheContextMayHaveAWidthOfItsOwn) {
  const std::string tiny = test::kTinyUNet;
  folder_.Write("unet.json", tiny.substr(0, tiny.rfind('}')) + R"(, "encoder_hid_dim": 12})");
  options_.max_train_steps = 2;
  options_.checkpointing_steps = 0;
  Train("run");
  auto pipeline = TextToImagePipeline::Load(Folder("run"), Backend::kEager);
  EXPECT_EQ(pipeline->model().context_width(), 12);
  EXPECT_EQ(pipeline->model().unet().config().cross_attention_dim[0], 8);
  const GenerateOptions options = Prompts({"a small red circle"});
  const Tensor picture = pipeline->Generate(options);
  EXPECT_LE(
      LargestDifference(picture,
                        TextToImagePipeline::Load(Folder("run"), Backend::kJit)->Generate(options)),
      1e-4);
  const auto unet = pipeline->model().unet().config();
  CaptionEncoderConfig encoder = pipeline->model().caption_encoder()->config();
  encoder.hidden_size = 8;  // that of the cross-attention
  EXPECT_THAT(MessageOf<ValueError>([&] { DiffusionModel(unet, encoder, {}); }),
              HasSubstr("encoder_hid_dim is 12, the caption encoder's hidden_size 8"));
}

TEST_F(PipelineTest, WeightsThatAreNotFiniteAreNamed) {
  auto model = Model();
  ParameterPtr weights = model->unet().FindParameter("conv_in.weight");
  weights->Write().data()[3] = std::numeric_limits<float>::infinity();
  const auto said = AllOf(HasSubstr("not finite, as the weights "), HasSubstr("conv_in.weight"));
  const GenerateOptions options = Prompts({"a small red circle"});
  EXPECT_THAT(MessageOf<NumericError>(
                  [&] { TextToImagePipeline(*model, Backend::kEager).Generate(options); }),
              said);
  model->Save(Folder("model"));
  auto opened = TextToImagePipeline::Open(Folder("model"), Backend::kEager);
  for (int i = 0; i < 2; ++i)
    EXPECT_THAT(MessageOf<NumericError>([&] { opened->Generate(options); }), said);
  weights->Write().data()[3] = 0;
  model->Save(Folder("model"));
  EXPECT_EQ(opened->Generate(options).shape(), (Shape{1, 3, 16, 16}));
}

TEST_F(PipelineTest, DamagedModelFoldersAreFileErrors) {
  auto model = Model();
  model->Save(Folder("model"));
  auto load = [&] { DiffusionModel::Load(Folder("model")); };
  auto restore = [&] { model->Save(Folder("model")); };
  fs::path weights = Folder("model") / "unet/diffusion_pytorch_model.safetensors";

  fs::resize_file(weights, fs::file_size(weights) - 1);
  EXPECT_THAT(MessageOf<FileError>(load), HasSubstr("diffusion_pytorch_model.safetensors"));
  fs::remove(weights);
  EXPECT_THAT(MessageOf<FileError>(load), HasSubstr("diffusion_pytorch_model.safetensors"));
  restore();

  TensorFile file = ReadSafetensors(weights);
  file.tensors["conv_in.weight"] = Tensor::Zeros({2, 2});
  file.tensors.erase("conv_out.bias");
  file.tensors["conv_extra.bias"] = Tensor::Zeros({2});
  WriteSafetensors(weights, file);
  std::string text = MessageOf<FileError>(load);
  EXPECT_THAT(text, HasSubstr("conv_in.weight"));
  EXPECT_THAT(text, HasSubstr("conv_out.bias"));
  EXPECT_THAT(text, HasSubstr("conv_extra.bias"));
  restore();

  auto config = ParseJson(ReadText(Folder("model") / "unet/config.json"));
  config["colour"] = "red";
  test::WriteText(Folder("model") / "unet/config.json", JsonText(config));
  EXPECT_THAT(MessageOf<FileError>(load), HasSubstr("colour"));
  restore();

  test::WriteText(Folder("model") / "model_index.json", "{}");
  EXPECT_THAT(MessageOf<FileError>(load), HasSubstr("model_index.json"));
}

TEST_F(PipelineTest, APictureDependsOnItsPromptAndSeedOnly) {
  auto model = Model();
  TextToImagePipeline pipeline(*model, Backend::kEager);
  GenerateOptions options = Prompts(
      {"a small red circle on a black background", "a large blue cross on a gray background"});
  Tensor both = pipeline.Generate(options), again = pipeline.Generate(options);
  EXPECT_TRUE(SameBits(both, again));
  options.batch_size = 1;
  Tensor apart = pipeline.Generate(options);
  EXPECT_LT(LargestDifference(both, apart), 1e-4);
  options.seeds = {5, 5};
  EXPECT_GT(LargestDifference(both, pipeline.Generate(options)), 0.1);
}

TEST_F(PipelineTest, CompiledPicturesAreTheEagerOnes) {
  auto model = Model();
  GenerateOptions options = Prompts({"a small red circle on a black background"});
  options.guidance_scale = 2;
  options.negative_prompt = "white";
  TextToImagePipeline eager(*model, Backend::kEager), jit(*model, Backend::kJit);
  EXPECT_LT(LargestDifference(eager.Generate(options), jit.Generate(options)), 1e-4);
  // Compiled code sees changed weights.
  for (const ParameterPtr& parameter : model->NamedParameters()) {
    for (float& v : parameter->Write().values()) v *= 1.1f;
  }
  EXPECT_LT(LargestDifference(eager.Generate(options), jit.Generate(options)), 1e-4);
}

TEST_F(PipelineTest, WhatThePromptDecidesIsComputedOnceForAllSteps) {
  auto model = Model();
  TextToImagePipeline eager(*model, Backend::kEager), jit(*model, Backend::kJit);
  GenerateOptions options = Prompts({"a small red circle on a black background"});
  options.steps = 25;
  Tensor first = jit.Generate(options);
  EXPECT_EQ(jit.context_runs(), 1);
  options.prompts = {"a large blue cross on a gray background"};
  Tensor second = jit.Generate(options);
  EXPECT_EQ(jit.context_runs(), 2);
  EXPECT_EQ(eager.context_runs(), 0);
  EXPECT_GT(LargestDifference(first, second), 0.01);
  EXPECT_LT(LargestDifference(second, eager.Generate(options)), 1e-3);
}

TEST_F(PipelineTest, GuidanceAndStepsChangeThePicture) {
  auto model = Model();
  TextToImagePipeline pipeline(*model, Backend::kEager);
  GenerateOptions options = Prompts({"a small red circle on a black background"});
  Tensor plain = pipeline.Generate(options);
  options.guidance_scale = 5;
  Tensor guided = pipeline.Generate(options);
  options.negative_prompt = "a large blue cross";
  Tensor negative = pipeline.Generate(options);
  options.sampler = "ddpm";
  Tensor ancestral = pipeline.Generate(options);
  options.width = 12, options.height = 8;
  Tensor small = pipeline.Generate(options);
  EXPECT_GT(LargestDifference(plain, guided), 1e-3);
  EXPECT_GT(LargestDifference(guided, negative), 1e-3);
  EXPECT_GT(LargestDifference(negative, ancestral), 1e-3);
  EXPECT_EQ(small.shape(), (Shape{1, 3, 8, 12}));
}

TEST_F(PipelineTest, UnknownWordsAreNamed) {
  auto model = Model();
  TextToImagePipeline pipeline(*model, Backend::kEager);
  std::vector<std::string> warnings;
  GenerateCallbacks callbacks;
  callbacks.warn = [&](const std::string& text) { warnings.push_back(text); };
  pipeline.Generate(Prompts({"a small mauve circle on a black zebra"}), callbacks);
  ASSERT_EQ(warnings.size(), 2u);
  EXPECT_THAT(warnings[0], HasSubstr("\"mauve\""));
  EXPECT_THAT(warnings[1], HasSubstr("\"zebra\""));
  EXPECT_THAT(MessageOf<ValueError>([&] { pipeline.Generate(Prompts({"mauve zebra"})); }),
              HasSubstr("mauve, zebra"));
  warnings.clear();
  std::string longer = "a small red circle on a black background";
  for (int word = 8; word < 77; ++word) longer += " background";
  pipeline.Generate(Prompts({longer}), callbacks);
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_THAT(warnings[0], HasSubstr("behind the 76 words"));
}

TEST_F(PipelineTest, BadOptionsAndCancelling) {
  auto model = Model();
  TextToImagePipeline pipeline(*model, Backend::kEager);
  auto generate = [&](auto change) {
    GenerateOptions options = Prompts({"red"});
    change(options);
    return MessageOf<ValueError>([&] { pipeline.Generate(options); });
  };
  EXPECT_THAT(generate([](GenerateOptions& o) { o.steps = 0; }), HasSubstr("0"));
  EXPECT_THAT(generate([](GenerateOptions& o) { o.sampler = "heun"; }), HasSubstr("heun"));
  EXPECT_THAT(generate([](GenerateOptions& o) { o.rng = "dice"; }), HasSubstr("dice"));
  EXPECT_THAT(generate([](GenerateOptions& o) { o.eta = 2; }), HasSubstr("eta"));
  EXPECT_THAT(generate([](GenerateOptions& o) { o.negative_prompt = "blue"; }),
              HasSubstr("guidance_scale"));
  EXPECT_THAT(generate([](GenerateOptions& o) { o.seeds.clear(); }), HasSubstr("seeds"));
  EXPECT_THAT(generate([](GenerateOptions& o) { o.guidance_rescale = 2, o.guidance_scale = 2; }),
              HasSubstr("rescale"));
  EXPECT_THAT(generate([](GenerateOptions& o) { o.guidance_rescale = 0.5; }),
              HasSubstr("no effect"));
  int calls = 0;
  GenerateCallbacks callbacks;
  callbacks.cancelled = [&] { return ++calls > 2; };
  EXPECT_THROW(pipeline.Generate(Prompts({"red"}), callbacks), CancelledError);
}

// Every sampler draws, with either kind of random numbers; progress counts the model's calls.
TEST_F(PipelineTest, EverySamplerDraws) {
  auto model = Model();
  TextToImagePipeline pipeline(*model, Backend::kEager);
  for (const char* sampler :
       {"ddim", "ddpm", "pndm", "euler", "euler-karras", "euler-a", "dpm++-2m", "dpm++-2m-karras",
        "dpm++-2m-sde", "dpm++-2m-sde-karras"}) {
    SCOPED_TRACE(sampler);
    GenerateOptions options = Prompts({"red"});
    options.sampler = sampler, options.steps = 4;
    int64_t done = 0, total = 0;
    GenerateCallbacks callbacks;
    callbacks.progress = [&](int64_t d, int64_t t) { done = d, total = t; };
    Tensor philox = pipeline.Generate(options, callbacks);
    EXPECT_EQ(done, total);
    EXPECT_EQ(total, sampler == std::string("pndm") ? 13 : 4);
    options.rng = "torch";
    Tensor torch = pipeline.Generate(options);
    EXPECT_FALSE(SameBits(philox, torch));
    EXPECT_TRUE(SameBits(torch, pipeline.Generate(options)));
  }
}

TEST_F(PipelineTest, ParametersAreWhatOtherProgramsWrite) {
  auto model = Model();
  GenerateOptions options = Prompts({"a, b"});
  options.seeds = {7};
  options.steps = 25;
  options.guidance_scale = 3.5;
  options.negative_prompt = "c";
  EXPECT_THAT(GenerationParameters(*model, options, 0),
              StartsWith("a, b\nNegative prompt: c\nSteps: 25, Sampler: DDIM, CFG scale: 3.5, "
                         "Seed: 7, Size: 16x16, Version: calotype"));
  options.sampler = "dpm++-2m-karras", options.rng = "torch", options.width = 24;
  EXPECT_THAT(
      GenerationParameters(*model, options, 0),
      HasSubstr("Sampler: DPM++ 2M Karras, CFG scale: 3.5, Seed: 7, Size: 24x16, RNG: CPU"));
}

}  // namespace
}  // namespace calotype
