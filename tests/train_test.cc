// Training: runs that stop and continue, what trains, and the recipe, step by step against numbers
// computed here.
#include "pipelines/trainer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <set>

#include "graph/functions.h"
#include "graph/interpreter.h"
#include "io/checkpoint.h"
#include "io/image_folder.h"
#include "io/png.h"
#include "io/safetensors.h"
#include "io/shapes.h"
#include "pipelines/training_graph.h"
#include "pipelines/training_setup.h"
#include "tests/expect_error.h"
#include "tests/random_image.h"
#include "tests/run_program.h"
#include "tests/trainer_fixture.h"

namespace calotype {
namespace {

namespace fs = std::filesystem;
using test::Losses;
using test::ReadText;
using test::TrainerTest;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

TEST_F(TrainerTest, TheLossFalls) {
  options_.max_train_steps = 100;
  options_.checkpointing_steps = options_.validation_steps = 0;
  std::vector<double> losses;
  TrainResult result = Train("run", false,
                             {.progress = [&](const TrainProgress& p) { losses.push_back(p.loss); },
                              .message = {},
                              .cancelled = {}});
  ASSERT_EQ(losses.size(), 100u);
  double early = 0, late = 0;
  for (int i = 0; i < 10; ++i)
    early += losses[static_cast<size_t>(i)] / 10, late += losses[static_cast<size_t>(90 + i)] / 10;
  EXPECT_LT(late, 0.85 * early);
  EXPECT_EQ(result.steps, 100);
  ASSERT_TRUE(result.validation.has_value());
  EXPECT_LT(result.validation->loss, early);
}

// A model whose U-Net outputs 0: its v is 0, so it implies the noise sqrt(1 - alpha_bar) x_t.
TEST_F(TrainerTest, TheNoiseLossOfAVelocityModelIsThatOfItsImpliedNoise) {
  auto data = OpenDataset(options_, {});
  auto model = MakeModel(options_, *data);
  for (const char* name : {"unet.conv_out.weight", "unet.conv_out.bias"}) {
    for (float& v : model->FindParameter(name)->Write().values()) v = 0;
  }
  ValidationLosses losses = Trainer(*model, *data, options_, Folder("run")).Validate();
  BatchSource batches(*data, Tensor::Zeros({97, 8}, DType::kI64),
                      {.batch_size = 8, .validation_fraction = 0.05, .seed = options_.seed});
  NoiseSchedule schedule(model->scheduler());
  double loss = 0, noise_loss = 0, count = 0;
  for (const Batch& batch : batches.ValidationBatches()) {
    int64_t pixels = batch.images.elements() / batch.images.shape()[0];
    for (int64_t i = 0; i < batch.images.elements(); ++i) {
      double a = schedule.AlphaBar(batch.timesteps.data<int64_t>()[i / pixels]),
             x = batch.images.data()[i], n = batch.noise.data()[i];
      double noisy = std::sqrt(a) * x + std::sqrt(1 - a) * n,
             v = std::sqrt(a) * n - std::sqrt(1 - a) * x;
      loss += v * v;
      noise_loss += std::pow(std::sqrt(1 - a) * noisy - n, 2);
      ++count;
    }
  }
  EXPECT_NEAR(losses.loss, loss / count, 1e-5);
  ASSERT_TRUE(losses.noise_loss.has_value());
  EXPECT_NEAR(*losses.noise_loss, noise_loss / count, 1e-5);
}

TEST_F(TrainerTest, CompiledTrainingFollowsEagerTraining) {
  options_.max_train_steps = 6;
  options_.validation_fraction = 0;
  std::vector<double> eager, jit;
  Train("eager", false,
        {.progress = [&](const TrainProgress& p) { eager.push_back(p.loss); },
         .message = {},
         .cancelled = {}});
  options_.backend = "jit";
  Train("jit", false,
        {.progress = [&](const TrainProgress& p) { jit.push_back(p.loss); },
         .message = {},
         .cancelled = {}});
  ASSERT_EQ(eager.size(), jit.size());
  for (size_t i = 0; i < eager.size(); ++i)
    EXPECT_NEAR(jit[i], eager[i], 1e-4 * eager[i]) << "step " << i + 1;
}

TEST_F(TrainerTest, ACancelledRunContinuesBitForBit) {
  Train("whole");
  int64_t last = 0;
  TrainCallbacks cancel{.progress = [&](const TrainProgress& p) { last = p.step; },
                        .message = {},
                        .cancelled = [&] { return last == 7; }};
  EXPECT_THAT(MessageOf<CancelledError>([&] { Train("parts", false, cancel); }),
              HasSubstr("step 7 of 12"));
  Train("parts", true);
  EXPECT_EQ(Weights("parts"), Weights("whole"));
  EXPECT_EQ(Metrics("parts"), Metrics("whole"));
  // From an older checkpoint too, as after a kill: the lines behind it are written again.
  fs::remove(CheckpointPath(Folder("parts") / "checkpoints", 12));
  fs::remove(CheckpointPath(Folder("parts") / "checkpoints", 10));
  EXPECT_THAT(MessageOf<FileError>([&] { Train("parts", true); }),
              HasSubstr("no checkpoint to resume from, although the run was at step 12"));
}

TEST_F(TrainerTest, ARunKilledBeforeItsFirstCheckpointBeginsAgain) {
  Train("whole");
  TrainCallbacks killed{.progress =
                            [](const TrainProgress& p) {
                              if (p.step == 3) throw std::runtime_error("killed");
                            },
                        .message = {},
                        .cancelled = {}};
  EXPECT_THROW(Train("parts", false, killed), std::runtime_error);
  EXPECT_TRUE(ListCheckpoints(Folder("parts") / "checkpoints").empty());
  EXPECT_THAT(MessageOf<ValueError>([&] { Train("parts"); }), HasSubstr("--resume"));
  std::string messages;
  Train("parts", true,
        {.progress = {},
         .message = [&](const std::string& text) { messages += text; },
         .cancelled = {}});
  EXPECT_THAT(messages, HasSubstr("stopped before its first checkpoint"));
  EXPECT_EQ(Weights("parts"), Weights("whole"));
  EXPECT_EQ(Metrics("parts"), Metrics("whole"));
}

// Its checkpoints were lost. Whether there was one, the run's own options say, not those given now.
TEST_F(TrainerTest, ARunWithoutItsCheckpointsDoesNotBeginAgain) {
  auto lose = [&] {
    const fs::path checkpoints = Folder("run") / "checkpoints";
    for (int64_t step : ListCheckpoints(checkpoints)) fs::remove(CheckpointPath(checkpoints, step));
  };
  auto error = [&] { return MessageOf<FileError>([&] { Train("run", true); }); };
  auto stop_at = [](int64_t step) {
    return TrainCallbacks{.progress =
                              [step](const TrainProgress& p) {
                                if (p.step == step) throw std::runtime_error("killed");
                              },
                          .message = {},
                          .cancelled = {}};
  };
  // Finished, with one checkpoint at the end.
  options_.checkpointing_steps = 0;
  Train("run");
  lose();
  const std::string weights = Weights("run"), metrics = Metrics("run");
  EXPECT_THAT(error(), HasSubstr("no checkpoint to resume from, although the run was at step 12 of "
                                 "12"));
  fs::resize_file(Folder("run") / "metrics.jsonl", 0);
  EXPECT_THAT(error(),
              AllOf(HasSubstr("no checkpoint to resume from, although the run has written"),
                    HasSubstr("run/model_index.json")));
  EXPECT_EQ(Weights("run"), weights);

  // Killed behind a checkpoint, and given a larger distance of checkpoints.
  fs::remove_all(Folder("run"));
  options_.checkpointing_steps = 2;
  EXPECT_THROW(Train("run", false, stop_at(5)), std::runtime_error);
  lose();
  fs::remove(Folder("run") / "model_index.json");
  options_.checkpointing_steps = 100;
  EXPECT_THAT(error(), HasSubstr("although the run was at step 5 of 12"));

  // Killed before its first checkpoint, and given a smaller one.
  fs::remove_all(Folder("run"));
  EXPECT_THROW(Train("run", false, stop_at(5)), std::runtime_error);
  options_.checkpointing_steps = 2;
  Train("run", true);
  EXPECT_EQ(Weights("run"), weights);
}

TEST_F(TrainerTest, ARunThatLosesItsLastStepsContinuesBitForBit) {
  Train("whole");
  Train("parts");
  fs::remove(CheckpointPath(Folder("parts") / "checkpoints", 12));  // 10 stays
  Train("parts", true);
  EXPECT_EQ(Weights("parts"), Weights("whole"));
  EXPECT_EQ(Metrics("parts"), Metrics("whole"));
}

TEST_F(TrainerTest, ADamagedCheckpointFallsBackToTheOneBefore) {
  Train("whole");
  Train("parts");
  fs::path newest = CheckpointPath(Folder("parts") / "checkpoints", 12);
  std::string bytes = ReadText(newest);
  bytes[bytes.size() / 2] ^= 1;
  test::WriteText(newest, bytes);
  std::string warnings;
  Train("parts", true,
        {.progress = {},
         .message = [&](const std::string& text) { warnings += text + "\n"; },
         .cancelled = {}});
  EXPECT_THAT(warnings, HasSubstr("checkpoint-12"));
  EXPECT_EQ(Weights("parts"), Weights("whole"));
}

TEST_F(TrainerTest, ContinuingWithOtherOptionsIsAnError) {
  Train("run");
  options_.learning_rate = 1;
  EXPECT_THAT(MessageOf<ValueError>([&] { Train("run", true); }), HasSubstr("learning_rate"));
}

TEST_F(TrainerTest, AFolderWithARunIsNotOverwritten) {
  Train("run");
  EXPECT_THAT(MessageOf<ValueError>([&] { Train("run"); }), HasSubstr("--resume"));
}

TEST_F(TrainerTest, AFolderWithAModelIsNotOverwritten) {
  options_.max_train_steps = 2;
  Train("model");
  fs::remove(Folder("model") / "train.json");  // a model, not a run
  fs::remove_all(Folder("model") / "checkpoints");
  std::string before = Weights("model");
  options_.seed = 1;
  EXPECT_THAT(MessageOf<ValueError>([&] { Train("model"); }), HasSubstr("holds a model"));
  EXPECT_EQ(Weights("model"), before);
  EXPECT_FALSE(fs::exists(Folder("model") / "checkpoints"));
}

// One file, replaced at once, says that a folder holds a run, which command continues it and with
// which options: a kill leaves a whole run or none.
TEST_F(TrainerTest, TrainJsonSaysWhoseRunItIs) {
  auto data = OpenDataset(options_, {});
  auto model = MakeModel(options_, *data);
  TrainTarget target{
      .save = [](const fs::path&) {}, .kind = kTrainLora, .own_options = "{\"x\": 3}"};
  Trainer(*model, *data, options_, Folder("run"), false, {}, target);
  const fs::path path = Folder("run") / "train.json";
  const std::string text = test::ReadText(path);
  EXPECT_STREQ(ParseTrainingKind(text, path).command, "train lora");
  EXPECT_EQ(ParseJson(text)["lora"]["x"], 3);
  EXPECT_EQ(ToJson(ParseTrainOptions(text, path)), ToJson(options_));
  EXPECT_STREQ(ParseTrainingKind(ToJson(options_), path).command, "train");
  EXPECT_STREQ(ParseTrainingKind(ToJson(options_, kTrainCustomDiffusion, "{}"), path).command,
               "train custom-diffusion");
  EXPECT_THAT(MessageOf<FileError>(
                  [&] { ParseTrainingKind(R"({"lora": {}, "custom_diffusion": {}})", path); }),
              HasSubstr("train.json: has both `lora` and `custom_diffusion`"));
  EXPECT_THAT(MessageOf<FileError>([&] { ParseTrainingKind("{", path); }),
              HasSubstr("train.json: not a training options file"));
}

// Writes a folder of pictures with these captions.
void WritePictures(const fs::path& folder, const std::vector<std::string>& captions) {
  std::string lines;
  for (const std::string& caption : captions)
    lines += ImageFolderLine(fmt::format("{}.png", &caption - captions.data()), caption);
  test::WriteText(folder / "metadata.jsonl", lines);
  Random random(1);
  for (size_t i = 0; i < captions.size(); ++i)
    WritePng(folder / fmt::format("{}.png", i), test::RandomImage(16, 16, random));
}

TEST_F(TrainerTest, CaptionsThatTheModelDoesNotKnowAreOneWarning) {
  options_.max_train_steps = 2;
  Train("base");
  WritePictures(folder_ / "data", {"a mauve circle", "a small zebra in a large tree", "a circle",
                                   "a pink and lilac square"});
  options_.model = Folder("base");
  options_.unet = TrainOptions().unet;
  options_.validation_fraction = 0;
  auto warnings = [&](const std::string& run) {
    std::vector<std::string> texts;
    TrainCallbacks callbacks{.progress = {},
                             .message =
                                 [&](const std::string& text) {
                                   if (text.starts_with("warning")) texts.push_back(text);
                                 },
                             .cancelled = {}};
    auto data = OpenDataset(options_, {});
    Trainer(*MakeModel(options_, *data), *data, options_, Folder(run), false, callbacks);
    return texts;
  };
  options_.data = folder_ / "data";
  std::vector<std::string> own = warnings("own");
  ASSERT_EQ(own.size(), 1u);  // mauve, zebra, in, tree, pink, and, lilac
  EXPECT_THAT(own[0], AllOf(HasSubstr("7 remarks on the captions of " + options_.data),
                            HasSubstr("\"mauve\""), HasSubstr("; ..."), Not(HasSubstr("lilac"))));
  options_.class_data = options_.data;
  options_.data = "shapes";
  std::vector<std::string> of_class = warnings("class");
  ASSERT_EQ(of_class.size(), 1u);
  EXPECT_EQ(of_class[0], own[0]);
}

TEST_F(TrainerTest, ANewModelKnowsTheWordsOfTheClassData) {
  WritePictures(folder_ / "class", {"a mauve zebra in a very large tree beside a pond"});
  auto data = OpenDataset(options_, {});
  options_.class_data = folder_ / "class";
  auto model = MakeModel(options_, *data);
  EXPECT_EQ(model->caption_tokens(), 77);  // a row as long as CLIP's
  std::vector<std::string> warnings;
  model->Tokens(std::vector<std::string>{"a mauve zebra", "a small red circle"},
                [&](const std::string& text) { warnings.push_back(text); });
  EXPECT_EQ(warnings, std::vector<std::string>{});
}

TEST_F(TrainerTest, TwoRunsInOneFolderAreAnError) {
  auto data = OpenDataset(options_, {});
  auto model = MakeModel(options_, *data);
  Trainer first(*model, *data, options_, Folder("run"));
  EXPECT_THAT(MessageOf<FileError>([&] { Train("run", true); }), HasSubstr("another process"));
}

TEST_F(TrainerTest, SamplePicturesCarryTheirPrompts) {
  options_.sample_steps = 6;
  options_.max_train_steps = 7;
  options_.validation_prompt = "a large blue cross on a gray background";
  Train("run");
  for (const char* name : {"step-00000006.png", "step-00000007.png"}) {
    std::vector<PngText> texts;
    ReadPng(Folder("run") / "samples" / name, &texts);
    ASSERT_EQ(texts.size(), 1u);
    EXPECT_THAT(texts[0].text, HasSubstr("a large blue cross on a gray background\nSteps: 25"));
  }
}

TEST_F(TrainerTest, APromptOfUnknownWordsStopsTheRunBeforeItBegins) {
  options_.sample_steps = 6;
  options_.validation_prompt = "mauve zebra";
  EXPECT_THAT(MessageOf<ValueError>([&] { Train("run"); }), HasSubstr("mauve, zebra"));
  EXPECT_FALSE(fs::exists(Folder("run")));
}

TEST_F(TrainerTest, NumbersThatAreNotFiniteStopTheRunAndKeepTheCheckpoint) {
  options_.optimizer = "sgd";
  options_.lr_scheduler = "constant";
  options_.lr_warmup_steps = 0;
  options_.learning_rate = 1000;
  options_.max_grad_norm = 0;
  options_.max_train_steps = 100;
  options_.checkpointing_steps = 1;
  options_.validation_fraction = 0;
  std::string text = MessageOf<NumericError>([&] { Train("run"); });
  EXPECT_THAT(text, HasSubstr("not finite"));
  int64_t last = ListCheckpoints(Folder("run") / "checkpoints").back();
  EXPECT_THAT(text, HasSubstr(fmt::format("the checkpoint of step {} is kept", last)));
  auto checkpoint = ReadLatestCheckpoint(Folder("run") / "checkpoints", {});
  ASSERT_TRUE(checkpoint.has_value());
  for (const auto& [name, tensor] : checkpoint->tensors) {
    for (float v : tensor.values()) ASSERT_TRUE(std::isfinite(v)) << name;
  }
  options_.checkpointing_steps = 0;
  EXPECT_THAT(MessageOf<NumericError>([&] { Train("other"); }), HasSubstr("no checkpoint yet"));
}

TEST_F(TrainerTest, GoesOnWithTheModelOfARun) {
  options_.prediction_type = "epsilon";
  Train("first");
  options_.model = Folder("first");
  options_.prediction_type = TrainOptions().prediction_type;  // the model knows
  EXPECT_THAT(MessageOf<ValueError>([&] { Train("none"); }), HasSubstr("unet has no effect"));
  options_.unet = TrainOptions().unet;
  for (bool TrainOptions::*field :
       {&TrainOptions::cache_latents, &TrainOptions::cache_latents_to_disk}) {
    options_.*field = true;
    options_.data = folder_ / "pictures";
    folder_.Write("pictures/metadata.jsonl", ImageFolderLine("a.png", "a red circle"));
    Random random(1);
    WritePng(folder_ / "pictures/a.png", test::RandomImage(16, 16, random));
    EXPECT_THAT(MessageOf<ValueError>([&] { Train("none"); }),
                AllOf(HasSubstr("cache_latents"), HasSubstr("no effect on " + options_.model),
                      HasSubstr("has no autoencoder")));
    options_.*field = false;
    options_.data = TrainOptions().data;
  }
  EXPECT_FALSE(fs::exists(Folder("none")));
  options_.learning_rate = 0;
  Train("second");
  EXPECT_EQ(Weights("second"), Weights("first"));
  EXPECT_EQ(ReadText(Folder("second") / "scheduler/scheduler_config.json"),
            ReadText(Folder("first") / "scheduler/scheduler_config.json"));
  options_.learning_rate = 1e-3;
  Train("third");
  EXPECT_NE(Weights("third"), Weights("first"));
}

TEST_F(TrainerTest, OnlyTheTargetTrains) {
  auto data = OpenDataset(options_, {});
  auto model = MakeModel(options_, *data);
  std::map<std::string, Tensor> before = model->SaveParameters();
  TrainTarget target;
  for (const ParameterPtr& parameter : model->NamedParameters()) {
    if (parameter->name().rfind("caption_encoder.", 0) == 0) target.parameters.push_back(parameter);
  }
  ASSERT_GT(target.parameters.size(), 0u);
  int saved = 0;
  target.save = [&](const fs::path& folder) {
    ++saved;
    EXPECT_EQ(folder, Folder("run"));
  };
  options_.ema_decay = 0;
  Trainer(*model, *data, options_, Folder("run"), false, {}, target).Run();
  EXPECT_EQ(saved, 3);  // after 5, 10 and all 12 steps
  EXPECT_FALSE(fs::exists(Folder("run") / "unet"));
  for (const auto& [name, value] : model->SaveParameters()) {
    bool same =
        std::memcmp(value.raw(), before.at(name).raw(), static_cast<size_t>(value.bytes())) == 0;
    bool trains = name.rfind("caption_encoder.", 0) == 0;
    EXPECT_TRUE(same || trains) << name;
    EXPECT_FALSE(same && name == "caption_encoder.token_embedding.weight");
  }
  auto checkpoint = ReadLatestCheckpoint(Folder("run") / "checkpoints", {});
  ASSERT_TRUE(checkpoint.has_value());
  EXPECT_EQ(checkpoint->tensors.size(), 3 * target.parameters.size());  // with two moments each
}

// --- The recipe: numbers against formulas written here.

NoiseSchedule StableDiffusionSchedule(const std::string& prediction_type) {
  SchedulerConfig config;
  config.beta_schedule = "scaled_linear";
  config.beta_start = 0.00085;
  config.beta_end = 0.012;
  config.prediction_type = prediction_type;
  return NoiseSchedule(config);
}

// Values of diffusers' train_text_to_image.py for Stable Diffusion's schedule and gamma 5.
TEST(SnrWeightsTest, AreThoseOfDiffusers) {
  const struct {
    int64_t timestep;
    double epsilon, velocity;
  } kCases[] = {{0, .00425372, .00425011},
                {10, .0483057, .0478435},
                {100, .591445, .528884},
                {500, 1, .276332},
                {999, 1, .00466009}};
  Tensor epsilon = SnrWeights(StableDiffusionSchedule("epsilon"), 5),
         velocity = SnrWeights(StableDiffusionSchedule("v_prediction"), 5);
  for (const auto& c : kCases) {
    EXPECT_NEAR(epsilon.data()[c.timestep], c.epsilon, 2e-6 * c.epsilon + 1e-8) << c.timestep;
    EXPECT_NEAR(velocity.data()[c.timestep], c.velocity, 2e-6 * c.velocity + 1e-8) << c.timestep;
  }
  EXPECT_THAT(MessageOf<ValueError>([] { SnrWeights(StableDiffusionSchedule("sample"), 5); }),
              HasSubstr("sample"));
}

// The loss of a model that returns its input, against loops: the noise of the input is another one
// than the target's, and timesteps have weights.
TEST(DenoisingLossTest, WeighsTimestepsAndKeepsTheTargetOfAPerturbedInput) {
  for (const char* type : {"epsilon", "v_prediction"}) {
    NoiseSchedule schedule = StableDiffusionSchedule(type);
    Random random(3);
    Shape shape{4, 3, 2, 2};
    Tensor x = random.NormalTensor(shape), n = random.NormalTensor(shape),
           input_noise = random.NormalTensor(shape);
    Tensor t = Tensor::From({4}, std::vector<int64_t>{10, 100, 500, 999});
    ComputationGraph graph;
    Value images = graph.Input("x", shape), noise = graph.Input("n", shape);
    Value timesteps = graph.Input("t", {DType::kI64, {4}});
    graph.Output(
        "loss", DenoisingLoss(schedule, images, noise, timesteps, [](Value noisy) { return noisy; },
                              {.snr_gamma = 5, .input_noise = graph.Input("p", shape)}));
    std::vector<Tensor> inputs{x, n, t, input_noise};
    double loss = Interpreter(graph).Run(inputs)[0].Item();
    double expected = 0;
    for (int64_t b = 0; b < 4; ++b) {
      double a = schedule.AlphaBar(t.data<int64_t>()[b]), snr = a / (1 - a);
      bool velocity = std::string(type) == "v_prediction";
      double weight = std::min(snr, 5.0) / (velocity ? snr + 1 : snr), sum = 0;
      for (int64_t i = 12 * b; i < 12 * (b + 1); ++i) {
        double y = std::sqrt(a) * x.data()[i] + std::sqrt(1 - a) * input_noise.data()[i];
        double target =
            velocity ? std::sqrt(a) * n.data()[i] - std::sqrt(1 - a) * x.data()[i] : n.data()[i];
        sum += (y - target) * (y - target) / 12;
      }
      expected += weight * sum / 4;
    }
    EXPECT_NEAR(loss, expected, 1e-5 * expected) << type;
  }
}

TEST_F(TrainerTest, SeveralBatchesMakeTheStepOfOneLargeBatch) {
  options_.lr_warmup_steps = 0;
  options_.ema_decay = 0;
  options_.adam_epsilon = 1e-4;  // else tiny gradients would be blown up, and their rounding too
  Train("large");
  options_.train_batch_size = 2;
  options_.gradient_accumulation_steps = 4;
  Train("small");
  for (const char* field : {"loss", "gradient_norm"}) {
    std::vector<double> large = Losses(Metrics("large"), field),
                        small = Losses(Metrics("small"), field);
    ASSERT_EQ(large.size(), 12u);
    ASSERT_EQ(small.size(), 12u);
    for (size_t i = 0; i < 12; ++i) EXPECT_NEAR(small[i], large[i], 1e-5 * large[i]) << field << i;
  }
  auto large = ReadLatestCheckpoint(Folder("large") / "checkpoints", {}),
       small = ReadLatestCheckpoint(Folder("small") / "checkpoints", {});
  for (const auto& [name, value] : large->tensors) {
    if (name.rfind("optimizer.", 0) == 0) continue;
    const Tensor& other = small->tensors.at(name);
    for (int64_t i = 0; i < value.elements(); ++i)
      ASSERT_NEAR(other.data()[i], value.data()[i], 2e-5) << name;
  }
}

TEST_F(TrainerTest, ARunWithAllOfTheRecipeContinuesBitForBit) {
  SwitchOnTheRecipe();
  Train("whole");
  Train("parts");
  fs::remove(CheckpointPath(Folder("parts") / "checkpoints", 12));  // 10 stays
  Train("parts", true);
  EXPECT_EQ(Weights("parts"), Weights("whole"));
  EXPECT_EQ(Metrics("parts"), Metrics("whole"));
}

TEST_F(TrainerTest, AllOfTheRecipeCompiledFollowsEager) {
  SwitchOnTheRecipe();
  options_.max_train_steps = 4;
  options_.validation_fraction = 0;
  Train("eager");
  options_.backend = "jit";
  Train("jit");
  for (const char* field : {"loss", "gradient_norm"}) {
    std::vector<double> eager = Losses(Metrics("eager"), field),
                        jit = Losses(Metrics("jit"), field);
    ASSERT_EQ(eager.size(), 4u);
    ASSERT_EQ(jit.size(), 4u);
    for (size_t i = 0; i < 4; ++i) EXPECT_NEAR(jit[i], eager[i], 1e-4 * eager[i]) << field << i;
  }
}

TEST_F(TrainerTest, LearningRatesAreThoseOfTheScheduler) {
  options_.validation_fraction = 0;
  options_.max_train_steps = 10;
  options_.lr_warmup_steps = 2;
  options_.learning_rate = 1e-3;
  options_.train_batch_size = 1;
  options_.checkpointing_steps = 0;
  int runs = 0;
  auto rates = [&](const std::string& name, auto&& change) {
    TrainOptions before = options_;
    options_.lr_scheduler = name;
    change(options_);
    const std::string run = fmt::format("run{}", ++runs);
    Train(run);
    options_ = before;
    return Losses(Metrics(run), "learning_rate");
  };
  // p: the progress behind the warm-up.
  auto expect = [&](const std::vector<double>& found, auto&& factor) {
    ASSERT_EQ(found.size(), 10u);
    for (int s = 0; s < 10; ++s)
      EXPECT_NEAR(found[static_cast<size_t>(s)], 1e-3 * factor(s, (s - 2) / 8.0), 1e-12) << s;
  };
  auto warm = [](int s, double after) { return s < 2 ? s / 2.0 : after; };
  expect(rates("constant", [](TrainOptions& o) { o.lr_warmup_steps = -1; }),
         [](int, double) { return 1.0; });
  expect(rates("constant_with_warmup", [](TrainOptions&) {}),
         [&](int s, double) { return warm(s, 1); });
  expect(rates("linear", [](TrainOptions&) {}), [&](int s, double p) { return warm(s, 1 - p); });
  expect(rates("cosine", [](TrainOptions&) {}),
         [&](int s, double p) { return warm(s, 0.5 * (1 + std::cos(M_PI * p))); });
  expect(
      rates("cosine_with_restarts", [](TrainOptions& o) { o.lr_num_cycles = 2; }),
      [&](int s, double p) { return warm(s, 0.5 * (1 + std::cos(M_PI * std::fmod(2 * p, 1)))); });
  expect(rates("polynomial", [](TrainOptions& o) { o.lr_power = 2; }), [&](int s, double p) {
    return warm(s, ((1e-3 - 1e-7) * (1 - p) * (1 - p) + 1e-7) / 1e-3);
  });
  expect(rates("piecewise_constant",
               [](TrainOptions& o) {
                 o.lr_warmup_steps = -1;
                 o.lr_step_rules = "1:3,0.5:7,0.1";
               }),
         [](int s, double) { return s < 3   ? 1
                                    : s < 7 ? 0.5
                                            : 0.1; });
  // Times batch size and accumulation.
  auto scaled = rates("constant", [](TrainOptions& o) {
    o.lr_warmup_steps = -1;
    o.scale_lr = true;
    o.learning_rate = 1e-3 / 6;
    o.train_batch_size = 3;
    o.gradient_accumulation_steps = 2;
  });
  EXPECT_NEAR(scaled.at(0), 1e-3, 1e-12);
}

TEST_F(TrainerTest, AveragesFollowTheOptions) {
  options_.validation_fraction = 0;
  options_.lr_scheduler = "constant";
  options_.lr_warmup_steps = -1;
  options_.ema_decay = 0.9;
  options_.ema_update_after_step = 2;
  options_.use_ema_warmup = true;
  options_.ema_inv_gamma = 2;
  options_.ema_power = 0.5;
  options_.ema_min_decay = 0.25;
  auto data = OpenDataset(options_, {});
  auto model = MakeModel(options_, *data);
  ParameterPtr p = model->FindParameter("unet.conv_out.bias");
  double average = p->value().data()[0];
  TrainCallbacks callbacks;
  callbacks.progress = [&](const TrainProgress& progress) {
    double s = std::max(0.0, static_cast<double>(progress.step) - 2 - 1);
    double decay = s == 0 ? 0 : std::clamp(1 - std::pow(1 + s / 2, -0.5), 0.25, 0.9);
    average -= (1 - decay) * (average - p->value().data()[0]);
  };
  Trainer(*model, *data, options_, Folder("run"), false, callbacks).Run();
  auto checkpoint = ReadLatestCheckpoint(Folder("run") / "checkpoints", {});
  EXPECT_NEAR(checkpoint->tensors.at("ema.unet.conv_out.bias").data()[0], average, 1e-7);
  EXPECT_GT(std::abs(average - p->value().data()[0]), 1e-5);
}

TEST(TrainRecipeTest, LearningRates) {
  TrainOptions options;
  EXPECT_EQ(PeakLearningRate(options), 2e-3);
  options.model = "folder";
  EXPECT_EQ(PeakLearningRate(options), 1e-5);
  options.learning_rate = 3;
  EXPECT_EQ(PeakLearningRate(options), 3);
  options.train_batch_size = 4;
  options.gradient_accumulation_steps = 5;
  options.scale_lr = true;
  EXPECT_EQ(PeakLearningRate(options), 60);
}

TEST(TrainRecipeTest, OptionsWithoutEffectAreErrors) {
  auto message = [](auto&& change) {
    TrainOptions options;
    change(options);
    return MessageOf<ValueError>([&] { Validate(options); });
  };
  EXPECT_THAT(message([](TrainOptions& o) { o.lr_power = 2; }), HasSubstr("polynomial"));
  EXPECT_THAT(message([](TrainOptions& o) { o.lr_num_cycles = 2; }), HasSubstr("restarts"));
  EXPECT_THAT(message([](TrainOptions& o) { o.lr_step_rules = "1"; }), HasSubstr("piecewise"));
  EXPECT_THAT(message([](TrainOptions& o) { o.ema_power = 1; }), HasSubstr("use_ema_warmup"));
  EXPECT_THAT(message([](TrainOptions& o) { o.random_flip = true; }), HasSubstr("folder"));
  EXPECT_THAT(message([](TrainOptions& o) { o.snr_gamma = 5, o.prediction_type = "sample"; }),
              HasSubstr("snr_gamma"));
}

TEST(TrainRecipeTest, ChosenOptionsWithoutEffectAreErrors) {
  auto message = [](const std::set<std::string>& chosen, auto&& change) {
    TrainOptions options;
    change(options);
    Validate(options);
    return MessageOf<ValueError>([&] { CheckChosen(options, chosen); });
  };
  auto nothing = [](TrainOptions&) {};
  auto sgd = [](TrainOptions& o) { o.optimizer = "sgd"; };
  EXPECT_THAT(message({"momentum"}, nothing), HasSubstr("momentum has no effect with optimizer"));
  EXPECT_THAT(message({"adam_beta2"}, sgd), HasSubstr("adam_beta2 has no effect with optimizer"));
  EXPECT_THAT(message({"validation_steps"}, [](TrainOptions& o) { o.validation_fraction = 0; }),
              HasSubstr("validation_fraction 0"));
  EXPECT_THAT(message({"validation_prompt"}, [](TrainOptions& o) { o.sample_steps = 0; }),
              HasSubstr("sample_steps 0"));
  // Also where the value is the default.
  EXPECT_THAT(message({"lr_power"}, nothing), HasSubstr("polynomial"));
  EXPECT_THAT(message({"unet"}, [](TrainOptions& o) { o.model = "there"; }),
              HasSubstr("unet has no effect on the model in there"));
  TrainOptions options;
  CheckChosen(options, {"unet", "adam_beta1", "validation_steps", "validation_prompt", "rank"});
  options.optimizer = "sgd";
  CheckChosen(options, {"momentum"});
}

TEST(TrainRecipeTest, OptionsOfAnEarlierVersionAreNamed) {
  auto document = ParseJson(ToJson(TrainOptions()));
  document.erase("noise_offset");
  EXPECT_THAT(
      MessageOf<FileError>([&] { ParseTrainOptions(JsonText(document), "run/train.json"); }),
      AllOf(HasSubstr("run/train.json: the field `noise_offset` is missing"),
            HasSubstr("earlier version")));
  EXPECT_THAT(MessageOf<FileError>([] { ParseTrainOptions("[]", "run/train.json"); }),
              HasSubstr("not a training options file"));
}

// --- Noise of a batch.

Tensor NumberedTokens(int64_t rows) {
  Tensor tokens({rows, 1}, DType::kI64);
  for (int64_t i = 0; i < rows; ++i) tokens.data<int64_t>()[i] = i;
  return tokens;
}

TEST(BatchNoiseTest, OffsetIsTheSameInAllPixelsOfAChannel) {
  ShapesDataset data;
  BatchSource plain(data, NumberedTokens(97), {.batch_size = 4, .seed = 5});
  BatchSource offset(data, NumberedTokens(97), {.batch_size = 4, .noise_offset = 0.1, .seed = 5});
  Random numbers(5, "train.noise_offset");
  for (int round = 0; round < 2; ++round) {
    Batch a = plain.Next(), b = offset.Next();
    EXPECT_FALSE(b.input_noise.defined());
    for (int64_t plane = 0; plane < 12; ++plane) {
      double expected = 0.1 * numbers.Normal();
      for (int64_t i = 256 * plane; i < 256 * (plane + 1); ++i)
        ASSERT_NEAR(b.noise.data()[i] - a.noise.data()[i], expected, 1e-6);
    }
  }
}

TEST(BatchNoiseTest, PerturbationIsForTheInputOnly) {
  ShapesDataset data;
  BatchSource plain(data, NumberedTokens(97), {.batch_size = 4, .seed = 5});
  BatchSource perturbed(data, NumberedTokens(97),
                        {.batch_size = 4, .input_perturbation = 0.1, .seed = 5});
  Random numbers(5, "train.input_perturbation");
  Batch a = plain.Next(), b = perturbed.Next();
  for (int64_t i = 0; i < a.noise.elements(); ++i) {
    ASSERT_EQ(b.noise.data()[i], a.noise.data()[i]);
    ASSERT_NEAR(b.input_noise.data()[i] - a.noise.data()[i], 0.1 * numbers.Normal(), 1e-6);
  }
}

}  // namespace
}  // namespace calotype
