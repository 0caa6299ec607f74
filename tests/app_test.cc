// The program as a user meets it: commands, files, exit codes, interruption.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <thread>

#include "core/json.h"
#include "io/checkpoint.h"
#include "io/image_folder.h"
#include "io/png.h"
#include "io/safetensors.h"
#include "io/shapes.h"
#include "pipelines/model_folder.h"
#include "tests/run_program.h"
#include "tests/tiny_unet.h"

namespace calotype {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using test::ProgramResult;
using test::ReadText;
using test::TempFolder;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

std::vector<std::string> Program(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), std::string(CALOTYPE_BIN_DIR) + "/calotype");
  return arguments;
}

ProgramResult Calotype(std::vector<std::string> arguments) {
  return test::RunProgram(Program(std::move(arguments)));
}

class AppTest : public ::testing::Test {
 protected:
  AppTest() { folder_.Write("unet.json", test::kTinyUNet); }

  // Arguments of a short run into the folder `name`.
  std::vector<std::string> Train(const std::string& name,
                                 std::vector<std::string> more = {}) const {
    std::vector<std::string> arguments{"train",
                                       "--out",
                                       folder_ / name,
                                       "--unet",
                                       folder_ / "unet.json",
                                       "--batch-size",
                                       "4",
                                       "--steps",
                                       "6",
                                       "--threads",
                                       "1",
                                       "--sample-steps",
                                       "0",
                                       "--lr-warmup-steps",
                                       "0"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }
  std::string Weights(const std::string& name) const {
    return ReadText(folder_ / name / "unet/diffusion_pytorch_model.safetensors") +
           ReadText(folder_ / name / "caption_encoder/model.safetensors");
  }
  // Waits until the metrics of a run have `lines` lines.
  void WaitForLines(const std::string& name, int64_t lines) const {
    for (int i = 0; i < 6000; ++i) {
      std::string text = ReadText(folder_ / name / "metrics.jsonl");
      if (std::count(text.begin(), text.end(), '\n') >= lines) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    FAIL() << "the run did not start within a minute";
  }
  // A folder with `count` captioned pictures.
  void WritePictures(const std::string& name, int count) const {
    fs::create_directories(folder_ / name);
    std::string lines;
    for (int i = 0; i < count; ++i) {
      std::string file = std::to_string(i) + ".png";
      WritePng(folder_ / name / file, TensorToImage(RenderShape(i, 0, 0)));
      lines += ImageFolderLine(file, ShapeCaption(i));
    }
    folder_.Write(fs::path(name) / "metadata.jsonl", lines);
  }

  TempFolder folder_;
};

TEST_F(AppTest, HelpAndVersion) {
  ProgramResult help = Calotype({"--help"});
  EXPECT_EQ(help.code, 0);
  for (const char* command :
       {"demo", "train", "sample", "data", "bench", "info", "graph", "unet"}) {
    EXPECT_THAT(help.out, HasSubstr(command));
    ProgramResult of_command = Calotype({command, "--help"});
    EXPECT_EQ(of_command.code, 0) << command;
    EXPECT_THAT(of_command.out, HasSubstr("xample")) << command;
  }
  ProgramResult version = Calotype({"--version"});
  EXPECT_EQ(version.code, 0);
  EXPECT_THAT(version.out, HasSubstr("calotype 0."));
}

TEST_F(AppTest, WrongUsageIsCode2) {
  auto message = [](std::vector<std::string> arguments) {
    ProgramResult result = Calotype(std::move(arguments));
    EXPECT_EQ(result.code, 2) << result.err;
    EXPECT_EQ(result.out, "");
    return result.err;
  };
  EXPECT_THAT(message({}), HasSubstr("subcommand"));
  EXPECT_THAT(message({"paint"}), HasSubstr("paint"));
  EXPECT_THAT(message({"sample", "--model", "x", "--prompt", "y", "--colour", "red"}),
              HasSubstr("--colour"));
  EXPECT_THAT(message({"sample", "--prompt", "y"}), HasSubstr("--model"));
  EXPECT_THAT(message({"--threads", "0", "info"}), HasSubstr("--threads"));
  EXPECT_THAT(message(Train("run", {"--optimizer", "lion"})), HasSubstr("lion"));
  EXPECT_THAT(message(Train("run", {"--learning-rate", "fast"})), HasSubstr("fast"));
  EXPECT_THAT(message(Train("run", {"--unet", "toy17"})), HasSubstr("toy17"));
  EXPECT_THAT(message(Train("run", {"--seed", "-1"})), HasSubstr("--seed"));
  EXPECT_THAT(message({"sample", "--model", "x", "--prompt", "y", "--seed", "-1"}),
              HasSubstr("--seed"));
  EXPECT_THAT(message({"graph", "--batch", "0"}), HasSubstr("--batch"));
  EXPECT_THAT(message({"demo", "--out", folder_ / "demo", "--optimizer", "lion"}),
              HasSubstr("lion"));
  // Options that would change nothing.
  EXPECT_THAT(message(Train("run", {"--momentum", "0.5"})),
              AllOf(HasSubstr("momentum has no effect"), HasSubstr("optimizer adamw")));
  EXPECT_THAT(message(Train("run", {"--optimizer", "sgd", "--adam-beta1", "0.5"})),
              HasSubstr("adam_beta1 has no effect"));
  EXPECT_THAT(message(Train("run", {"--validation-prompt", "a red circle"})),
              HasSubstr("validation_prompt has no effect with sample_steps 0"));
  EXPECT_THAT(message(Train("run", {"--validation-fraction", "0", "--validation-steps", "2"})),
              HasSubstr("validation_steps has no effect"));
  EXPECT_FALSE(fs::exists(folder_ / "run"));
}

TEST_F(AppTest, UnknownFieldsOfAConfigAreNamed) {
  folder_.Write("bad.json", R"({"sample_size": 16, "colour": "red"})");
  ProgramResult result = Calotype(Train("run", {"--unet", folder_ / "bad.json"}));
  EXPECT_EQ(result.code, 3);
  EXPECT_THAT(result.err, AllOf(HasSubstr("bad.json"), HasSubstr("colour")));
}

TEST_F(AppTest, MissingAndDamagedFilesAreCode3) {
  ProgramResult missing = Calotype({"sample", "--model", folder_ / "nothing", "--prompt", "red"});
  EXPECT_EQ(missing.code, 3);
  EXPECT_THAT(missing.err, HasSubstr("nothing"));
  EXPECT_EQ(Calotype(Train("run", {"--data", folder_ / "nothing"})).code, 3);
  EXPECT_EQ(Calotype(Train("run", {"--unet", folder_ / "nothing.json"})).code, 3);
  EXPECT_EQ(Calotype({"info", folder_ / "nothing.png"}).code, 3);
  EXPECT_EQ(Calotype({"train", "--resume", "--out", folder_ / "nothing"}).code, 3);

  ASSERT_EQ(Calotype(Train("run")).code, 0);
  fs::path weights = folder_ / "run/unet/diffusion_pytorch_model.safetensors";
  fs::resize_file(weights, fs::file_size(weights) / 2);
  ProgramResult truncated = Calotype({"sample", "--model", folder_ / "run", "--prompt", "red"});
  EXPECT_EQ(truncated.code, 3);
  EXPECT_THAT(truncated.err, HasSubstr("diffusion_pytorch_model.safetensors"));

  TensorFile file;
  file.tensors["conv_in.weight"] = Tensor::Zeros({1, 2, 3});
  WriteSafetensors(weights, file);
  ProgramResult shapes = Calotype({"sample", "--model", folder_ / "run", "--prompt", "red"});
  EXPECT_EQ(shapes.code, 3);
  EXPECT_THAT(shapes.err, AllOf(HasSubstr("conv_in.weight"), HasSubstr("[1, 2, 3]"),
                                HasSubstr("conv_out.bias")));
}

TEST_F(AppTest, FoldersOfPictures) {
  fs::create_directories(folder_ / "empty");
  ProgramResult empty = Calotype(Train("run", {"--data", folder_ / "empty"}));
  EXPECT_EQ(empty.code, 3);
  EXPECT_THAT(empty.err, HasSubstr("metadata.jsonl"));

  WritePictures("pictures", 30);
  folder_.Write("pictures/7.png", "this is no picture");
  ProgramResult trained =
      Calotype(Train("run", {"--data", folder_ / "pictures", "--sample-steps", "100"}));
  EXPECT_EQ(trained.code, 0) << trained.err;
  EXPECT_THAT(trained.err, AllOf(HasSubstr("warning"), HasSubstr("7.png"), HasSubstr("29 captions"),
                                 HasSubstr("validation loss")));
  EXPECT_TRUE(fs::exists(folder_ / "run/samples/step-00000006.png"));
  std::istringstream lines(ReadText(folder_ / "run/metrics.jsonl"));
  int steps = 0;
  for (std::string line; std::getline(lines, line);) {
    json record = ParseJsonObject(line, "metrics.jsonl");
    if (!record.contains("loss")) continue;
    EXPECT_EQ(record["step"], ++steps);
    for (const char* key : {"loss", "learning_rate", "gradient_norm", "seconds"})
      EXPECT_TRUE(record[key].is_number()) << key;
  }
  EXPECT_EQ(steps, 6);
}

TEST_F(AppTest, SamplesArePicturesWithTheirParameters) {
  ASSERT_EQ(Calotype(Train("run")).code, 0);
  std::string picture = folder_ / "x.png";
  // Both spellings of an option, and _ for -.
  ProgramResult drawn = Calotype(
      {"sample", "--model", folder_ / "run", "--prompt", "a large blue cross on a gray background",
       "--steps", "3", "--cfg_scale", "2", "--seed", "7", "--output", picture, "--threads", "1"});
  ASSERT_EQ(drawn.code, 0) << drawn.err;
  EXPECT_EQ(drawn.out, picture + "\n");
  std::vector<PngText> texts;
  Image image = ReadPng(picture, &texts);
  EXPECT_EQ(image.width, 16);
  ASSERT_EQ(texts.size(), 1u);
  EXPECT_EQ(texts[0].keyword, "parameters");
  EXPECT_THAT(texts[0].text,
              AllOf(HasSubstr("a large blue cross on a gray background\n"), HasSubstr("Steps: 3"),
                    HasSubstr("CFG scale: 2"), HasSubstr("Seed: 7")));
  ProgramResult info = Calotype({"info", picture});
  EXPECT_EQ(info.code, 0);
  EXPECT_THAT(info.out, HasSubstr("Seed: 7"));

  // Maps that cannot be written: known before drawing, or else the pictures are there.
  auto maps = [&](const std::string& folder) {
    return Calotype({"sample", "--model", folder_ / "run", "--prompt", "a blue cross", "--steps",
                     "2", "--attention-maps", folder, "--out", folder_ / "y.png", "--backend",
                     "eager", "--threads", "1"});
  };
  ProgramResult no_folder = maps(picture);
  EXPECT_EQ(no_folder.code, 3);
  EXPECT_THAT(no_folder.err, HasSubstr(picture));
  EXPECT_FALSE(fs::exists(folder_ / "y.png"));
  fs::create_directories(folder_ / "maps/000-1-blue.png");
  ProgramResult no_map = maps(folder_ / "maps");
  EXPECT_EQ(no_map.code, 3);
  EXPECT_THAT(no_map.err, HasSubstr("000-1-blue.png"));
  EXPECT_TRUE(fs::exists(folder_ / "y.png"));

  // Several pictures: numbered names; the same seed gives the same picture; eager is close.
  fs::create_directories(folder_ / "many.png");  // which is not written
  ProgramResult several =
      Calotype({"sample", "-m", folder_ / "run", "-p", "a large blue cross on a gray background",
                "--steps", "3", "--guidance-scale", "2", "--seed", "6", "--count", "2", "--out",
                folder_ / "many.png", "--backend", "eager", "--threads", "1"});
  ASSERT_EQ(several.code, 0) << several.err;
  Image second = ReadPng(folder_ / "many-001.png");
  ASSERT_EQ(second.rgb.size(), image.rgb.size());
  for (size_t i = 0; i < image.rgb.size(); ++i) ASSERT_NEAR(second.rgb[i], image.rgb[i], 1);
}

// Before a model is read.
TEST_F(AppTest, WhatDrawingCannotDoIsSaidAtOnce) {
  auto message = [&](const std::string& command, std::vector<std::string> arguments, int code) {
    arguments.insert(arguments.begin(), {command, "--model", folder_ / "nothing"});
    ProgramResult result = Calotype(arguments);
    EXPECT_EQ(result.code, code) << result.err;
    return result.err;
  };
  fs::create_directories(folder_ / "x-001.png");
  const std::string out = folder_ / "x.png";
  for (const std::string& err :
       {message("sample", {"--prompt", "a", "--count", "2", "--out", out}, 3),
        message("sample", {"--prompt", "a", "--prompt", "b", "--out", out}, 3),
        message("edit", {"--prompt", "a", "--edit-prompt", "b", "--out", out}, 3)}) {
    EXPECT_THAT(err, AllOf(HasSubstr("x-001.png"), HasSubstr("it is a folder")));
  }

  // Tags of LoRAs: the same in each prompt, in any order; nowhere else.
  auto two = [&](const std::string& second, int code) {
    return message("sample",
                   {"--prompt", "a <lora:m:0.5> <lora:n>", "--prompt", second, "--lora-dir",
                    folder_ / ".", "--out", folder_ / "y.png"},
                   code);
  };
  EXPECT_THAT(two("b <lora:n> <lora:m:0.5>", 3), HasSubstr("m.safetensors: no such file"));
  EXPECT_THAT(two("b <lora:n> <lora:m:0.6>", 2), HasSubstr("different LoRAs"));
  EXPECT_THAT(two("b <lora:n>", 2), HasSubstr("different LoRAs"));
  const std::string tag = "c <lora:m>";
  for (const std::string& err :
       {message("sample", {"--prompt", "a", "--negative-prompt", tag}, 2),
        message("edit", {"--prompt", "a", "--edit-prompt", "b", "--negative-prompt", tag}, 2),
        message("edit", {"--prompt", tag, "--edit-prompt", "b"}, 2),
        message("edit", {"--prompt", "a", "--edit-prompt", tag}, 2)}) {
    EXPECT_THAT(err, AllOf(HasSubstr("names a LoRA"), HasSubstr(tag)));
  }
}

TEST_F(AppTest, StableDiffusionFolders) {
  const std::filesystem::path fixtures =
      std::filesystem::path(CALOTYPE_TEST_DATA) / "fixtures/stable_diffusion";
  auto draw = [&](std::vector<std::string> more, const std::string& model = "model") {
    std::vector<std::string> arguments{
        "sample",    "--model", fixtures / model,  "--prompt",  "the cat",
        "--steps",   "4",       "--seed",          "7",         "--rng",
        "torch",     "--out",   folder_ / "x.png", "--backend", "eager",
        "--threads", "1"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return Calotype(arguments);
  };
  ProgramResult drawn =
      draw({"--negative-prompt", "low", "--width", "48", "--height", "64", "--clip-skip", "1"});
  ASSERT_EQ(drawn.code, 0) << drawn.err;
  EXPECT_THAT(drawn.err, HasSubstr("not used: feature_extractor, safety_checker"));
  std::vector<PngText> texts;
  Image plain = ReadPng(folder_ / "x.png", &texts);
  EXPECT_EQ(plain.width, 48);
  EXPECT_EQ(plain.height, 64);
  ASSERT_EQ(texts.size(), 1u);
  EXPECT_THAT(texts[0].text,
              AllOf(HasSubstr("the cat\nNegative prompt: low\nSteps: 4, Sampler: PLMS, CFG scale: "
                              "7.5, Seed: 7, Size: 48x64, Clip skip: 2, RNG: CPU")));
  ProgramResult from = draw({"--init-image", fixtures / "init.png", "--mask-image",
                             fixtures / "mask.png", "--strength", "0.5", "--sampler", "ddim"});
  ASSERT_EQ(from.code, 0) << from.err;
  Image inpainted = ReadPng(folder_ / "x.png", &texts);
  EXPECT_EQ(inpainted.width, 64);
  EXPECT_EQ(inpainted.height, 48);
  EXPECT_THAT(texts.back().text, HasSubstr("Denoising strength: 0.5"));

  EXPECT_EQ(draw({"--width", "60"}).code, 2);
  EXPECT_EQ(draw({"--init-image", folder_ / "none.png"}).code, 3);
  EXPECT_EQ(draw({"--init-image", fixtures / "init.png", "--mask-image", folder_ / "x.png"}).code,
            2);
  ProgramResult incomplete = draw({}, "inpaint");  // a U-Net alone
  EXPECT_EQ(incomplete.code, 3);
  EXPECT_THAT(incomplete.err, HasSubstr("inpaint/text_encoder/config.json"));
  EXPECT_THAT(Calotype({"info", fixtures / "model"}).out,
              AllOf(HasSubstr("64 x 64 pixels"), HasSubstr("CLIP"), HasSubstr("autoencoder")));
}

TEST_F(AppTest, UnknownWordsAreNamedAndNothingButThemIsWrongUsage) {
  ASSERT_EQ(Calotype(Train("run")).code, 0);
  auto draw = [&](const std::string& prompt) {
    return Calotype({"sample", "--model", folder_ / "run", "--prompt", prompt, "--steps", "1",
                     "--backend", "eager", "--out", folder_ / "x.png", "--threads", "1"});
  };
  ProgramResult some = draw("a small mauve circle");
  EXPECT_EQ(some.code, 0);
  EXPECT_THAT(some.err, AllOf(HasSubstr("mauve"), HasSubstr("<unk>"), Not(HasSubstr("circle"))));
  ProgramResult all = draw("mauve zebra");
  EXPECT_EQ(all.code, 2);
  EXPECT_THAT(all.err, AllOf(HasSubstr("mauve"), HasSubstr("zebra")));
}

TEST_F(AppTest, TheRecipeIsGivenByOptions) {
  ProgramResult trained = Calotype(Train("run", {"--min-snr-gamma",
                                                 "5",
                                                 "--noise-offset",
                                                 "0.1",
                                                 "--input-perturbation",
                                                 "0.1",
                                                 "--gradient-accumulation-steps",
                                                 "2",
                                                 "--lr-scheduler",
                                                 "polynomial",
                                                 "--lr-power",
                                                 "2",
                                                 "--scale-lr",
                                                 "--lr",
                                                 "1e-4",
                                                 "--proportion-empty-prompts",
                                                 "0.3",
                                                 "--use-ema-warmup",
                                                 "--ema-power",
                                                 "0.75",
                                                 "--gradient-checkpointing"}));
  ASSERT_EQ(trained.code, 0) << trained.err;
  EXPECT_THAT(trained.err, HasSubstr("6 steps of 8"));
  json options = ParseJson(ReadText(folder_ / "run/train.json"));
  EXPECT_EQ(options["snr_gamma"], 5);
  EXPECT_EQ(options["caption_dropout"], 0.3);
  EXPECT_EQ(options["gradient_accumulation_steps"], 2);
  EXPECT_EQ(options["scale_lr"], true);
  EXPECT_EQ(options["gradient_checkpointing"], true);
  std::istringstream metrics(ReadText(folder_ / "run/metrics.jsonl"));
  std::string line;
  std::getline(metrics, line);
  json first = ParseJsonObject(line, "metrics.jsonl");
  EXPECT_NEAR(first["learning_rate"].get<double>(), 8e-4, 1e-12);
  // What has no effect is wrong usage, and a continued run keeps what decides it.
  ProgramResult useless = Calotype(Train("other", {"--lr-power", "2"}));
  EXPECT_EQ(useless.code, 2);
  EXPECT_THAT(useless.err, AllOf(HasSubstr("lr_power"), HasSubstr("polynomial")));
  ProgramResult changed = Calotype(
      {"train", "--out", folder_ / "run", "--resume", "--noise-offset", "0.2", "--threads", "1"});
  EXPECT_EQ(changed.code, 2);
  EXPECT_THAT(changed.err, HasSubstr("noise_offset"));
}

// A folder that diffusers wrote, and one that it can read: the frozen parts byte for byte.
TEST_F(AppTest, StableDiffusionIsTrainedOnLatents) {
  const fs::path base = fs::path(CALOTYPE_TEST_DATA) / "fixtures/stable_diffusion/model";
  WritePictures("pictures", 5);
  ProgramResult trained = Calotype({"train",
                                    "--model",
                                    base,
                                    "--data",
                                    folder_ / "pictures",
                                    "--out",
                                    folder_ / "run",
                                    "--resolution",
                                    "32",
                                    "--batch-size",
                                    "2",
                                    "--steps",
                                    "2",
                                    "--cache-latents",
                                    "--center-crop",
                                    "--gradient-checkpointing",
                                    "--ema-decay",
                                    "0",
                                    "--sample-steps",
                                    "0",
                                    "--validation-fraction",
                                    "0",
                                    "--lr",
                                    "1e-3",
                                    "--lr-scheduler",
                                    "constant",
                                    "--threads",
                                    "1"});
  ASSERT_EQ(trained.code, 0) << trained.err;
  // Tensors of a part that are in both folders; how many of them changed.
  auto changed = [&](const std::string& part) {
    auto before = ReadSafetensors(base / part).tensors,
         after = ReadSafetensors(folder_ / "run" / part).tensors;
    EXPECT_EQ(after.size(), before.size()) << part;
    int count = 0;
    for (const auto& [name, tensor] : before) {
      // New files of CLIP have lost a prefix that ours keep.
      const Tensor& now = after.at(after.contains(name) ? name : "text_model." + name);
      EXPECT_EQ(now.type(), tensor.type()) << name;
      count += std::memcmp(now.raw(), tensor.raw(), static_cast<size_t>(tensor.bytes())) != 0;
    }
    return count;
  };
  EXPECT_EQ(changed("vae/diffusion_pytorch_model.safetensors"), 0);
  EXPECT_EQ(changed("text_encoder/model.safetensors"), 0);
  EXPECT_GT(changed("unet/diffusion_pytorch_model.safetensors"), 50);
  EXPECT_EQ(ParseJson(ReadText(folder_ / "run/model_index.json"))["_class_name"],
            "StableDiffusionPipeline");
  // What other instructions make of a picture has an entry of its own.
  auto entries = [&](const std::string& level, const std::string& out) {
    std::vector<std::string> arguments = Program({"train",
                                                  "--model",
                                                  base,
                                                  "--data",
                                                  folder_ / "pictures",
                                                  "--out",
                                                  folder_ / out,
                                                  "--resolution",
                                                  "32",
                                                  "--batch-size",
                                                  "2",
                                                  "--steps",
                                                  "1",
                                                  "--cache-latents-to-disk",
                                                  "--center-crop",
                                                  "--ema-decay",
                                                  "0",
                                                  "--validation-fraction",
                                                  "0",
                                                  "--threads",
                                                  "1"});
    arguments.insert(arguments.begin(), {"/usr/bin/env", "CALOTYPE_CPU=" + level});
    const ProgramResult result = test::RunProgram(arguments);
    EXPECT_EQ(result.code, 0) << result.err;
    std::set<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder_ / "pictures/.latents")) {
      if (entry.path().extension() == ".safetensors") names.insert(entry.path().filename());
    }
    return names.size();
  };
  const size_t once = entries("native", "native");
  EXPECT_GE(once, 2u);
  EXPECT_EQ(entries("native", "again"), once);
  EXPECT_EQ(entries("x86-64", "oldest"), 2 * once);
  ProgramResult drawn =
      Calotype({"sample", "--model", folder_ / "run", "--prompt", "x", "--steps", "2", "--backend",
                "eager", "--out", folder_ / "x.png", "--threads", "1"});
  EXPECT_EQ(drawn.code, 0) << drawn.err;
}

TEST_F(AppTest, NumbersThatAreNotFiniteAreCode4) {
  ProgramResult result = Calotype(
      Train("run", {"--optimizer", "sgd", "--lr", "1000", "--max-grad-norm", "0", "--steps", "200",
                    "--lr-scheduler", "constant", "--checkpointing-steps", "1"}));
  EXPECT_EQ(result.code, 4);
  EXPECT_THAT(result.err, HasSubstr("not finite"));
  EXPECT_TRUE(ReadLatestCheckpoint(folder_ / "run/checkpoints", {}).has_value());
}

TEST_F(AppTest, AKilledRunContinuesBitForBit) {
  std::vector<std::string> more{"--steps",        "40",  "--checkpointing-steps",         "4",
                                "--batch-size",   "2",   "--gradient-accumulation-steps", "2",
                                "--noise-offset", "0.1", "--input-perturbation",          "0.1",
                                "--snr-gamma",    "5"};
  ASSERT_EQ(Calotype(Train("whole", more)).code, 0);
  TempFolder output;
  pid_t process = test::StartProgram(Program(Train("parts", more)), output);
  WaitForLines("parts", 11);
  kill(process, SIGKILL);
  EXPECT_EQ(test::FinishProgram(process, output).code, 128 + SIGKILL);
  ASSERT_FALSE(ListCheckpoints(folder_ / "parts/checkpoints").empty());
  ProgramResult resumed =
      Calotype({"train", "--out", folder_ / "parts", "--resume", "--threads", "1"});
  ASSERT_EQ(resumed.code, 0) << resumed.err;
  EXPECT_EQ(Weights("parts"), Weights("whole"));
}

TEST_F(AppTest, InterruptionWritesACheckpoint) {
  for (int signal : {SIGINT, SIGTERM}) {
    std::string name = "run" + std::to_string(signal);
    TempFolder output;
    pid_t process = test::StartProgram(
        Program(Train(name, {"--steps", "100000", "--checkpointing-steps", "0"})), output);
    WaitForLines(name, 3);
    kill(process, signal);
    ProgramResult result = test::FinishProgram(process, output);
    EXPECT_EQ(result.code, 128 + signal) << result.err;
    EXPECT_THAT(result.err, HasSubstr("--resume"));
    EXPECT_EQ(ListCheckpoints(folder_ / name / "checkpoints").size(), 1u);
  }
}

TEST_F(AppTest, AContinuedRunKeepsItsOptions) {
  ASSERT_EQ(Calotype(Train("run")).code, 0);
  ProgramResult result =
      Calotype({"train", "--out", folder_ / "run", "--resume", "--learning-rate", "7"});
  EXPECT_EQ(result.code, 2);
  EXPECT_THAT(result.err, HasSubstr("learning_rate"));
  EXPECT_EQ(Calotype(Train("run")).code, 2) << "a run must not be overwritten";
}

TEST_F(AppTest, InfoAndGraph) {
  ASSERT_EQ(Calotype(Train("run")).code, 0);
  ProgramResult model = Calotype({"info", folder_ / "run"});
  EXPECT_THAT(model.out, AllOf(HasSubstr("U-Net"), HasSubstr("squaredcos_cap_v2"),
                               HasSubstr("checkpoint of step 6")));
  // A run without a model folder: of a LoRA, or before its first checkpoint.
  fs::rename(fs::path(folder_ / "run/model_index.json"), fs::path(folder_ / "run/aside.json"));
  EXPECT_THAT(Calotype({"info", folder_ / "run"}).out,
              AllOf(HasSubstr("run of `train`, 6 steps on "), HasSubstr("checkpoint of step 6")));
  json lora = ParseJson(ReadText(folder_ / "run/train.json"));
  lora["lora"] = json::object();
  test::WriteText(folder_ / "run/train.json", JsonText(lora));
  EXPECT_THAT(Calotype({"info", folder_ / "run"}).out, HasSubstr("run of `train lora`, 6 steps"));
  fs::rename(fs::path(folder_ / "run/aside.json"), fs::path(folder_ / "run/model_index.json"));
  ProgramResult tensors =
      Calotype({"info", folder_ / "run/unet/diffusion_pytorch_model.safetensors"});
  EXPECT_THAT(tensors.out, AllOf(HasSubstr("conv_in.weight"), HasSubstr("[8, 3, 3, 3]")));
  ProgramResult text = Calotype({"graph", "--model", folder_ / "run"});
  EXPECT_THAT(text.out, AllOf(HasSubstr("= Conv2d("), HasSubstr("output \"out\"")));
  EXPECT_THAT(
      Calotype({"graph", "--unet", folder_ / "unet.json", "--what", "train", "--format", "dot"})
          .out,
      HasSubstr("digraph"));
  EXPECT_THAT(Calotype({"graph", "--unet", folder_ / "unet.json", "--format", "lowered"}).out,
              HasSubstr("conv_in"));
  EXPECT_EQ(Calotype({"graph", "--what", "dreams"}).code, 2);
}

// A U-Net folder of diffusers on given tensors.
class UNetFolderTest : public AppTest {
 protected:
  UNetFolderTest() {
    golden_ = ReadSafetensors(fixture_ / "tensors.safetensors");
    for (const char* name : {"sample", "timestep", "encoder_hidden_states"})
      inputs_.tensors[name] = golden_.tensors.at(std::string("input.") + name);
  }
  // Runs the program on inputs_.
  ProgramResult Run(const std::vector<std::string>& more = {}) const {
    WriteSafetensors(folder_ / "in.safetensors", inputs_);
    std::vector<std::string> arguments{"unet",
                                       "--model",
                                       fixture_.string(),
                                       "--inputs",
                                       folder_ / "in.safetensors",
                                       "--output",
                                       folder_ / "out.safetensors",
                                       "--threads",
                                       "1"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return Calotype(arguments);
  }
  Tensor Output() const { return ReadSafetensors(folder_ / "out.safetensors").tensors.at("out"); }

  fs::path fixture_ = fs::path(CALOTYPE_TEST_DATA) / "fixtures/unet/sd15-tiny";
  TensorFile golden_, inputs_;
};

TEST_F(UNetFolderTest, GivesTheGoldenOutput) {
  for (const std::vector<std::string>& options : {std::vector<std::string>{"--backend", "eager"},
                                                  {"--backend", "jit"},
                                                  {"--winograd", "off"}}) {
    ProgramResult result = Run(options);
    ASSERT_EQ(result.code, 0) << result.err;
    EXPECT_THAT(result.out, AllOf(HasSubstr("load "), HasSubstr("compile "), HasSubstr("call "),
                                  HasSubstr("peak memory ")));
    Tensor out = Output(), expected = golden_.tensors.at("output.out");
    ASSERT_EQ(out.shape(), expected.shape());
    for (int64_t i = 0; i < out.elements(); ++i)
      ASSERT_NEAR(out.data()[i], expected.data()[i], 2e-5) << options[1];
  }
}

TEST_F(UNetFolderTest, WritesFigures) {
  ASSERT_EQ(Run({"--repeat", "3", "--json", folder_ / "unet.json"}).code, 0);
  json figures = ParseJson(ReadText(folder_ / "unet.json"));
  EXPECT_EQ(figures["calls"], 3);
  EXPECT_EQ(figures["backend"], "jit");
  EXPECT_EQ(figures["winograd"], "auto");
  EXPECT_EQ(figures["threads"], 1);
  for (const char* key : {"load_seconds", "compile_seconds", "median_ms", "fastest_ms",
                          "median_cpu_ms", "flop", "gflops"})
    EXPECT_GT(figures[key].get<double>(), 0) << key;
  EXPECT_LE(figures["fastest_ms"].get<double>(), figures["median_ms"].get<double>());
  // More than the weights, less than the machine.
  EXPECT_GT(figures["peak_memory_bytes"].get<double>(),
            static_cast<double>(fs::file_size(fixture_ / "diffusion_pytorch_model.safetensors")));
  EXPECT_LT(figures["peak_memory_bytes"].get<double>(), 4e9);
}

// A mask that keeps all tokens changes nothing; one that hides all but the first gives what a
// context of that token alone gives.
TEST_F(UNetFolderTest, MasksOfTheContext) {
  ASSERT_EQ(Run().code, 0);
  Tensor whole = Output(), context = inputs_.tensors.at("encoder_hidden_states");
  const int64_t batch = context.shape()[0], tokens = context.shape()[1], width = context.shape()[2];
  auto distance = [](const Tensor& a, const Tensor& b) {
    float largest = 0;
    for (int64_t i = 0; i < a.elements(); ++i)
      largest = std::max(largest, std::abs(a.data()[i] - b.data()[i]));
    return largest;
  };
  Tensor mask = Tensor::Full({batch, tokens}, 1);
  inputs_.tensors["encoder_attention_mask"] = mask;
  ASSERT_EQ(Run().code, 0);
  EXPECT_LE(distance(Output(), whole), 1e-5f);

  for (int64_t i = 0; i < mask.elements(); ++i) mask.data()[i] = i % tokens == 0;
  ProgramResult masked = Run();
  ASSERT_EQ(masked.code, 0) << masked.err;
  Tensor first_only = Output();
  EXPECT_GT(distance(first_only, whole), 1e-4f);
  Tensor first({batch, 1, width});
  for (int64_t b = 0; b < batch; ++b)
    std::copy_n(context.data() + b * tokens * width, width, first.data() + b * width);
  inputs_.tensors.erase("encoder_attention_mask");
  inputs_.tensors["encoder_hidden_states"] = first;
  ASSERT_EQ(Run().code, 0);
  EXPECT_LE(distance(Output(), first_only), 1e-5f);
}

// Class labels of each kind, and timestep_cond.
TEST_F(UNetFolderTest, FurtherInputsGiveTheGoldenOutput) {
  for (const char* name : {"class-ids", "class-steps", "class-vectors"}) {
    fixture_ = fixture_.parent_path() / name;
    golden_ = ReadSafetensors(fixture_ / "tensors.safetensors");
    inputs_.tensors.clear();
    for (const auto& [key, tensor] : golden_.tensors) {
      if (key.starts_with("input.")) inputs_.tensors[key.substr(6)] = tensor;
    }
    EXPECT_EQ(inputs_.tensors.count("timestep_cond"), name == std::string("class-vectors"));
    for (const char* backend : {"eager", "jit"}) {
      ProgramResult result = Run({"--backend", backend});
      ASSERT_EQ(result.code, 0) << result.err;
      const Tensor out = Output(), expected = golden_.tensors.at("output.out");
      ASSERT_EQ(out.shape(), expected.shape());
      for (int64_t i = 0; i < out.elements(); ++i)
        ASSERT_NEAR(out.data()[i], expected.data()[i], 2e-5) << name << " " << backend;
    }
    inputs_.tensors.erase("class_labels");
    ProgramResult missing = Run();
    EXPECT_EQ(missing.code, 2);
    EXPECT_THAT(missing.err, HasSubstr("class_labels are missing"));
  }
}

// The mask of the self-attention does what it does to the layer.
TEST_F(UNetFolderTest, MaskOfThePixels) {
  fixture_ = fixture_.parent_path() / "residuals-masks";
  golden_ = ReadSafetensors(fixture_ / "tensors.safetensors");
  inputs_.tensors.clear();
  std::vector<Tensor> inputs;
  for (const char* name :
       {"sample", "timestep", "encoder_hidden_states", "encoder_attention_mask", "attention_mask"})
    inputs.push_back(inputs_.tensors[name] = golden_.tensors.at(std::string("input.") + name));
  auto unet = LoadUNet(fixture_);
  unet->SetTrainingMode(false);
  const Tensor expected = unet->Forward(inputs)[0];
  inputs.pop_back();
  const Tensor unmasked = unet->Forward(inputs)[0];
  const ProgramResult result = Run({"--backend", "eager"});
  ASSERT_EQ(result.code, 0) << result.err;
  const Tensor out = Output();
  float difference = 0;
  for (int64_t i = 0; i < out.elements(); ++i) {
    ASSERT_NEAR(out.data()[i], expected.data()[i], 1e-6);
    difference = std::max(difference, std::abs(out.data()[i] - unmasked.data()[i]));
  }
  EXPECT_GT(difference, 1e-4f);
}

TEST_F(UNetFolderTest, WrongInputsAndOptionsAreNamed) {
  EXPECT_EQ(Run({"--winograd", "maybe"}).code, 2);
  EXPECT_EQ(Run({"--backend", "gpu"}).code, 2);
  EXPECT_EQ(Run({"--repeat", "0"}).code, 2);
  inputs_.tensors["sampel"] = Tensor::Zeros({1});
  ProgramResult unknown = Run();
  EXPECT_EQ(unknown.code, 3);
  EXPECT_THAT(unknown.err, AllOf(HasSubstr("sampel"), HasSubstr("encoder_attention_mask")));
  inputs_.tensors.erase("sampel");
  inputs_.tensors["sample"] = Tensor::Zeros({1, 3, 8, 8});
  ProgramResult shape = Run();
  EXPECT_EQ(shape.code, 2);
  EXPECT_THAT(shape.err, AllOf(HasSubstr("sample [1, 3, 8, 8]"), HasSubstr("[B, 4, H, W]")));
  inputs_.tensors.erase("sample");
  ProgramResult missing = Run();
  EXPECT_EQ(missing.code, 3);
  EXPECT_THAT(missing.err, HasSubstr("\"sample\" is missing"));
}

TEST_F(UNetFolderTest, CallsOnDemand) {
  WriteSafetensors(folder_ / "in.safetensors", inputs_);
  auto run = [&](const std::string& commands) {
    return test::RunProgram({"/bin/sh", "-c",
                             "printf '" + commands + "' | " + CALOTYPE_BIN_DIR +
                                 "/calotype unet --on-demand --model " + fixture_.string() +
                                 " --threads 1 --inputs " + (folder_ / "in.safetensors").string() +
                                 " --output " + (folder_ / "out.safetensors").string()});
  };
  ProgramResult result = run("run 0\\nrun 0.01\\n");
  ASSERT_EQ(result.code, 0) << result.err;
  std::istringstream lines(result.out);
  std::vector<json> answers;
  for (std::string line; std::getline(lines, line);) answers.push_back(ParseJson(line));
  ASSERT_EQ(answers.size(), 3u);
  EXPECT_EQ(answers[0]["calls"], 1);
  EXPECT_EQ(answers[1]["ms"].size(), 1u);
  EXPECT_EQ(answers[2]["ms"].size(), answers[2]["cpu_ms"].size());
  EXPECT_EQ(run("walk 3\\n").code, 2);
}

TEST_F(AppTest, TheOpTableIsUpToDate) {
  EXPECT_EQ(ReadText(fs::path(CALOTYPE_SOURCE_DIR) / "docs/ops.md"),
            Calotype({"info", "--ops"}).out)
      << "run: build/bin/calotype info --ops > docs/ops.md";
}

TEST_F(AppTest, EmojiFolder) {
  ProgramResult result = Calotype({"data", "emoji", "--out", folder_ / "emoji", "--size", "8"});
  ASSERT_EQ(result.code, 0) << result.err;
  std::string lines = ReadText(folder_ / "emoji/metadata.jsonl");
  EXPECT_GT(std::count(lines.begin(), lines.end(), '\n'), 1800);
  EXPECT_THAT(lines, HasSubstr("grinning face"));
  EXPECT_EQ(Calotype({"data", "emoji", "--out", folder_ / "x", "--font", folder_ / "no.ttf"}).code,
            3);
}

TEST_F(AppTest, Bench) {
  ProgramResult result = Calotype({"bench", "--unet", folder_ / "unet.json", "--batch", "1",
                                   "--seconds", "0.01", "--train", "--threads", "1"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("FMA peak"), HasSubstr("unet"), HasSubstr("train"),
                                HasSubstr("jit ms"), Not(HasSubstr("CPU ms"))));
}

TEST_F(AppTest, BenchWritesFiguresProfileAndTrace) {
  ProgramResult result =
      Calotype({"bench", "--unet", folder_ / "unet.json", "--batch", "2", "--seconds", "0",
                "--threads", "2", "--winograd", "off", "--profile", "--json",
                folder_ / "bench.json", "--trace", folder_ / "trace.json"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("CPU ms"), HasSubstr("contraction")));
  json report = ParseJson(ReadText(folder_ / "bench.json"));
  EXPECT_EQ(report["threads"], 2);
  EXPECT_EQ(report["winograd"], "off");
  double peak = 0;
  for (const json& entry : report["peaks"]) {
    if (entry["threads"] == 2) peak = std::max(peak, entry["gflops"].get<double>());
  }
  EXPECT_GT(peak, 0);
  EXPECT_EQ(report["peak_gflops"], peak);
  ASSERT_EQ(report["rows"].size(), 1u);
  const json& row = report["rows"][0];
  EXPECT_EQ(row["what"], "unet");
  EXPECT_EQ(row["batch"], 2);
  for (const char* key : {"flop", "eager_ms", "eager_cpu_ms", "jit_ms", "jit_cpu_ms",
                          "compile_seconds", "arena_bytes", "packed_bytes"})
    EXPECT_GT(row[key].get<double>(), 0) << key;
  EXPECT_LE(row["max_rel_difference"].get<double>(), 2e-5);
  double eager = row["eager_ms"], jit = row["jit_ms"], flop = row["flop"];
  EXPECT_NEAR(row["ratio"].get<double>(), eager / jit, 1e-9);
  EXPECT_NEAR(row["jit_percent_of_peak"].get<double>(), 1e-4 * flop / jit / peak, 1e-9);

  // The profile: shares sum to 100 %, slowest first.
  double percent = 0, last = 1e30;
  std::map<int, json> steps;
  for (const json& step : row["steps"]) {
    percent += step["percent_of_time"].get<double>();
    EXPECT_LE(step["ms"].get<double>(), last);
    last = step["ms"];
    EXPECT_FALSE(step["kind"].get<std::string>().empty());
    EXPECT_NEAR(step["gflops"].get<double>(),
                1e-6 * step["flop"].get<double>() / step["ms"].get<double>(), 1e-9);
    EXPECT_TRUE(steps.emplace(step["step"], step).second);
  }
  EXPECT_NEAR(percent, 100, 1e-6);

  // The trace: each step is there, as many chunks as it has, inside the process of the row.
  json trace = ParseJson(ReadText(folder_ / "trace.json"));
  std::map<int, int64_t> chunks;
  int names = 0;
  for (const json& event : trace["traceEvents"]) {
    EXPECT_EQ(event["pid"], 1);
    names += event["ph"] == "M" && event["name"] == "process_name";
    if (event["ph"] != "X") continue;
    EXPECT_GE(event["ts"].get<double>(), 0);
    EXPECT_GE(event["dur"].get<double>(), 0);
    EXPECT_LT(event["tid"].get<int>(), 2);
    int step = event["args"]["step"];
    ASSERT_TRUE(steps.contains(step));
    EXPECT_EQ(event["name"], steps[step]["label"]);
    chunks[step] += event["args"]["chunks"].get<int64_t>();
  }
  EXPECT_EQ(names, 1);
  EXPECT_EQ(chunks.size(), steps.size());
  for (const auto& [step, count] : chunks) EXPECT_EQ(steps[step]["chunks"], count) << step;
}

TEST_F(AppTest, BenchOfKernels) {
  ProgramResult result = Calotype({"bench", "--kernels", "--only", "cross-attention", "--seconds",
                                   "0", "--threads", "1", "--json", folder_ / "bench.json"});
  ASSERT_EQ(result.code, 0) << result.err;
  json report = ParseJson(ReadText(folder_ / "bench.json"));
  ASSERT_EQ(report["rows"].size(), 1u);
  EXPECT_EQ(report["rows"][0]["what"], "kernel");
  EXPECT_EQ(report["rows"][0]["flop"], 2.0 * 2 * 8 * 4096 * 77 * 40);
  EXPECT_FALSE(report["rows"][0].contains("steps"));

  ProgramResult nothing = Calotype({"bench", "--kernels", "--only", "no such kernel"});
  EXPECT_EQ(nothing.code, 2);
  EXPECT_THAT(nothing.err, HasSubstr("no such kernel"));
  EXPECT_EQ(Calotype({"bench", "--winograd", "sometimes"}).code, 2);
  EXPECT_EQ(Calotype({"bench", "--model", folder_ / "nothing"}).code, 3);
}

// The demo's whole way with a few steps; its figures are those of the real one only with the
// defaults.
TEST_F(AppTest, DemoWritesEverything) {
  ProgramResult result = Calotype({"demo", "--out", folder_ / "demo", "--steps", "2",
                                   "--sampling-steps", "2", "--seeds-per-caption", "1", "--quiet"});
  ASSERT_EQ(result.code, 0) << result.err;
  json summary = ParseJson(ReadText(folder_ / "demo/summary.json"));
  EXPECT_EQ(ParseJson(result.out), summary);
  for (const char* key : {"caption_accuracy", "caption_accuracy_shape", "caption_accuracy_color",
                          "caption_accuracy_size", "caption_accuracy_background", "train_seconds",
                          "steps", "final_loss", "compile_seconds", "eager_ms_b1", "jit_ms_b1",
                          "eager_ms_b64", "jit_ms_b64", "max_rel_difference"}) {
    ASSERT_TRUE(summary.contains(key) && summary[key].is_number()) << key;
  }
  EXPECT_EQ(summary["steps"], 2);
  EXPECT_LE(summary["max_rel_difference"].get<double>(), 2e-5);
  std::vector<PngText> texts;
  ReadPng(folder_ / "demo/pictures/caption-95-seed-0.png", &texts);
  ASSERT_EQ(texts.size(), 1u);
  EXPECT_THAT(texts[0].text, HasSubstr(ShapeCaption(95)));
  EXPECT_GT(ReadPng(folder_ / "demo/grid.png").width, 16);

  // The folder is not trained over, but an interrupted demo continues.
  std::vector<std::string> again{"demo",
                                 "--out",
                                 folder_ / "demo",
                                 "--steps",
                                 "2",
                                 "--sampling-steps",
                                 "2",
                                 "--seeds-per-caption",
                                 "1",
                                 "--quiet"};
  ProgramResult refused = Calotype(again);
  EXPECT_EQ(refused.code, 2);
  EXPECT_THAT(refused.err, HasSubstr("--resume"));
  fs::remove(folder_ / "demo/summary.json");
  again.push_back("--resume");
  ProgramResult resumed = Calotype(again);
  ASSERT_EQ(resumed.code, 0) << resumed.err;
  json second = ParseJson(ReadText(folder_ / "demo/summary.json"));
  for (const char* key : {"caption_accuracy", "steps", "final_loss"})
    EXPECT_EQ(second[key], summary[key]) << key;
}

}  // namespace
}  // namespace calotype
