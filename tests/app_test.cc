// The program as a user meets it: commands, files, exit codes, interruption.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "io/checkpoint.h"
#include "io/image_folder.h"
#include "io/png.h"
#include "io/safetensors.h"
#include "io/shapes.h"
#include "tests/run_program.h"
#include "tests/tiny_unet.h"

namespace calotype {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::ProgramResult;
using testing::ReadText;

std::vector<std::string> Program(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), std::string(CALOTYPE_BIN_DIR) + "/calotype");
  return arguments;
}

ProgramResult Calotype(std::vector<std::string> arguments) {
  return testing::RunProgram(Program(std::move(arguments)));
}

class AppTest : public ::testing::Test {
 protected:
  AppTest() { folder_.Write("unet.json", testing::kTinyUNet); }

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
    return ReadText(folder_.path / name / "unet/diffusion_pytorch_model.safetensors") +
           ReadText(folder_.path / name / "caption_encoder/model.safetensors");
  }
  // Waits until the metrics of a run have `lines` lines.
  void WaitForLines(const std::string& name, int64_t lines) const {
    for (int i = 0; i < 6000; ++i) {
      std::string text = ReadText(folder_.path / name / "metrics.jsonl");
      if (std::count(text.begin(), text.end(), '\n') >= lines) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    FAIL() << "the run did not start within a minute";
  }
  // A folder with `count` captioned pictures.
  void WritePictures(const std::string& name, int count) const {
    fs::create_directories(folder_.path / name);
    std::string lines;
    for (int i = 0; i < count; ++i) {
      std::string file = std::to_string(i) + ".png";
      WritePng(folder_.path / name / file, TensorToImage(RenderShape(i, 0, 0)));
      lines += ImageFolderLine(file, ShapeCaption(i));
    }
    folder_.Write(fs::path(name) / "metadata.jsonl", lines);
  }

  testing::TemporaryFolder folder_;
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
  EXPECT_THAT(message({"demo", "--out", folder_ / "demo", "--optimizer", "lion"}),
              HasSubstr("lion"));
}

TEST_F(AppTest, UnknownFieldsOfAConfigAreNamed) {
  folder_.Write("bad.json", R"({"sample_size": 16, "colour": "red"})");
  ProgramResult result = Calotype(Train("run", {"--unet", folder_ / "bad.json"}));
  EXPECT_EQ(result.code, 2);
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
  fs::path weights = folder_.path / "run/unet/diffusion_pytorch_model.safetensors";
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
  fs::create_directories(folder_.path / "empty");
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
  EXPECT_TRUE(fs::exists(folder_.path / "run/samples/step-00000006.png"));
  std::istringstream lines(ReadText(folder_.path / "run/metrics.jsonl"));
  int steps = 0;
  for (std::string line; std::getline(lines, line);) {
    json record = json::parse(line);
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

  // Several pictures: numbered names; the same seed gives the same picture; eager is close.
  ProgramResult several =
      Calotype({"sample", "-m", folder_ / "run", "-p", "a large blue cross on a gray background",
                "--steps", "3", "--guidance-scale", "2", "--seed", "6", "--count", "2", "--out",
                folder_ / "many.png", "--backend", "eager", "--threads", "1"});
  ASSERT_EQ(several.code, 0) << several.err;
  Image second = ReadPng(folder_ / "many-001.png");
  ASSERT_EQ(second.rgb.size(), image.rgb.size());
  for (size_t i = 0; i < image.rgb.size(); ++i) ASSERT_NEAR(second.rgb[i], image.rgb[i], 1);
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

TEST_F(AppTest, NumbersThatAreNotFiniteAreCode4) {
  ProgramResult result = Calotype(
      Train("run", {"--optimizer", "sgd", "--lr", "1000", "--max-grad-norm", "0", "--steps", "200",
                    "--lr-scheduler", "constant", "--checkpointing-steps", "1"}));
  EXPECT_EQ(result.code, 4);
  EXPECT_THAT(result.err, HasSubstr("not finite"));
  EXPECT_TRUE(ReadLatestCheckpoint(folder_.path / "run/checkpoints", {}).has_value());
}

TEST_F(AppTest, AKilledRunContinuesBitForBit) {
  std::vector<std::string> more{"--steps", "40", "--checkpointing-steps", "4"};
  ASSERT_EQ(Calotype(Train("whole", more)).code, 0);
  testing::TemporaryFolder output;
  pid_t process = testing::StartProgram(Program(Train("parts", more)), output);
  WaitForLines("parts", 11);
  kill(process, SIGKILL);
  EXPECT_EQ(testing::FinishProgram(process, output).code, 128 + SIGKILL);
  ASSERT_FALSE(ListCheckpoints(folder_.path / "parts/checkpoints").empty());
  ProgramResult resumed =
      Calotype({"train", "--out", folder_ / "parts", "--resume", "--threads", "1"});
  ASSERT_EQ(resumed.code, 0) << resumed.err;
  EXPECT_EQ(Weights("parts"), Weights("whole"));
}

TEST_F(AppTest, InterruptionWritesACheckpoint) {
  for (int signal : {SIGINT, SIGTERM}) {
    std::string name = "run" + std::to_string(signal);
    testing::TemporaryFolder output;
    pid_t process = testing::StartProgram(
        Program(Train(name, {"--steps", "100000", "--checkpointing-steps", "0"})), output);
    WaitForLines(name, 3);
    kill(process, signal);
    ProgramResult result = testing::FinishProgram(process, output);
    EXPECT_EQ(result.code, 128 + signal) << result.err;
    EXPECT_THAT(result.err, HasSubstr("--resume"));
    EXPECT_EQ(ListCheckpoints(folder_.path / name / "checkpoints").size(), 1u);
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

// A U-Net folder of diffusers on given tensors, against the golden output.
TEST_F(AppTest, UNetFolder) {
  fs::path fixture = fs::path(CALOTYPE_TEST_DATA) / "fixtures/unet/sd15-tiny";
  TensorFile golden = ReadSafetensors(fixture / "tensors.safetensors"), inputs;
  for (const char* name : {"sample", "timestep", "encoder_hidden_states"})
    inputs.tensors[name] = golden.tensors.at(std::string("input.") + name);
  WriteSafetensors(folder_ / "in.safetensors", inputs);
  for (const char* backend : {"eager", "jit"}) {
    ProgramResult result =
        Calotype({"unet", "--model", fixture.string(), "--inputs", folder_ / "in.safetensors",
                  "--output", folder_ / "out.safetensors", "--backend", backend, "--threads", "1"});
    ASSERT_EQ(result.code, 0) << result.err;
    Tensor out = ReadSafetensors(folder_ / "out.safetensors").tensors.at("out"),
           expected = golden.tensors.at("output.out");
    ASSERT_EQ(out.shape(), expected.shape());
    for (int64_t i = 0; i < out.elements(); ++i)
      ASSERT_NEAR(out.data()[i], expected.data()[i], 2e-5) << backend;
  }
}

TEST_F(AppTest, TheOpTableIsUpToDate) {
  EXPECT_EQ(ReadText(fs::path(CALOTYPE_SOURCE_DIR) / "docs/ops.md"),
            Calotype({"info", "--ops"}).out)
      << "run: build/bin/calotype info --ops > docs/ops.md";
}

TEST_F(AppTest, EmojiFolder) {
  ProgramResult result = Calotype({"data", "emoji", "--out", folder_ / "emoji", "--size", "8"});
  ASSERT_EQ(result.code, 0) << result.err;
  std::string lines = ReadText(folder_.path / "emoji/metadata.jsonl");
  EXPECT_GT(std::count(lines.begin(), lines.end(), '\n'), 1800);
  EXPECT_THAT(lines, HasSubstr("grinning face"));
  EXPECT_EQ(Calotype({"data", "emoji", "--out", folder_ / "x", "--font", folder_ / "no.ttf"}).code,
            3);
}

TEST_F(AppTest, Bench) {
  ProgramResult result = Calotype({"bench", "--unet", folder_ / "unet.json", "--batch", "1",
                                   "--seconds", "0.01", "--train", "--threads", "1"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("unet"), HasSubstr("train"), HasSubstr("jit ms")));
}

// The demo's whole way with a few steps; its figures are those of the real one only with the
// defaults.
TEST_F(AppTest, DemoWritesEverything) {
  ProgramResult result = Calotype({"demo", "--out", folder_ / "demo", "--steps", "2",
                                   "--sampling-steps", "2", "--seeds-per-caption", "1", "--quiet"});
  ASSERT_EQ(result.code, 0) << result.err;
  json summary = json::parse(ReadText(folder_.path / "demo/summary.json"));
  EXPECT_EQ(json::parse(result.out), summary);
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
}

}  // namespace
}  // namespace calotype
