// Training of larger models: on the latents of a frozen autoencoder, and with gradient
// checkpointing.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>

#include "graph/functions.h"
#include "graph/interpreter.h"
#include "graph/passes.h"
#include "io/checkpoint.h"
#include "io/image_folder.h"
#include "io/png.h"
#include "jit/compile.h"
#include "models/presets.h"
#include "pipelines/latent_dataset.h"
#include "pipelines/model_graphs.h"
#include "pipelines/trainer.h"
#include "tests/expect_error.h"
#include "tests/random_image.h"
#include "tests/tiny_stable_diffusion.h"
#include "tests/trainer_fixture.h"

namespace calotype {
namespace {

namespace fs = std::filesystem;
using test::Losses;
using test::ReadText;
using test::TrainerTest;
using ::testing::HasSubstr;

class LatentTrainerTest : public TrainerTest {
 protected:
  LatentTrainerTest() {
    test::TinyStableDiffusion()->Save(Folder("base"));
    options_.model = Folder("base");
    options_.unet = TrainOptions().unet;
    options_.train_batch_size = 4;
    options_.gradient_accumulation_steps = 2;
  }
  // Three in the folder data.
  void WritePictures() {
    std::string text;
    for (int i = 0; i < 3; ++i) text += ImageFolderLine(fmt::format("{}.png", i), "a picture");
    folder_.Write("data/metadata.jsonl", text);
    Random random(1);
    for (int i = 0; i < 3; ++i)
      WritePng(folder_ / fmt::format("data/{}.png", i), test::RandomImage(16, 16, random));
  }
  // What three pictures of the folder data give with the cache `disk`, and how many of them were
  // encoded.
  std::pair<int64_t, std::string> Draw(DiffusionModel& model, const fs::path& disk,
                                       Backend backend = Backend::kEager) {
    ImageFolder pictures(folder_ / "data", {.side = 16}, {});
    LatentDataset latents(pictures, model, backend, /*cache=*/true, disk,
                          [this](const std::string& text) { warnings_ += text + "\n"; });
    Random random(7);
    const Tensor drawn = latents.images(std::vector<int64_t>{0, 1, 2, 0}, random);
    return {latents.encoded(), std::string(reinterpret_cast<const char*>(drawn.raw()),
                                           static_cast<size_t>(drawn.bytes()))};
  }
  static std::vector<fs::path> Entries(const fs::path& disk) {
    std::vector<fs::path> entries;
    for (const auto& entry : fs::directory_iterator(disk)) {
      if (entry.path().extension() == ".safetensors") entries.push_back(entry.path());
    }
    return entries;
  }

  std::string warnings_;
};

// The latents of two draws against the autoencoder called as a layer.
TEST_F(LatentTrainerTest, LatentsAreSamplesOfTheAutoencoder) {
  auto model = DiffusionModel::Load(Folder("base"));
  WritePictures();
  ImageFolder pictures(folder_ / "data", {.side = 16}, {});
  LatentDataset drawn(pictures, *model, Backend::kEager, /*cache=*/false),
      cached(pictures, *model, Backend::kEager, /*cache=*/true);
  EXPECT_EQ(cached.side(), 8);
  EXPECT_EQ(cached.channels(), 4);
  const std::vector<int64_t> indices{2, 0, 2};
  Random a(7), b(7), c(7);
  Tensor first = drawn.images(indices, a), second = cached.images(indices, b),
         third = cached.images(indices, b);
  EXPECT_EQ(cached.cached(), 2);
  EXPECT_EQ(std::memcmp(first.raw(), second.raw(), static_cast<size_t>(first.bytes())), 0);
  EXPECT_NE(std::memcmp(first.raw(), third.raw(), static_cast<size_t>(first.bytes())), 0);
  model->SetTrainingMode(false);
  for (int64_t k = 0; k < 3; ++k) {
    Random none(0);
    Tensor x = pictures.image(indices[static_cast<size_t>(k)], none).Reshape({1, 3, 16, 16});
    std::vector<Tensor> inputs{x};
    std::vector<Tensor> outputs = model->vae()->Forward(inputs);  // picture, mean, logvar
    c.Uniform(), c.Uniform();                                     // what the folder draws
    for (int64_t i = 0; i < 256; ++i) {
      double z = outputs[1].data()[i] + std::exp(0.5 * outputs[2].data()[i]) * c.Normal();
      EXPECT_NEAR(first.data()[256 * k + i], 0.5 * z, 1e-5);
    }
  }
}

TEST_F(LatentTrainerTest, OnlyTheUNetTrainsAndTheFolderLoads) {
  auto data = OpenDataset(options_, {});
  TrainResult result = Train("run");
  EXPECT_EQ(result.steps, 12);
  auto before = DiffusionModel::Load(Folder("base")), after = DiffusionModel::Load(Folder("run"));
  std::map<std::string, Tensor> old = before->SaveParameters();
  int64_t changed = 0;
  for (const auto& [name, value] : after->SaveParameters()) {
    bool same =
        std::memcmp(value.raw(), old.at(name).raw(), static_cast<size_t>(value.bytes())) == 0;
    changed += !same;
    EXPECT_TRUE(same || name.rfind("unet.", 0) == 0) << name;
  }
  EXPECT_GT(changed, 50);
  EXPECT_EQ(ReadText(Folder("run") / "tokenizer/vocab.json"), test::TinyVocabulary().vocab);
  auto checkpoint = ReadLatestCheckpoint(Folder("run") / "checkpoints", {});
  for (const auto& [name, value] : checkpoint->tensors)
    EXPECT_THAT(name, HasSubstr("unet.")) << "frozen";
}

TEST_F(LatentTrainerTest, EmbeddedBeforeOrInTheStepIsTheSame) {
  auto model = DiffusionModel::Load(Folder("base"));
  const std::vector<std::string> captions{"a cat", "", "a cat"};
  Tensor tokens = model->Tokens(captions, {});
  Tensor table = EmbedTokens(*model, tokens, Backend::kEager);
  ComputationGraph graph = EncoderGraph(*model, 3);
  std::vector<Tensor> inputs{tokens};
  Tensor expected = Interpreter(graph).Run(inputs)[0];
  ASSERT_EQ(table.shape(), expected.shape());
  for (int64_t i = 0; i < table.elements(); ++i)
    ASSERT_NEAR(table.data()[i], expected.data()[i], 1e-6);
}

TEST_F(LatentTrainerTest, ContinuesBitForBitCompiledFollowsAndCachesChangeNothing) {
  SwitchOnTheRecipe();
  Train("whole");
  Train("parts");
  fs::remove(CheckpointPath(Folder("parts") / "checkpoints", 12));  // 10 stays
  Train("parts", true);
  auto unet = [&](const char* run) {
    return ReadText(Folder(run) / "unet/diffusion_pytorch_model.safetensors");
  };
  EXPECT_EQ(unet("parts"), unet("whole"));
  EXPECT_EQ(Metrics("parts"), Metrics("whole"));

  options_.max_train_steps = 3;
  Train("eager");
  options_.backend = "jit";
  Train("jit");
  std::vector<double> eager = Losses(Metrics("eager"), "loss"),
                      jit = Losses(Metrics("jit"), "loss");
  ASSERT_EQ(eager.size(), 3u);
  ASSERT_EQ(jit.size(), 3u);
  for (size_t i = 0; i < 3; ++i) EXPECT_NEAR(jit[i], eager[i], 1e-4 * eager[i]);
}

TEST_F(LatentTrainerTest, ANewUNetOnTheLatentsOfAGivenAutoencoder) {
  options_.model.clear();
  options_.unet = folder_ / "unet.json";
  options_.vae = Folder("base") / "vae";
  Train("run");
  auto model = DiffusionModel::Load(Folder("run"));
  ASSERT_NE(model->vae(), nullptr);
  EXPECT_EQ(model->channels(), 4);
  EXPECT_EQ(model->side(), 16);
  EXPECT_EQ(ReadText(Folder("run") / "vae/diffusion_pytorch_model.safetensors"),
            ReadText(Folder("base") / "vae/diffusion_pytorch_model.safetensors"));
}

TEST_F(LatentTrainerTest, PicturesThatVaryAreNotCached) {
  options_.cache_latents = true;
  EXPECT_THAT(MessageOf<ValueError>([&] { Train("run"); }), HasSubstr("cache_latents"));
  EXPECT_FALSE(fs::exists(Folder("run")));
}

TEST_F(LatentTrainerTest, LatentsOnDiskAreThoseOfTheAutoencoder) {
  auto model = DiffusionModel::Load(Folder("base"));
  WritePictures();
  const fs::path disk = folder_ / "data/.latents";
  const auto [encoded, expected] = Draw(*model, "");
  EXPECT_EQ(encoded, 3);
  EXPECT_EQ(Draw(*model, disk), std::pair(int64_t{3}, expected));
  EXPECT_EQ(Draw(*model, disk), std::pair(int64_t{0}, expected));
  ASSERT_EQ(Entries(disk).size(), 3u);

  // Damaged entries are computed anew and put right.
  const std::string whole = ReadText(Entries(disk)[0]);
  std::string turned = whole;
  turned[turned.size() - 7] ^= 4;
  for (const std::string& bytes :
       {std::string(), whole.substr(0, 9), whole.substr(0, whole.size() - 1), turned,
        whole + "more", ReadText(Entries(disk)[1])}) {
    warnings_.clear();
    test::WriteText(Entries(disk)[0], bytes);
    EXPECT_EQ(Draw(*model, disk), std::pair(int64_t{1}, expected)) << bytes.size();
    EXPECT_THAT(warnings_, HasSubstr(Entries(disk)[0].filename().string()));
    EXPECT_THAT(warnings_, HasSubstr("computed anew"));
    EXPECT_EQ(ReadText(Entries(disk)[0]), whole);
  }
  warnings_.clear();

  // What has changed has another name: the backend, eagerly the threads, a picture, the
  // autoencoder.
  EXPECT_EQ(Draw(*model, disk, Backend::kJit).first, 3);
  SetThreads(2);
  EXPECT_EQ(Draw(*model, disk, Backend::kJit).first, 0);
  EXPECT_EQ(Draw(*model, disk).first, 3);
  SetThreads(1);
  EXPECT_EQ(Draw(*model, disk).first, 0);
  Random random(2);
  WritePng(folder_ / "data/1.png", test::RandomImage(16, 16, random));
  EXPECT_EQ(Draw(*model, disk).first, 1);
  EXPECT_EQ(Draw(*model, disk), std::pair(int64_t{0}, Draw(*model, "").second));
  model->vae()->FindParameter("quant_conv.bias")->Write().data()[0] += 0.5f;
  const auto other = Draw(*model, disk);
  EXPECT_EQ(other.first, 3);
  EXPECT_EQ(other.second, Draw(*model, "").second);
  EXPECT_EQ(warnings_, "");
  EXPECT_EQ(ImageFolder(folder_ / "data", {.side = 16, .caption = "x"}, {}).size(), 3);
}

TEST_F(LatentTrainerTest, CachesChangeNoWeight) {
  WritePictures();
  options_.data = folder_ / "data";
  options_.validation_fraction = 0;
  options_.max_train_steps = 2;
  Train("plain");
  options_.cache_latents = true;
  Train("memory");
  options_.cache_latents = false;
  options_.cache_latents_to_disk = true;
  Train("disk");
  EXPECT_EQ(Entries(folder_ / "data/.latents").size(), 3u);
  Train("again");
  EXPECT_EQ(Entries(folder_ / "data/.latents").size(), 3u);
  auto unet = [&](const char* run) {
    return ReadText(Folder(run) / "unet/diffusion_pytorch_model.safetensors");
  };
  for (const char* run : {"memory", "disk", "again"}) EXPECT_EQ(unet(run), unet("plain")) << run;

  fs::remove_all(folder_ / "data/.latents");
  test::WriteText(folder_ / "data/.latents", "no folder");
  EXPECT_THAT(MessageOf<FileError>([&] { Train("blocked"); }), HasSubstr("data/.latents"));
  EXPECT_FALSE(fs::exists(Folder("blocked")));
  options_.data = "shapes";
  EXPECT_THAT(MessageOf<ValueError>([&] { Train("shapes"); }),
              HasSubstr("cache_latents_to_disk has no effect without a folder of pictures"));
}

// --- Gradient checkpointing.

class RecomputeTest : public ::testing::Test {
 protected:
  RecomputeTest() : unet_(UNetPreset("toy16")) {
    unet_.Initialize(1);
    for (const ParameterPtr& p : unet_.NamedParameters()) parameters_.push_back(p);
  }
  // The gradients of a loss for all parameters.
  ComputationGraph Graph(bool recompute) {
    unet_.EnableGradientCheckpointing(recompute);
    ComputationGraph graph;
    Value sample = graph.Input("sample", Shape{4, 3, 16, 16});
    Value timestep = graph.Input("timestep", {DType::kI64, {4}});
    Value context = graph.Input("context", Shape{4, 8, unet_.config().cross_attention_dim[0]});
    std::vector<Value> outputs{Mean(Square(unet_.Call({sample, timestep, context})))},
        ones{Value{}};
    std::vector<Value> wrt;
    for (const ParameterPtr& p : parameters_) wrt.push_back(graph.ParameterLeaf(p));
    graph.Output("loss", outputs[0]);
    std::vector<Value> gradients = Gradients(outputs, ones, wrt);
    for (size_t i = 0; i < wrt.size(); ++i) graph.Output(parameters_[i]->name(), gradients[i]);
    return graph;
  }
  static std::vector<Tensor> Inputs(int64_t width) {
    Random random(2);
    return {random.NormalTensor({4, 3, 16, 16}),
            Tensor::From({4}, std::vector<int64_t>{1, 200, 500, 990}),
            random.NormalTensor({4, 8, width})};
  }
  UNet2DConditionModel unet_;
  std::vector<ParameterPtr> parameters_;
};

TEST_F(RecomputeTest, SameGradientsInLessMemory) {
  std::vector<Tensor> inputs = Inputs(unet_.config().cross_attention_dim[0]);
  ComputationGraph plain = Optimize(Graph(false)), again = Optimize(Graph(true));
  EXPECT_GT(again.nodes().size(), plain.nodes().size());
  Interpreter keeps(plain), computes(again);
  std::vector<Tensor> expected = keeps.Run(inputs), found = computes.Run(inputs);
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i) {
    EXPECT_EQ(
        std::memcmp(found[i].raw(), expected[i].raw(), static_cast<size_t>(expected[i].bytes())), 0)
        << again.outputs()[i].name;
  }
  // Of both peaks the gradients themselves are a part.
  int64_t gradients = 0;
  for (const Tensor& g : found) gradients += g.bytes();
  RecordProperty("eager_bytes", fmt::format("{}", keeps.PeakBytes()));
  RecordProperty("eager_bytes_recompute", fmt::format("{}", computes.PeakBytes()));
  fmt::print("activations, eager: {} bytes, recomputed {}\n", keeps.PeakBytes() - gradients,
             computes.PeakBytes() - gradients);
  EXPECT_LT(computes.PeakBytes() - gradients, 0.6 * (keeps.PeakBytes() - gradients));
}

TEST_F(RecomputeTest, CompiledToo) {
  std::vector<Tensor> inputs = Inputs(unet_.config().cross_attention_dim[0]);
  auto plain = jit::Compile(Graph(false)), again = jit::Compile(Graph(true));
  std::vector<Tensor> expected = plain->Run(inputs), found = again->Run(inputs);
  for (size_t i = 0; i < found.size(); ++i) {
    double largest = 0, difference = 0;
    for (int64_t k = 0; k < found[i].elements(); ++k) {
      largest = std::max<double>(largest, std::abs(expected[i].data()[k]));
      difference =
          std::max<double>(difference, std::abs(found[i].data()[k] - expected[i].data()[k]));
    }
    EXPECT_LE(difference, 5e-5 * largest) << i;
  }
  fmt::print("activations, compiled: {} bytes, recomputed {}\n", plain->Stats().arena_bytes,
             again->Stats().arena_bytes);
  EXPECT_LT(again->Stats().arena_bytes, 0.6 * plain->Stats().arena_bytes);
}

TEST_F(RecomputeTest, LayersKeepLess) {
  std::vector<Tensor> inputs = Inputs(unet_.config().cross_attention_dim[0]);
  auto run = [&](bool recompute) {
    unet_.EnableGradientCheckpointing(recompute);
    unet_.Forward(inputs);
    std::string kept = unet_.GetDiagnostics().at("layer.kept_bytes");
    unet_.Backward(inputs[0]);
    return std::make_pair(kept, unet_.GetParameterGradients());
  };
  auto [all, expected] = run(false);
  auto [less, found] = run(true);
  EXPECT_EQ(std::memcmp(found.raw(), expected.raw(), static_cast<size_t>(found.bytes())), 0);
  EXPECT_LT(std::stod(less), 0.4 * std::stod(all));
}

}  // namespace
}  // namespace calotype
