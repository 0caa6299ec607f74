// The training of Custom Diffusion and of Dreambooth: runs, their files and their command.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "core/parallel.h"
#include "core/random.h"
#include "io/image_folder.h"
#include "io/png.h"
#include "pipelines/custom_diffusion.h"
#include "pipelines/custom_diffusion_dataset.h"
#include "pipelines/custom_diffusion_training.h"
#include "pipelines/lora_training.h"
#include "pipelines/training_setup.h"
#include "tests/expect_error.h"
#include "tests/lora_models.h"
#include "tests/random_image.h"
#include "tests/run_program.h"
#include "tests/temp_folder.h"
#include "tests/tiny_stable_diffusion.h"
#include "tests/trainer_fixture.h"

namespace calotype {
namespace {

using namespace test;
namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

class CustomDiffusionTrainingTest : public ::testing::Test {
 protected:
  CustomDiffusionTrainingTest() {
    SetThreads(1);  // threads would cost more than they give at this size
    TinyStableDiffusion()->Save(folder_ / "model");
    Random random(5);
    for (const char* set : {"cat", "class"}) {
      for (int i = 0; i < 4; ++i) {
        fs::create_directories(folder_ / set);
        WritePng(folder_ / fmt::format("{}/{}.png", set, i), RandomImage(24, 20, random));
      }
    }
    options_ = CustomDiffusionTrainDefaults();
    options_.model = folder_ / "model";
    options_.data = folder_ / "cat";
    options_.instance_prompt = "a <new1> cat";
    options_.resolution = 20;
    options_.train_batch_size = 2;
    options_.learning_rate = 1e-2;
    options_.max_train_steps = 6;
    options_.checkpointing_steps = 4;
    options_.sample_steps = 0;
    custom_.modifier_token = "<new1>";
  }
  TrainResult Train(const std::string& run, bool resume = false) {
    return TrainCustomDiffusion(custom_, options_, folder_ / run, resume);
  }
  std::string File(const std::string& run, const std::string& name) {
    return ReadText(folder_ / run / name);
  }
  std::vector<double> LossesOf(const std::string& run) {
    return Losses(File(run, "metrics.jsonl"), "loss");
  }
  std::string ErrorOf() {
    return MessageOf<ValueError>([&] { Train("bad"); });
  }

  TempFolder folder_;
  TrainOptions options_;
  CustomDiffusionTrainOptions custom_;
};

TEST_F(CustomDiffusionTrainingTest, OnlyCopiesAndWordsChange) {
  options_.validation_fraction = 0.5;
  options_.validation_steps = 0;
  options_.max_train_steps = 100;
  options_.learning_rate = 5e-2;
  auto model = DiffusionModel::Load(folder_ / "model");
  auto pictures = OpenDataset(options_, {});
  CustomDiffusionDataset data(*pictures, model->factor(), true);
  Tensor start = model->text_encoder()->EmbeddingOf(model->tokenizer()->Tokenize("k")[0]);
  ParameterPtr word = model->AddToken("<new1>", start.Reshape({1, 8}));
  AddCustomDiffusion(model->unet(), "crossattn");
  std::vector<ParameterPtr> trained = CustomDiffusionParameters(model->unet());
  std::vector<std::pair<ParameterPtr, Tensor>> others;
  for (const ParameterPtr& p : model->NamedParameters()) {
    if (std::ranges::find(trained, p) == trained.end()) others.emplace_back(p, p->value().Clone());
  }
  std::vector<Tensor> before;
  trained.push_back(word);
  for (const ParameterPtr& p : trained) before.push_back(p->value().Clone());
  Trainer trainer(*model, data, options_, folder_ / "run", false, {},
                  {.parameters = trained, .save = [](const fs::path&) {}});
  const double loss = trainer.Validate().loss;
  trainer.Run();
  const double after = trainer.Validate().loss;
  fmt::print("loss {:.4f} -> {:.4f}\n", loss, after);
  EXPECT_LT(after, 0.985 * loss);  // the rest of the model has random weights
  for (const auto& [p, value] : others) EXPECT_TRUE(SameBits(p->value(), value)) << p->name();
  for (size_t i = 0; i < trained.size(); ++i)
    EXPECT_FALSE(SameBits(trained[i]->value(), before[i])) << trained[i]->name();
}

TEST_F(CustomDiffusionTrainingTest, ContinuesBitForBitAndItsFilesGiveWhatWasTrained) {
  options_.class_data = folder_ / "class";
  options_.class_prompt = "cat";
  options_.gradient_accumulation_steps = 2;
  custom_.freeze_model = "crossattn";
  Train("whole");
  Train("parts");
  fs::remove_all(folder_ / "parts/checkpoints/checkpoint-6.safetensors");
  fs::remove(folder_ / "parts/<new1>.safetensors");
  TrainCustomDiffusion({}, {}, folder_ / "parts", /*resume=*/true);
  for (const char* name : {"<new1>.safetensors", kCustomDiffusionFile})
    EXPECT_EQ(File("parts", name), File("whole", name)) << name;
  EXPECT_EQ(LossesOf("parts"), LossesOf("whole"));
  for (const double loss : LossesOf("whole")) EXPECT_GT(loss, 0);
  custom_.freeze_model = "tokens";
  EXPECT_THAT(MessageOf<ValueError>([&] {
                TrainCustomDiffusion(custom_, options_, folder_ / "parts", true, {"freeze_model"});
              }),
              HasSubstr("freeze_model is \"tokens\" here"));

  // Read back, the files fit the model and change what it predicts.
  CustomDiffusion custom = ReadCustomDiffusion(folder_ / "whole");
  ASSERT_EQ(custom.words.size(), 1u);
  EXPECT_EQ(custom.words[0].word, "<new1>");
  auto base = DiffusionModel::Load(folder_ / "model"),
       merged = DiffusionModel::Load(folder_ / "model"),
       loaded = DiffusionModel::Load(folder_ / "model");
  for (DiffusionModel* model : {base.get(), merged.get(), loaded.get()}) {
    AddWords(custom, *model);
    model->SetTrainingMode(false);
  }
  MergeCustomDiffusion(custom, merged->unet());
  LoadCustomDiffusion(folder_ / "whole" / kCustomDiffusionFile, loaded->unet());
  Random random(1);
  std::vector<Tensor> inputs = {random.NormalTensor({1, 4, 10, 10}),
                                Tensor::From<int64_t>({1}, std::vector<int64_t>{600}),
                                merged->Tokens(std::vector<std::string>{"a <new1> cat"}, {})};
  Tensor out = merged->Forward(inputs)[0];
  EXPECT_LT(RelativeError(loaded->Forward(inputs)[0], out), 1e-6);
  EXPECT_GT(RelativeError(base->Forward(inputs)[0], out), 1e-3);
}

TEST_F(CustomDiffusionTrainingTest, CompiledStepsAreTheSameAndTheWordAloneTrains) {
  custom_.freeze_model = "tokens";
  options_.max_train_steps = 3;
  Train("eager");
  options_.backend = "jit";
  Train("jit");
  std::vector<double> eager = LossesOf("eager"), compiled = LossesOf("jit");
  ASSERT_EQ(eager.size(), 3u);
  for (size_t i = 0; i < 3; ++i) EXPECT_NEAR(compiled[i], eager[i], 1e-4 * eager[i]);
  CustomDiffusion custom = ReadCustomDiffusion(folder_ / "jit");
  EXPECT_TRUE(custom.copies.empty());
  Tensor word = custom.words.at(0).embeddings,
         other = ReadWordEmbedding(folder_ / "eager/<new1>.safetensors").embeddings;
  EXPECT_LT(RelativeError(word, other), 1e-3);
  auto model = DiffusionModel::Load(folder_ / "model");
  Tensor start = model->text_encoder()->EmbeddingOf(model->tokenizer()->Tokenize("ktn")[0]);
  EXPECT_GT(RelativeError(word, start.Reshape({1, 8})), 1e-3);
}

// With class_data, scale_lr gives twice the rate.
TEST_F(CustomDiffusionTrainingTest, RateAndClassPictures) {
  options_.max_train_steps = 1;
  options_.learning_rate = 1e-4;
  options_.scale_lr = true;
  Train("plain");
  options_.class_data = folder_ / "drawn";
  options_.class_prompt = "cat";
  options_.num_class_images = 3;
  Train("prior");
  auto rate = [&](const char* run) {
    return Losses(File(run, "metrics.jsonl"), "learning_rate").at(0);
  };
  EXPECT_DOUBLE_EQ(rate("plain"), 2e-4);
  EXPECT_DOUBLE_EQ(rate("prior"), 4e-4);
  EXPECT_EQ(PicturesIn(folder_ / "drawn").size(), 3u);
  // What is there stays, what is missing comes again as it was.
  std::string one = ReadText(folder_ / "drawn/class-00000001.png");
  fs::remove(folder_ / "drawn/class-00000001.png");
  Train("again");
  EXPECT_EQ(ReadText(folder_ / "drawn/class-00000001.png"), one);
  EXPECT_EQ(LossesOf("again"), LossesOf("prior"));
  // What is no picture that can be read does not count.
  WriteText(folder_ / "drawn/.hidden.png", one);
  WriteText(folder_ / "drawn/damaged.png", "x");
  fs::create_directories(folder_ / "drawn/folder.png");
  fs::remove(folder_ / "drawn/class-00000001.png");
  std::string messages;
  const TrainCallbacks listen{.progress = {},
                              .message = [&](const std::string& text) { messages += text + "\n"; },
                              .cancelled = {}};
  TrainCustomDiffusion(custom_, options_, folder_ / "more", false, {}, listen);
  EXPECT_EQ(ReadText(folder_ / "drawn/class-00000001.png"), one);
  EXPECT_THAT(messages, HasSubstr("damaged.png"));
  EXPECT_THAT(messages, HasSubstr("drawing 1 pictures"));
}

// A picture takes minutes: what would be an error afterwards is one before, and a stop is heard
// between two calls of the U-Net.
TEST_F(CustomDiffusionTrainingTest, ClassPicturesComeBehindTheChecks) {
  options_.class_data = folder_ / "drawn";
  options_.class_prompt = "cat";
  options_.num_class_images = 1000;  // hours
  const TrainOptions good = options_;
  WriteText(folder_ / "taken/train.json", "{}");
  EXPECT_THAT(MessageOf<ValueError>([&] { Train("taken"); }), HasSubstr("already holds a run"));
  EXPECT_THAT(MessageOf<ValueError>([&] { TrainLora({}, options_, folder_ / "taken"); }),
              HasSubstr("already holds a run"));
  EXPECT_THAT(MessageOf<ValueError>([&] { TrainLora({.targets = "x"}, options_, folder_ / "a"); }),
              HasSubstr("'x'"));
  auto begin = [&] { BeginTraining(options_, {}, folder_ / "model", false, {}, {}); };
  EXPECT_THAT(MessageOf<ValueError>(begin), HasSubstr("holds a model"));
  custom_.modifier_token = "a";
  EXPECT_THAT(ErrorOf(), HasSubstr("already has the token 'a'"));
  custom_.modifier_token = "<new2>";
  EXPECT_THAT(ErrorOf(), HasSubstr("no caption has the modifier token"));
  custom_.modifier_token = "<new1>";
  options_.resolution = 21;
  EXPECT_THAT(ErrorOf(), HasSubstr("21 pixels a side, expected a multiple of 2"));
  options_ = good;
  options_.lr_scheduler = "piecewise_constant";
  options_.lr_step_rules = "1:x";
  EXPECT_THAT(ErrorOf(), HasSubstr("step_rules"));
  options_ = good;
  options_.data = folder_ / "nothing";
  EXPECT_THROW(Train("bad"), FileError);
  fs::create_directories(folder_ / "empty");
  options_.data = folder_ / "empty";
  EXPECT_THAT(MessageOf<FileError>([&] { Train("bad"); }),
              HasSubstr("there are no .png, .jpg or .jpeg files"));
  EXPECT_FALSE(fs::exists(folder_ / "drawn"));

  options_ = good;
  int asked = 0;
  const TrainCallbacks stop{
      .progress = {}, .message = {}, .cancelled = [&] { return ++asked > 3; }};
  EXPECT_THAT(MessageOf<CancelledError>([&] {
                TrainCustomDiffusion(custom_, options_, folder_ / "bad", false, {}, stop);
              }),
              HasSubstr("stopped after 0 of 1000"));
  EXPECT_EQ(asked, 4);
  EXPECT_FALSE(fs::exists(folder_ / "bad"));
}

TEST_F(CustomDiffusionTrainingTest, ARunIsContinuedByItsOwnCommand) {
  options_.max_train_steps = 1;
  Train("run");
  EXPECT_THAT(MessageOf<ValueError>([&] { TrainLora({}, {}, folder_ / "run", true); }),
              HasSubstr("holds a run of `train custom-diffusion`"));
  EXPECT_THAT(MessageOf<ValueError>([&] { CheckResumes(kTrain, folder_ / "run"); }),
              HasSubstr("calotype train custom-diffusion --out"));
  const fs::path path = folder_ / "run/train.json";
  WriteText(path, ToJson(ParseTrainOptions(ReadText(path), path)));
  CheckResumes(kTrain, folder_ / "run");
  EXPECT_THAT(MessageOf<ValueError>([&] { TrainCustomDiffusion({}, {}, folder_ / "run", true); }),
              HasSubstr("holds a run of `train`,"));
  EXPECT_THAT(MessageOf<FileError>([&] { TrainLora({}, {}, folder_ / "none", true); }),
              HasSubstr("there is no run to resume"));
}

// Dreambooth of the whole U-Net, and of CLIP with it.
TEST_F(CustomDiffusionTrainingTest, DreamboothTrainsTheWholeModel) {
  options_.instance_prompt = "a photo of sks cat";
  options_.class_data = folder_ / "class";
  options_.class_prompt = "cat";
  options_.max_train_steps = 3;
  options_.snr_gamma = 5;
  auto train = [&](const std::string& run, double prior) {
    options_.prior_loss_weight = prior;
    auto data = OpenDataset(options_, {});
    auto model = MakeModel(options_, *data);
    Trainer(*model, *data, options_, folder_ / run).Run();
    return LossesOf(run);
  };
  auto changed = [&](const std::string& run) {
    auto before = DiffusionModel::Load(folder_ / "model"),
         after = DiffusionModel::Load(folder_ / run);
    std::map<std::string, Tensor> old = before->SaveParameters();
    std::map<std::string, int> parts;
    for (const auto& [name, value] : after->SaveParameters())
      parts[name.substr(0, name.find('.'))] += !SameBits(value, old.at(name));
    return parts;
  };
  const double own = train("own", 0).at(0), both = train("both", 1).at(0);
  EXPECT_NEAR(train("twice", 2).at(0), own + 2 * (both - own), 1e-5 * both);
  EXPECT_GT(both, own + 0.5);  // the loss of a model that has learned nothing is about 1
  std::map<std::string, int> parts = changed("both");
  EXPECT_GT(parts["unet"], 50);
  EXPECT_EQ(parts["text_encoder"] + parts["vae"], 0);
  options_.train_text_encoder = true;
  train("text", 1);
  parts = changed("text");
  EXPECT_GT(parts["unet"], 50);
  EXPECT_GT(parts["text_encoder"], 20);
  EXPECT_EQ(parts["vae"], 0);
}

TEST_F(CustomDiffusionTrainingTest, WrongOptions) {
  custom_.modifier_token = "<new2>";
  EXPECT_THAT(ErrorOf(), HasSubstr("no caption has the modifier token <new2>"));
  custom_.modifier_token = "a";
  EXPECT_THAT(ErrorOf(), HasSubstr("already has the token 'a'"));
  custom_.modifier_token = "<new1>+<new1>";
  EXPECT_THAT(ErrorOf(), HasSubstr("already has the token '<new1>'"));
  custom_.modifier_token = "../x";
  EXPECT_THAT(ErrorOf(), HasSubstr("cannot be the name of a file"));
  custom_.modifier_token = "<a>+<b>+<c>+<d>";
  EXPECT_THAT(ErrorOf(), HasSubstr("4 modifier tokens"));
  custom_ = {.modifier_token = "<new1>", .initializer_token = "a+b"};
  EXPECT_THAT(ErrorOf(), HasSubstr("1 modifier tokens (<new1>) and 2 initializer tokens"));
  custom_ = {.initializer_token = "a"};
  EXPECT_THAT(ErrorOf(), HasSubstr("no effect without modifier_token"));
  custom_ = {.freeze_model = "tokens"};
  EXPECT_THAT(ErrorOf(), HasSubstr("trains nothing"));
  custom_ = {.freeze_model = "all"};
  EXPECT_THAT(ErrorOf(), HasSubstr("freeze_model is `all`"));
  custom_ = {.modifier_token = "<new1>"};
  options_.resolution = 16;
  EXPECT_THAT(ErrorOf(), HasSubstr("must be at least 18"));
  options_.resolution = 20;
  options_.cache_latents = true;
  EXPECT_THAT(ErrorOf(), HasSubstr("cache_latents"));
  options_.cache_latents = false;
  options_.train_text_encoder = true;
  EXPECT_THAT(ErrorOf(), HasSubstr("train_text_encoder has no effect"));
  options_.train_text_encoder = false;
  options_.num_class_images = 4;
  EXPECT_THAT(ErrorOf(), HasSubstr("num_class_images has no effect without class_prompt"));
  options_.num_class_images = 0;
  options_.model = "";
  EXPECT_THAT(ErrorOf(), HasSubstr("needs a model"));
  EXPECT_FALSE(fs::exists(folder_ / "bad"));
  // Nothing is overwritten.
  options_.model = folder_ / "model";
  WriteText(folder_ / "has/<new1>.safetensors", "a word");
  EXPECT_THAT(MessageOf<ValueError>([&] { Train("has"); }),
              HasSubstr("<new1>.safetensors is there"));
}

TEST_F(CustomDiffusionTrainingTest, WrongFiles) {
  auto error = [&](const fs::path& path) {
    return MessageOf<FileError>([&] { ReadCustomDiffusion(path); });
  };
  EXPECT_THAT(error(folder_ / "nothing"), HasSubstr("nothing"));
  EXPECT_THAT(error(folder_ / "cat"), HasSubstr("there is neither"));
  WriteText(folder_ / "pickled/<new1>.bin", "x");
  EXPECT_THAT(error(folder_ / "pickled"), HasSubstr("a pickle"));
  // Also beside files that are read, unless one of them is the same.
  SaveWordEmbedding(folder_ / "pickled/<new2>.safetensors", "<new2>", Tensor::Zeros({1, 8}));
  EXPECT_THAT(error(folder_ / "pickled"), HasSubstr("<new1>.bin: a pickle"));
  SaveWordEmbedding(folder_ / "pickled/<new1>.safetensors", "<new1>", Tensor::Zeros({1, 8}));
  EXPECT_EQ(ReadCustomDiffusion(folder_ / "pickled").words.size(), 2u);
  fs::create_directories(folder_ / "steps");
  // One word in two files, as textual_inversion.py leaves them.
  SaveWordEmbedding(folder_ / "steps/learned_embeds-steps-5.safetensors", "<x>",
                    Tensor::Full({1, 8}, 5));
  SaveWordEmbedding(folder_ / "steps/learned_embeds-steps-9.safetensors", "<x>",
                    Tensor::Full({1, 8}, 9));
  EXPECT_THAT(error(folder_ / "steps"),
              AllOf(HasSubstr("two files have the word '<x>': "),
                    HasSubstr("steps-5.safetensors, "), HasSubstr("steps-9.safetensors; give")));
  SaveWordEmbedding(folder_ / "steps/learned_embeds.safetensors", "<x>", Tensor::Full({1, 8}, 10));
  CustomDiffusion final = ReadCustomDiffusion(folder_ / "steps");
  ASSERT_EQ(final.words.size(), 1u);
  EXPECT_EQ(final.words[0].embeddings.data()[0], 10);
  fs::create_directories(folder_ / "words");
  const fs::path file = folder_ / "words/<x>.safetensors";
  WriteSafetensors(file, {{{"<x>", Tensor::Zeros({8})}, {"<y>", Tensor::Zeros({8})}}, {}});
  EXPECT_THAT(error(folder_ / "words"), HasSubstr("2 tensors"));
  WriteSafetensors(file, {{{"<x>", Tensor::Zeros({1, 8, 1})}}, {}});
  EXPECT_THAT(error(file), HasSubstr("f32 [width] or [n, width]"));
  WriteText(folder_ / "words" / kCustomDiffusionFile, "");
  EXPECT_THROW(ReadCustomDiffusion(folder_ / "words"), FileError);
  fs::remove(folder_ / "words" / kCustomDiffusionFile);

  // Of another model, and of a word that the model has.
  auto model = DiffusionModel::Load(folder_ / "model");
  auto add = [&](const std::string& word, int64_t width) {
    SaveWordEmbedding(file, word, Tensor::Zeros({1, width}));
    CustomDiffusion custom = ReadCustomDiffusion(folder_ / "words");
    return MessageOf<FileError>([&] { AddWords(custom, *model); });
  };
  EXPECT_THAT(add("<x>", 768), HasSubstr("must be f32 [n, 8]"));
  EXPECT_THAT(add("k", 8), HasSubstr("already has the token 'k'"));
  EXPECT_THAT(add("<x>", 768), StartsWith(file.string()));
  fs::copy(kFolder / "custom-diffusion.safetensors", folder_ / kCustomDiffusionFile);
  CustomDiffusion other = ReadCustomDiffusion(folder_ / kCustomDiffusionFile);
  EXPECT_THAT(MessageOf<FileError>([&] { MergeCustomDiffusion(other, model->unet()); }),
              HasSubstr("do not fit"));
  EXPECT_TRUE(model->text_encoder()->added_tokens().empty());
}

TEST_F(CustomDiffusionTrainingTest, TheProgramTrainsContinuesAndSamples) {
  auto run = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {CALOTYPE_BIN_DIR "/calotype", "--threads", "1"});
    return RunProgram(arguments);
  };
  const std::string model = folder_ / "model", out = folder_ / "run";
  ProgramResult trained = run({"train",
                               "custom-diffusion",
                               "--model",
                               model,
                               "--instance_data_dir",
                               folder_ / "cat",
                               "--instance_prompt",
                               "a <new1> cat",
                               "--modifier-token",
                               "<new1>",
                               "--initializer-token",
                               "x",
                               "--resolution",
                               "20",
                               "--lr",
                               "0.05",
                               "--steps",
                               "4",
                               "--sample-steps",
                               "0",
                               "--out",
                               out});
  EXPECT_EQ(trained.code, 0) << trained.err;
  EXPECT_THAT(trained.err, HasSubstr("4 pictures, 1 new words"));
  EXPECT_EQ(run({"train", "custom-diffusion", "--out", out, "--resume"}).code, 0);
  auto sample = [&](const std::string& name, const std::string& prompt,
                    std::vector<std::string> more) {
    more.insert(more.begin(), {"sample", "--model", model, "--prompt", prompt, "--steps", "2",
                               "--backend", "eager", "--out", folder_ / name});
    ProgramResult result = run(more);
    EXPECT_EQ(result.code, 0) << result.err;
    return ReadText(folder_ / name);
  };
  std::string plain = sample("plain.png", "a cat", {}),
              custom = sample("custom.png", "a cat", {"--custom-diffusion", out}),
              word = sample("word.png", "a <new1> cat", {"--custom-diffusion", out}),
              word_alone = sample("word_alone.png", "a <new1> cat",
                                  {"--custom-diffusion", out + "/<new1>.safetensors"});
  EXPECT_EQ(std::set<std::string>({plain, custom, word, word_alone}).size(), 4u);
  auto fails = [&](int code, const std::string& text, const std::vector<std::string>& arguments) {
    ProgramResult result = run(arguments);
    EXPECT_EQ(result.code, code) << result.err;
    EXPECT_THAT(result.err, HasSubstr(text));
  };
  fails(3, "there is neither",
        {"sample", "--model", model, "--prompt", "a", "--custom-diffusion", folder_ / "cat"});
  fs::copy(kFolder / "custom-diffusion.safetensors", folder_ / kCustomDiffusionFile);
  fails(3, "do not fit",
        {"sample", "--model", model, "--prompt", "a", "--custom-diffusion",
         folder_ / kCustomDiffusionFile});
  fails(2, "no caption has the modifier token <new2>",
        {"train", "custom-diffusion", "--model", model, "--data", folder_ / "cat",
         "--instance-prompt", "a cat", "--modifier-token", "<new2>", "--resolution", "20", "--out",
         folder_ / "y"});
}

}  // namespace
}  // namespace calotype
