// Custom Diffusion: its files, its data, its training and its commands.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "core/parallel.h"
#include "core/random.h"
#include "graph/interpreter.h"
#include "io/image_folder.h"
#include "io/png.h"
#include "pipelines/custom_diffusion.h"
#include "pipelines/custom_diffusion_dataset.h"
#include "pipelines/custom_diffusion_training.h"
#include "pipelines/lora_training.h"
#include "pipelines/rows.h"
#include "pipelines/text_to_image.h"
#include "pipelines/training_graph.h"
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

// ---------------------------------------------------------------- files of the copies

TEST(CustomDiffusionTest, GoldenFileRoundTripAndTraining) {
  test::TempFolder folder;
  Models m;
  LoadCustomDiffusion(kFolder / "custom-diffusion.safetensors", *m.unet);
  EXPECT_LT(RelativeError(m.Run().out, m.golden.at("custom_diffusion.out")), 5e-6);
  EXPECT_EQ(CustomDiffusionParameters(*m.unet).size(), 20u);  // 4 modules, q, k, v, out, bias
  SaveCustomDiffusion(folder / "a.safetensors", *m.unet);
  std::map<std::string, Tensor> read = ReadSafetensors(folder / "a.safetensors").tensors,
                                original = Tensors("custom-diffusion").tensors;
  // Self-attention has no copies; diffusers tells it by tensors of no length.
  EXPECT_EQ(std::erase_if(read,
                          [](const auto& item) {
                            return item.first.ends_with("attn1.processor") &&
                                   item.second.shape() == Shape({0});
                          }),
            4u);
  ASSERT_EQ(read.size(), original.size());
  for (const auto& [name, tensor] : original) EXPECT_TRUE(SameBits(tensor, read.at(name))) << name;

  // A start changes nothing; training changes the copies alone.
  for (const char* freeze_model : {"crossattn_kv", "crossattn"}) {
    Models fresh;
    AddCustomDiffusion(*fresh.unet, freeze_model);
    fresh.ExpectGolden("base");
    std::vector<ParameterPtr> copies = CustomDiffusionParameters(*fresh.unet);
    EXPECT_EQ(copies.size(), std::string(freeze_model) == "crossattn" ? 20u : 8u);
    for (const ParameterPtr& p : fresh.unet->NamedParameters()) p->set_trainable(false);
    for (const ParameterPtr& p : copies) p->set_trainable(true);
    Tensor base = fresh.unet->FindParameter("conv_in.weight")->value().Clone();
    Tensor before = copies[0]->value().Clone();
    fresh.unet->SetTrainingMode(true);
    Tensor y = fresh.Run().out;
    fresh.unet->Backward(y);
    fresh.unet->UpdateParameters(0.1f);
    EXPECT_TRUE(SameBits(base, fresh.unet->FindParameter("conv_in.weight")->value()));
    EXPECT_FALSE(SameBits(before, copies[0]->value()));
  }
}

TEST(CustomDiffusionTest, WhatDoesNotFitChangesNothing) {
  test::TempFolder folder;
  Models m;
  const std::map<std::string, Tensor> good = Tensors("custom-diffusion").tensors;
  const std::string name =
      "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_v_custom_diffusion.weight";
  auto error = [&](std::map<std::string, Tensor> tensors) {
    WriteSafetensors(folder / "bad.safetensors", {std::move(tensors), {}});
    return MessageOf<FileError>([&] { LoadCustomDiffusion(folder / "bad.safetensors", *m.unet); });
  };
  auto tensors = good;
  tensors[name] = Tensor::Full({8, 17}, 1);
  EXPECT_THAT(error(tensors), HasSubstr(name + ": f32[8, 17] does not fit the layer's [8, 16]"));
  tensors.erase(name);
  EXPECT_THAT(error(tensors), HasSubstr(name + " is missing"));
  tensors = good;
  tensors["mid_block.x.processor.to_k_custom_diffusion.weight"] = Tensor::Full({8, 8}, 1);
  EXPECT_THAT(error(tensors), HasSubstr("1 of 21 tensors belong to no layer"));
  m.ExpectGolden("base");
  EXPECT_TRUE(CustomDiffusionParameters(*m.unet).empty());
  EXPECT_THROW(SaveCustomDiffusion(folder / "x.safetensors", *m.unet), ValueError);
  EXPECT_THAT(MessageOf<ValueError>([&] { AddCustomDiffusion(*m.unet, "all"); }),
              HasSubstr("crossattn_kv or crossattn"));
}

// The processors and the copies in the place of the projections predict the same.
TEST(CustomDiffusionTest, MergedIsTheSame) {
  Models processors, merged;
  const fs::path file = kFolder / "custom-diffusion.safetensors";
  LoadCustomDiffusion(file, *processors.unet);
  TempFolder folder;
  fs::copy(file, folder / kCustomDiffusionFile);
  CustomDiffusion custom = ReadCustomDiffusion(folder.path());
  CheckCustomDiffusion(custom, *merged.unet);
  merged.ExpectGolden("base");
  MergeCustomDiffusion(custom, *merged.unet);
  EXPECT_LT(RelativeError(merged.Run().out, processors.Run().out), 1e-6);
  EXPECT_TRUE(CustomDiffusionParameters(*merged.unet).empty());

  // The same without biases.
  Tensor with = processors.Run().out;
  TensorFile file_without = Tensors("custom-diffusion");
  EXPECT_EQ(std::erase_if(file_without.tensors,
                          [](const auto& item) { return item.first.ends_with(".bias"); }),
            4u);
  WriteSafetensors(folder / kCustomDiffusionFile, file_without);
  LoadCustomDiffusion(folder / kCustomDiffusionFile, *processors.unet);
  MergeCustomDiffusion(ReadCustomDiffusion(folder.path()), *merged.unet);
  EXPECT_LT(RelativeError(merged.Run().out, processors.Run().out), 1e-6);
  EXPECT_GT(RelativeError(merged.Run().out, with), 1e-4);
}

// ---------------------------------------------------------------- words

// The ids of transformers 5.23 after add_tokens(["<new1>", "<New2>", "<new1>x"]).
TEST(ModifierTokenTest, IdsAreThoseOfTransformers) {
  CLIPTokenizer tokenizer = *LoadCLIPTokenizer(fs::path(CALOTYPE_TEST_DATA) /
                                               "fixtures/stable_diffusion/model/tokenizer");
  ASSERT_EQ(tokenizer.vocab_size(), 523);
  tokenizer.AddToken("<new1>", 523);
  tokenizer.AddToken("<New2>", 524);
  tokenizer.AddToken("<new1>x", 525);
  using Ids = std::vector<int64_t>;
  EXPECT_EQ(tokenizer.Tokenize("a photo of a <new1> cat"),
            (Ids{320, 79, 71, 78, 83, 334, 78, 325, 320, 523, 518}));
  EXPECT_EQ(tokenizer.Tokenize("A <NEW1> cat"), (Ids{320, 523, 518}));
  EXPECT_EQ(tokenizer.Tokenize("x<new1>y, <new1>"), (Ids{343, 523, 344, 267, 523}));
  EXPECT_EQ(tokenizer.Tokenize("<new2><new1>x"), (Ids{524, 525}));
  EXPECT_EQ(tokenizer.Tokenize("<New2> <|endoftext|>a"), (Ids{524, 522, 320}));
  EXPECT_EQ(tokenizer.Tokenize("<new1>xy"), (Ids{525, 344}));
  EXPECT_EQ(tokenizer.Tokenize("<new 1>"), (Ids{283, 77, 68, 342, 272, 285}));
  EXPECT_EQ(tokenizer.Tokenize("a<new1>'s"), (Ids{320, 523, 6, 338}));
  EXPECT_EQ(tokenizer.Decode(Ids{320, 523, 518}), "a <new1> cat");

  tokenizer.AddToken("<three>", 526, 3);
  EXPECT_EQ(tokenizer.Tokenize("<three> cat"), (Ids{526, 527, 528, 518}));
  EXPECT_EQ(tokenizer.Decode(Ids{526, 527, 528, 518}), "<three> cat");

  auto error = [&](const std::string& token, int64_t id) {
    return MessageOf<ValueError>([&] { tokenizer.AddToken(token, id); });
  };
  EXPECT_THAT(error("cat", 600), HasSubstr("already has the token 'cat'"));
  EXPECT_THAT(error("<NEW1>", 600), HasSubstr("already has the token '<NEW1>'"));
  EXPECT_THAT(error("", 600), HasSubstr("no characters"));
  EXPECT_THAT(error("a b", 600), HasSubstr("white space"));
  EXPECT_THAT(error("<\xff>", 600), HasSubstr("UTF-8"));
  EXPECT_THAT(error("<x>", 527), HasSubstr("another added token has the id 527"));
  EXPECT_THAT(error("<x>", 7), HasSubstr("the vocabulary has 523"));
}

// A word whose embedding is that of a token reads as the token does.
TEST(ModifierTokenTest, EmbeddingsAreReadInTheirPlace) {
  auto model = TinyStableDiffusion();
  model->SetTrainingMode(false);
  const int64_t k = model->tokenizer()->Tokenize("k")[0];
  Tensor row = model->text_encoder()->EmbeddingOf(k);
  model->AddToken("<a>", row.Reshape({1, 8}));
  Tensor two = Tensor::Zeros({2, 8});
  std::copy_n(row.data(), 8, two.data() + 8);
  model->AddToken("<b>", two);
  auto context = [&](const std::string& text) {
    return model->text_encoder()->Forward(model->Tokens(std::vector{text}, {}));
  };
  Tensor expected = context("x k y");
  EXPECT_TRUE(SameBits(context("x <a> y"), expected));
  EXPECT_FALSE(SameBits(context("x <b> y"), expected));
  EXPECT_EQ(model->Tokens(std::vector<std::string>{"<b>"}, {}).data<int64_t>()[2], 516);
  EXPECT_THAT(MessageOf<ValueError>([&] {
                model->AddToken("<A>", row.Reshape({1, 8}));
              }),
              HasSubstr("already has"));
  EXPECT_THROW(model->AddToken("<c>", Tensor::Zeros({1, 9})), ShapeError);
  EXPECT_EQ(model->text_encoder()->added_tokens().size(), 2u);
}

// textual_inversion.py saves words in the vocabulary itself: rows of the embedding behind it, and
// their names in added_tokens.json.
TEST(ModifierTokenTest, WordsOfTheFolder) {
  TempFolder folder;
  auto model = TinyStableDiffusion();
  model->Save(folder / "model");
  const Tensor words = Random(2).NormalTensor({3, 8});
  const fs::path weights = folder / "model/text_encoder/model.safetensors",
                 config = folder / "model/text_encoder/config.json",
                 list = folder / "model/tokenizer/added_tokens.json",
                 described = folder / "model/tokenizer/tokenizer_config.json";
  TensorFile file = ReadSafetensors(weights);
  Tensor& table = file.tensors.at("text_model.embeddings.token_embedding.weight");
  Tensor longer({517, 8});
  std::copy_n(words.data(), 24, std::copy_n(table.data(), 514 * 8, longer.data()));
  table = longer;
  WriteSafetensors(weights, file);
  std::string text = ReadText(config);
  text.replace(text.find("514"), 3, "517");
  WriteText(config, text);
  WriteText(list, R"({"<dog>": 516, "<cat>": 514, "<cat>_1": 515})");

  model->AddToken("<cat>", Rows(words, 0, 2));
  model->AddToken("<dog>", Rows(words, 2, 3));
  model->SetTrainingMode(false);
  auto loaded = DiffusionModel::Load(folder / "model");
  auto context = [](DiffusionModel& of, const std::string& prompt) {
    return of.text_encoder()->Forward(of.Tokens(std::vector{prompt}, {}));
  };
  const Tensor expected = context(*model, "a <cat> <DOG>");
  EXPECT_TRUE(SameBits(context(*loaded, "a <cat> <DOG>"), expected));
  loaded->AddToken("<more>", Rows(words, 0, 1));
  EXPECT_EQ(loaded->tokenizer()->Tokenize("<more>"), std::vector<int64_t>{517});
  loaded->Save(folder / "again");
  EXPECT_TRUE(
      SameBits(context(*DiffusionModel::Load(folder / "again"), "a <cat> <DOG>"), expected));

  // The other files that list them.
  const std::string plain = ReadText(described);
  auto tokenizer = [&] { return LoadCLIPTokenizer(folder / "model/tokenizer"); };
  auto error = [&] { return MessageOf<Error>([&] { tokenizer(); }); };
  auto describe = [&](const std::string& more) {
    WriteText(described, R"({"model_max_length": 16, "added_tokens_decoder": {"513": {"content":
      "<|endoftext|>", "special": true, "normalized": false}, "514": {"content": "<cat>")" +
                             more + "}}}");
  };
  fs::remove(list);
  EXPECT_EQ(tokenizer()->end_of_ids(), 514);
  describe(R"(, "special": false, "normalized": true, "lstrip": false)");
  EXPECT_EQ(tokenizer()->Tokenize("<cat>"), std::vector<int64_t>{514});
  describe(R"(, "single_word": true)");
  EXPECT_THAT(error(), AllOf(HasSubstr("tokenizer_config.json"), HasSubstr("single_word true")));
  describe("");
  WriteText(list, R"({"<dog>": 514})");
  EXPECT_THAT(error(), HasSubstr("514 is that of two added tokens, '<cat>' and '<dog>'"));
  WriteText(described, plain);
  WriteText(list, R"({"<dog>": 515})");
  EXPECT_THAT(error(), HasSubstr("'<dog>' has the id 515, expected 514"));
  WriteText(list, R"({"a": 514})");
  EXPECT_THAT(error(), HasSubstr("already has the token 'a'"));
  WriteText(list, R"({"<|endoftext|>": 3})");
  EXPECT_THAT(error(), HasSubstr("has the id 3, in the vocabulary 513"));
  WriteText(list, R"({"<dog>": "x"})");
  EXPECT_THAT(error(), HasSubstr("added_tokens.json: the id of the added token '<dog>'"));
  // More words than rows.
  WriteText(list, R"({"<a>": 514, "<b>": 515, "<c>": 516, "<d>": 517})");
  EXPECT_THAT(MessageOf<Error>([&] { DiffusionModel::Load(folder / "model"); }),
              HasSubstr("the tokenizer has 518 tokens"));
}

// A pipeline that has drawn draws with what the model has become.
TEST(ModifierTokenTest, APipelineSeesWordsCopiesAndTermsThatComeLater) {
  auto model = TinyStableDiffusion();
  GenerateOptions options;
  options.prompts = {"a <new1> cat"};
  options.seeds = {1};
  options.steps = 2;
  options.guidance_scale = 1;
  for (Backend backend : {Backend::kEager, Backend::kJit}) {
    model = TinyStableDiffusion();
    TextToImagePipeline pipeline(*model, backend);
    std::vector<Tensor> pictures;
    auto check = [&] {  // against one that has drawn nothing before
      TextToImagePipeline fresh(*model, backend);
      EXPECT_TRUE(SameBits(pictures.back(), fresh.Generate(options)));
    };
    auto draw = [&] {
      pictures.push_back(pipeline.Generate(options));
      if (backend == Backend::kEager) check();  // compiling takes longer
    };
    draw();
    model->AddToken("<new1>", Random(4).NormalTensor({1, 8}));
    draw();
    AddCustomDiffusion(model->unet(), "crossattn");
    for (const ParameterPtr& p : CustomDiffusionParameters(model->unet()))
      for (float& x : p->Write().values()) x += 0.5f;
    draw();
    const LoraModel target = LoraModelOf(*model);
    AddLora(target, {.rank = 2, .targets = {"conv1"}});
    for (const ParameterPtr& p : LoraParameters(target))
      for (float& x : p->Write().values()) x += 0.5f;
    draw();
    model->vae()->SetTiling(VaeTiling{.sample_size = 8});
    draw();
    for (size_t i = 0; i < pictures.size(); ++i) {
      for (size_t j = 0; j < i; ++j) EXPECT_FALSE(SameBits(pictures[i], pictures[j])) << i << j;
    }
    check();
    // Nothing has changed: nothing is compiled.
    const double seconds = pipeline.compile_seconds();
    pipeline.Generate(options);
    EXPECT_EQ(pipeline.compile_seconds(), seconds);
  }
}

// ---------------------------------------------------------------- data

// One white picture: what is white in a draw is the picture.
TEST(CustomDiffusionDatasetTest, ScalesCaptionsAndMasksBelongTogether) {
  TempFolder folder;
  const int side = 48, factor = 4;
  WritePng(folder / "a.png", Image{side, side, std::vector<uint8_t>(3 * side * side, 255)});
  ImageFolder pictures(folder.path(), {.side = side, .caption = "photo"}, {});
  EXPECT_EQ(pictures.caption(0), "photo");
  CustomDiffusionDataset data(pictures, factor, /*augment=*/true);
  const std::vector<std::string> captions = data.captions(0);
  EXPECT_EQ(captions, (std::vector<std::string>{"photo", "a far away photo", "very small photo",
                                                "zoomed in photo", "close up photo"}));
  Random random(1);
  std::map<int64_t, int> drawn_captions;
  int whole = 0, smaller = 0;
  const int draws = 1000;
  for (int i = 0; i < draws; ++i) {
    Dataset::Drawn drawn = data.draw(0, random);
    ASSERT_EQ(drawn.mask.shape(), Shape({1, side / factor, side / factor}));
    ++drawn_captions[drawn.caption];
    auto white = [&](int y, int x) { return drawn.image.data()[y * side + x] == 1; };
    int scale = 0, top = side, left = side;
    for (int y = 0; y < side; ++y) {
      for (int x = 0; x < side; ++x) {
        if (white(y, x)) top = std::min(top, y), left = std::min(left, x);
      }
    }
    while (left + scale < side && white(top, left + scale)) ++scale;
    ASSERT_GE(scale, side / 3);
    const int64_t caption = drawn.caption;
    if (scale < side) {
      ++smaller;
      EXPECT_EQ(caption == 1 || caption == 2, scale < 0.6 * side) << scale;
      EXPECT_TRUE(caption < 3);
    }
    // A cell counts if it and its neighbours lie in the picture, or in a picture that is cut.
    const bool cut = caption >= 3;
    whole += cut;
    double inside = 0;
    for (int row = 0; row < side / factor; ++row) {
      for (int column = 0; column < side / factor; ++column) {
        auto within = [&](int cell, int begin) {
          return cell >= begin / factor + 1 && cell < (begin + scale) / factor - 1;
        };
        bool counts = cut || (within(row, top) && within(column, left));
        EXPECT_EQ(drawn.mask.data()[row * (side / factor) + column], counts ? 1 : 0);
        inside += counts;
      }
    }
    EXPECT_GT(inside, 0);
    // Around it is gray.
    if (scale < side) {
      double sum = 0;
      for (float x : drawn.image.values()) sum += x;
      EXPECT_EQ(sum, 3 * scale * scale);
    }
  }
  EXPECT_NEAR(whole, 0.34 * draws, 4 * std::sqrt(0.34 * 0.66 * draws));
  EXPECT_GT(smaller, 0.55 * draws);
  for (int64_t caption = 0; caption < 5; ++caption) EXPECT_GT(drawn_captions[caption], 50);

  // As they are, but for the cells at the border.
  CustomDiffusionDataset same(pictures, factor, /*augment=*/false);
  EXPECT_EQ(same.captions(0).size(), 1u);
  Dataset::Drawn drawn = same.draw(0, random);
  EXPECT_EQ(drawn.caption, 0);
  double cells = 0;
  for (float x : drawn.mask.values()) cells += x;
  EXPECT_EQ(cells, 100);
  EXPECT_THAT(MessageOf<ValueError>([&] { CustomDiffusionDataset(pictures, 8, true); }),
              HasSubstr("must be at least 72"));
}

TEST(MaskedErrorTest, FollowsTheFormula) {
  Random random(3);
  Tensor p = random.NormalTensor({2, 4, 5, 3}), t = random.NormalTensor({2, 4, 5, 3}),
         mask({2, 1, 5, 3}), weights = random.UniformTensor({10}, 0.5f, 2);
  for (float& x : mask.values()) x = random.Integer(2) == 0 ? 0.0f : 1.0f;
  ComputationGraph graph;
  Value vp = graph.Input("p", p.shape()), vt = graph.Input("t", t.shape()),
        vm = graph.Input("mask", mask.shape()), at = graph.Input("at", {DType::kI64, {2}});
  graph.Output("plain", MaskedError(vp, vt, vm, at, {}));
  graph.Output("weighted", MaskedError(vp, vt, vm, at, weights));
  std::vector<Tensor> inputs{p, t, mask, Tensor::From<int64_t>({2}, std::vector<int64_t>{7, 2})};
  std::vector<Tensor> found = Interpreter(graph).Run(inputs);
  double plain = 0, weighted = 0;
  for (int64_t b = 0; b < 2; ++b) {
    double sum = 0, cells = 0;
    for (int64_t i = 0; i < 15; ++i) {
      const double m = mask.data()[b * 15 + i];
      cells += m;
      for (int64_t c = 0; c < 4; ++c) {
        const int64_t k = (b * 4 + c) * 15 + i;
        sum += m * std::pow(double{p.data()[k]} - t.data()[k], 2);
      }
    }
    plain += sum / cells / 2;
    weighted += weights.data()[b == 0 ? 7 : 2] * sum / cells / 2;
  }
  EXPECT_NEAR(found[0].Item(), plain, 1e-5 * plain);
  EXPECT_NEAR(found[1].Item(), weighted, 1e-5 * weighted);
}

// ---------------------------------------------------------------- training

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

// ---------------------------------------------------------------- the program

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
