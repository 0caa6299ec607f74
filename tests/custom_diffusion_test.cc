// Custom Diffusion: its files, its words and its data.
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
#include "pipelines/rows.h"
#include "pipelines/text_to_image.h"
#include "pipelines/training_graph.h"
#include "tests/expect_error.h"
#include "tests/lora_models.h"
#include "tests/random_image.h"
#include "tests/temp_folder.h"
#include "tests/tiny_stable_diffusion.h"

namespace calotype {
namespace {

using namespace test;
namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;

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
  EXPECT_THAT(error(),
              HasSubstr("added_tokens.json: '<dog>' is \"x\", but this file maps words to ids"));
  WriteText(list, R"({"1": {}})");
  EXPECT_THAT(error(),
              HasSubstr("'1' is {}, but this file maps words to ids, as {\"<cat>\": 514}"));
  WriteText(list, R"({"<dog>": -1})");
  EXPECT_THAT(error(), HasSubstr("the id of the added token '<dog>' is -1"));
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

}  // namespace
}  // namespace calotype
