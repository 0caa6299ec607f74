// Training of LoRAs, Dreambooth's prior loss, and the LoRA commands.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

#include "core/json.h"
#include "core/parallel.h"
#include "core/random.h"
#include "pipelines/lora_training.h"
#include "pipelines/training_setup.h"
#include "tests/expect_error.h"
#include "tests/lora_models.h"
#include "tests/run_program.h"
#include "tests/temp_folder.h"
#include "tests/tiny_unet.h"

namespace calotype {
namespace {

using namespace test;
using ::testing::HasSubstr;

// ---------------------------------------------------------------- training

TrainOptions TrainingOptions() {
  SetThreads(1);  // threads would cost more than they give at this size
  TrainOptions options = LoraTrainDefaults();
  options.data = "shapes";
  options.train_batch_size = 4;
  options.max_train_steps = 100;
  options.validation_fraction = 0.1;
  options.validation_steps = 0;
  options.learning_rate = 2e-2;
  options.sample_steps = 0;
  options.checkpointing_steps = 0;
  options.seed = 3;
  return options;
}

constexpr const char* kEverything = "to_q,to_k,to_v,to_out.0,conv1,conv2,proj_in,ff.net.2,conv_in";

// The folder of a model whose weights are random.
void WriteModel(const test::TempFolder& folder) {
  folder.Write("unet.json", test::kTinyUNet);
  TrainOptions options;
  options.unet = (folder / "unet.json").string();
  options.caption_layers = 1;
  options.seed = 1;
  MakeModel(options, *OpenDataset(options, {}))->Save(folder / "model");
}

std::vector<double> Losses(const std::filesystem::path& run) {
  std::vector<double> losses;
  std::istringstream lines(test::ReadText(run / "metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    const auto record = ParseJsonObject(line, "metrics.jsonl");
    if (record.contains("loss")) losses.push_back(record["loss"].get<double>());
  }
  return losses;
}

TEST(LoraTrainingTest, LossFallsWhileTheBaseKeepsItsBits) {
  test::TempFolder folder;
  WriteModel(folder);
  auto model = DiffusionModel::Load(folder / "model");
  LoraModel target = LoraModelOf(*model);
  std::vector<std::pair<ParameterPtr, Tensor>> base;
  for (const ParameterPtr& p : model->NamedParameters()) base.emplace_back(p, p->value().Clone());
  AddLora(target, {.rank = 4,
                   .targets = {"to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in"},
                   .text_encoder_targets = {"to_q", "to_v"}});
  TrainOptions options = TrainingOptions();
  options.model = (folder / "model").string();
  auto data = OpenDataset(options, {});
  Trainer trainer(
      *model, *data, options, folder / "run", false, {},
      {.parameters = LoraParameters(target), .save = [&](const std::filesystem::path& run) {
         SaveLora(run / "lora.safetensors", CollectLora(target), LoraDialect::kPeft);
       }});
  double before = trainer.Validate().loss;
  trainer.Run();
  EXPECT_LT(trainer.Validate().loss, 0.75 * before);
  for (const auto& [p, value] : base) EXPECT_TRUE(SameBits(p->value(), value)) << p->name();
  // Only the terms are in the checkpoint.
  uint64_t bytes = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder / "run" / "checkpoints"))
    bytes += entry.file_size();
  EXPECT_LT(bytes, 200'000u);

  // The file, merged into the model as it was, gives what was trained.
  auto fresh = DiffusionModel::Load(folder / "model");
  WeightedLora lora{LoadLora(folder / "run" / "lora.safetensors")};
  MergeLora(LoraModelOf(*fresh), {&lora, 1});
  Random random(1, "test");
  std::vector<Tensor> inputs = {random.NormalTensor({2, 3, 16, 16}),
                                Tensor::From<int64_t>({2}, std::vector<int64_t>{3, 600}),
                                model->Tokens(std::vector<std::string>{"a red circle", ""}, {})};
  model->SetTrainingMode(false);
  Tensor trained = model->Forward(inputs)[0];
  EXPECT_LT(RelativeError(fresh->Forward(inputs)[0], trained), 1e-5);
  DetachLora(target);
  EXPECT_GT(RelativeError(model->Forward(inputs)[0], trained), 0.1);
}

TEST(LoraTrainingTest, ARunContinuesBitForBit) {
  test::TempFolder folder;
  WriteModel(folder);
  TrainOptions options = TrainingOptions();
  options.model = (folder / "model").string();
  options.max_train_steps = 12;
  LoraTrainOptions lora{.rank = 2,
                        .alpha = 3,
                        .targets = kEverything,
                        .train_text_encoder = true,
                        .text_encoder_targets = "to_q",
                        .format = "kohya"};
  TrainLora(lora, options, folder / "whole");
  int64_t steps = 0;
  TrainCallbacks stop{.progress = [&](const TrainProgress& p) { steps = p.step; },
                      .cancelled = [&] { return steps == 5; }};
  EXPECT_THROW(TrainLora(lora, options, folder / "halves", false, {}, stop), CancelledError);
  // Without its checkpoint its result says that it had one.
  std::filesystem::rename(folder / "halves/checkpoints", folder / "checkpoints");
  EXPECT_THAT(MessageOf<FileError>([&] { TrainLora({}, {}, folder / "halves", true); }),
              HasSubstr("although the run has written"));
  std::filesystem::remove_all(folder / "halves/checkpoints");
  std::filesystem::rename(folder / "checkpoints", folder / "halves/checkpoints");
  // Options that differ from the run's are refused; the run's count.
  LoraTrainOptions other = lora;
  other.rank = 3;
  EXPECT_THAT(
      MessageOf<ValueError>([&] { TrainLora(other, options, folder / "halves", true, {"rank"}); }),
      HasSubstr("rank is 3 here and 2 in the run"));
  TrainLora({}, {}, folder / "halves", true);
  EXPECT_EQ(test::ReadText(LoraFileOf(folder / "halves", "kohya")),
            test::ReadText(LoraFileOf(folder / "whole", "kohya")));
  EXPECT_EQ(Losses(folder / "halves"), Losses(folder / "whole"));
  LoraFile file = LoadLora(LoraFileOf(folder / "whole", "kohya"));
  EXPECT_EQ(file.dialect, LoraDialect::kKohya);
  EXPECT_EQ(file.modules.begin()->second.alpha, 3);
}

TEST(LoraTrainingTest, CompiledStepsAreTheSame) {
  test::TempFolder folder;
  WriteModel(folder);
  TrainOptions options = TrainingOptions();
  options.model = (folder / "model").string();
  options.max_train_steps = 6;
  TrainLora({}, options, folder / "eager");
  options.backend = "jit";
  TrainLora({}, options, folder / "jit");
  std::vector<double> eager = Losses(folder / "eager"), compiled = Losses(folder / "jit");
  ASSERT_EQ(eager.size(), compiled.size());
  for (size_t i = 0; i < eager.size(); ++i) EXPECT_NEAR(compiled[i], eager[i], 1e-4 * eager[i]);
}

// The loss is that of the data plus prior_loss_weight times that of the class.
TEST(LoraTrainingTest, DreamboothAddsTheLossOfTheClass) {
  test::TempFolder folder;
  WriteModel(folder);
  TrainOptions options = TrainingOptions();
  options.model = (folder / "model").string();
  options.max_train_steps = 1;
  int runs = 0;
  auto first_loss = [&] {
    std::filesystem::path run = folder / fmt::format("run{}", ++runs);
    TrainLora({}, options, run);
    return Losses(run).at(0);
  };
  double own = first_loss();
  options.class_data = "shapes";
  double both = first_loss();
  options.prior_loss_weight = 0;
  EXPECT_NEAR(first_loss(), own, 1e-6 * own);
  options.prior_loss_weight = 3;
  EXPECT_NEAR(first_loss(), own + 3 * (both - own), 1e-5 * own);
  EXPECT_GT(both, 1.2 * own);
  EXPECT_GT(std::abs(both - 2 * own), 1e-3 * own);  // the class has pictures and noise of its own

  // A run continues with both streams where they were.
  options.max_train_steps = 8;
  options.gradient_accumulation_steps = 2;
  TrainLora({}, options, folder / "whole");
  int64_t steps = 0;
  TrainCallbacks stop{.progress = [&](const TrainProgress& p) { steps = p.step; },
                      .cancelled = [&] { return steps == 3; }};
  EXPECT_THROW(TrainLora({}, options, folder / "halves", false, {}, stop), CancelledError);
  TrainLora({}, {}, folder / "halves", true);
  EXPECT_EQ(Losses(folder / "halves"), Losses(folder / "whole"));

  options.class_data = "";
  EXPECT_THAT(MessageOf<ValueError>([&] { TrainLora({}, options, folder / "x"); }),
              HasSubstr("prior_loss_weight has no effect without class_data"));
}

TEST(LoraTrainingTest, WrongOptions) {
  test::TempFolder folder;
  WriteModel(folder);
  TrainOptions options = TrainingOptions();
  auto error = [&](const LoraTrainOptions& lora) {
    return MessageOf<ValueError>([&] { TrainLora(lora, options, folder / "run"); });
  };
  EXPECT_THAT(error({}), HasSubstr("needs a model"));
  options.model = (folder / "model").string();
  EXPECT_THAT(error({.rank = 0}), HasSubstr("rank is 0"));
  EXPECT_THAT(error({.alpha = -1}), HasSubstr("alpha is -1"));
  EXPECT_THAT(error({.targets = ""}), HasSubstr("no targets"));
  EXPECT_THAT(error({.targets = "to_q,nothing"}), HasSubstr("'nothing'"));
  EXPECT_THAT(error({.text_encoder_targets = "to_q"}), HasSubstr("no effect"));
  EXPECT_THAT(error({.format = "processor"}), HasSubstr("read only"));
  EXPECT_FALSE(std::filesystem::exists(folder / "run"));
  auto chosen = [&](const std::set<std::string>& names) {
    return MessageOf<ValueError>([&] { TrainLora({}, options, folder / "run", false, names); });
  };
  EXPECT_THAT(chosen({"momentum"}), HasSubstr("momentum has no effect with optimizer adamw"));
  EXPECT_THAT(chosen({"validation_prompt"}), HasSubstr("sample_steps 0"));
  EXPECT_FALSE(std::filesystem::exists(folder / "run"));
}

TEST(LoraTrainingTest, FoldersWithOtherFiles) {
  test::TempFolder folder;
  WriteModel(folder);
  TrainOptions options = TrainingOptions();
  options.model = (folder / "model").string();
  options.max_train_steps = 1;
  // A LoRA is not overwritten.
  test::WriteText(folder / "has/pytorch_lora_weights.safetensors", "a LoRA");
  EXPECT_THAT(MessageOf<ValueError>([&] { TrainLora({}, options, folder / "has"); }),
              HasSubstr("pytorch_lora_weights.safetensors is there"));
  EXPECT_EQ(test::ReadText(folder / "has/pytorch_lora_weights.safetensors"), "a LoRA");
  // Beside a model nothing of it is overwritten.
  TrainLora({}, options, folder / "model");
  EXPECT_EQ(DiffusionModel::Load(folder / "model")->side(), 16);
  // Damaged, or of an earlier version.
  const auto run = ParseJson(test::ReadText(folder / "model/train.json"));
  EXPECT_EQ(run.at("lora").at("rank"), 4);
  auto error = [&](auto change) {
    auto changed = run;
    change(changed);
    test::WriteText(folder / "model/train.json", JsonText(changed));
    return MessageOf<FileError>([&] { TrainLora({}, {}, folder / "model", true); });
  };
  EXPECT_THAT(error([](auto& j) { j["lora"].erase("alpha"); }),
              HasSubstr("train.json: the field `lora.alpha` is missing"));
  EXPECT_THAT(error([](auto& j) { j["lora"]["rnak"] = 2; }),
              HasSubstr("train.json: unknown field 'lora.rnak'"));
  EXPECT_THAT(error([](auto& j) { j["lora"]["rank"] = "four"; }),
              HasSubstr("train.json: the field `lora.rank` is \"four\", of the wrong type"));
  EXPECT_THAT(error([](auto& j) { j["lora"] = 4; }),
              HasSubstr("train.json: not a training options file"));
  // One of the version that kept them in a file beside it: no command continues it.
  EXPECT_THAT(error([](auto& j) { j.erase("lora"), j.erase("class_prompt"); }),
              HasSubstr("`class_prompt` is missing; a run of an earlier version"));
}

// ---------------------------------------------------------------- the program

TEST(LoraAppTest, TrainsConvertsMergesAndSamples) {
  test::TempFolder folder;
  WriteModel(folder);
  auto run = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {CALOTYPE_BIN_DIR "/calotype", "--threads", "1"});
    return test::RunProgram(arguments);
  };
  auto ok = [&](const std::vector<std::string>& arguments) {
    test::ProgramResult result = run(arguments);
    EXPECT_EQ(result.code, 0) << fmt::format("{}\n{}", fmt::join(arguments, " "), result.err);
    return result.out;
  };
  const std::string model = folder / "model",
                    lora = folder / "run/pytorch_lora_weights.safetensors",
                    kohya = folder / "kohya.safetensors", merged = folder / "merged";
  ok({"train", "lora", "--model", model, "--data", "shapes", "--rank", "2", "--network-alpha", "3",
      "--lr", "0.05", "--steps", "4", "--sample-steps", "0", "--out", folder / "run"});
  EXPECT_THAT(run({"train", "lora", "--out", folder / "run", "--resume"}).err,
              HasSubstr(fmt::format("sample --model {} --lora {}", model, lora)));
  std::string info = ok({"lora", "info", lora, "--model", model});
  EXPECT_THAT(info, HasSubstr("32 modules"));
  EXPECT_THAT(info, HasSubstr("ranks 2; alphas 3"));
  EXPECT_THAT(info, HasSubstr("32 of 32 modules match"));
  // The layers are not those of Stable Diffusion.
  EXPECT_THAT(ok({"lora", "convert", lora, "--model", model, "--format", "kohya", "--out", kohya}),
              HasSubstr("32 modules as kohya"));
  ok({"lora", "merge", "--model", model, "--lora", kohya + ":0.5", "--out", merged});
  auto sample = [&](const std::string& of, const std::string& out,
                    std::vector<std::string> more = {}) {
    std::vector<std::string> arguments = {
        "sample", "--model", of,          "--prompt", "a red circle", "--steps",   "2",
        "--seed", "3",       "--backend", "eager",    "--out",        folder / out};
    arguments.insert(arguments.end(), more.begin(), more.end());
    ok(arguments);
    return test::ReadText(folder / out);
  };
  std::string plain = sample(model, "plain.png");
  std::string with = sample(model, "with.png", {"--lora", lora + ":0.2", "--lora", kohya + ":0.3"});
  EXPECT_NE(with, plain);
  EXPECT_EQ(sample(model, "zero.png", {"--lora", lora + ":0"}), plain);
  EXPECT_EQ(sample(merged, "merged.png"), sample(model, "half.png", {"--lora", lora + ":0.5"}));

  auto fails = [&](int code, const std::string& text, const std::vector<std::string>& arguments) {
    test::ProgramResult result = run(arguments);
    EXPECT_EQ(result.code, code) << result.err;
    EXPECT_THAT(result.err, HasSubstr(text));
  };
  const std::string other = kFolder / "attention-kohya.safetensors";
  fails(3, "24 of 40 modules match",
        {"sample", "--model", model, "--prompt", "a", "--lora", other, "--allow-unmatched"});
  fails(3, "wrong shape", {"lora", "info", other, "--model", model});
  fails(3, "name the model", {"lora", "convert", lora, "--out", folder / "x.safetensors"});
  fails(2, "has no effect without a LoRA",
        {"sample", "--model", model, "--prompt", "a", "--allow-unmatched"});
  fails(2, "is no number", {"sample", "--model", model, "--prompt", "a", "--lora", lora + ":much"});
  fails(2, "unknown", {"train", "lora", "--unet", "toy16", "--out", folder / "y"});
  fails(2, "momentum has no effect",
        {"train", "lora", "--model", model, "--momentum", "0.5", "--min-snr-gamma", "5", "--out",
         folder / "y"});
}

}  // namespace
}  // namespace calotype
