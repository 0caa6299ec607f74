// Attention probabilities of a U-Net looked at and edited: the hook of the attention modules, heat
// maps of words, and Prompt-to-Prompt, its tables against golden values (tests/prompts).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "core/json.h"
#include "core/parallel.h"
#include "core/random.h"
#include "graph/functions.h"
#include "graph/interpreter.h"
#include "graph/op.h"
#include "io/safetensors.h"
#include "jit/compile.h"
#include "layers/attention_modules.h"
#include "pipelines/attention_demo.h"
#include "pipelines/attention_editing.h"
#include "pipelines/attention_maps.h"
#include "tests/expect_error.h"
#include "tests/run_program.h"
#include "tests/temp_folder.h"
#include "tests/tiny_model.h"
#include "tests/tiny_unet.h"

namespace calotype {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

Tensor Normal(const Shape& shape, uint64_t seed) { return Random(seed).NormalTensor(shape); }

// Largest |a - b| over the largest |b|.
double Difference(const Tensor& a, const Tensor& b) {
  EXPECT_EQ(a.shape(), b.shape());
  double largest = 0, difference = 0;
  for (int64_t i = 0; i < b.elements(); ++i) {
    largest = std::max<double>(largest, std::abs(b.data()[i]));
    difference = std::max<double>(difference, std::abs(a.data()[i] - b.data()[i]));
  }
  return difference / largest;
}

// Picture i of a batch.
Tensor Row(const Tensor& x, int64_t i) {
  Tensor row(x.shape().With(0, 1));
  std::copy_n(x.data() + i * row.elements(), row.elements(), row.data());
  return row;
}

// ---------------------------------------------------------------- the hook

struct Nodes {
  int fused = 0, softmax = 0;
};
Nodes CountNodes(const ComputationGraph& graph) {
  Nodes nodes;
  for (const ComputationNode& node : graph.nodes()) {
    nodes.fused += node.op && node.op->name == "Attention";
    nodes.softmax += node.op && node.op->name == "Softmax";
  }
  return nodes;
}

TEST(AttentionProbsHookTest, ProbabilitiesAreTheSoftmaxOfTheModule) {
  nn::Attention attention({.query_dim = 6, .cross_attention_dim = 5, .heads = 2, .dim_head = 4});
  attention.Initialize(3);
  attention.SetTrainingMode(false);
  Tensor x = Normal({2, 3, 6}, 1), e = Normal({2, 7, 5}, 2);
  Value seen;
  attention.SetAttentionProbsHook({.edit = [&](Value probs) { return seen = probs; }, .wants = {}});
  ComputationGraph graph;
  Value y = attention.Call({graph.Input("x", x.shape()), graph.Input("e", e.shape())});
  graph.Output("y", y);
  graph.Output("probs", seen);
  auto results = Interpreter(graph).Run(std::vector{x, e});
  const Tensor& probs = results[1];
  ASSERT_EQ(probs.shape(), Shape({2, 2, 3, 7}));

  auto project = [&](const Tensor& t, const char* name, int64_t b, int64_t row, int64_t out) {
    const Tensor& w = attention.FindParameter(std::string(name) + ".weight")->value();
    double sum = 0;
    int64_t width = t.shape()[2];
    for (int64_t k = 0; k < width; ++k) {
      sum += double{t.data()[(b * t.shape()[1] + row) * width + k]} * w.data()[out * width + k];
    }
    return sum;
  };
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t h = 0; h < 2; ++h) {
      for (int64_t i = 0; i < 3; ++i) {
        double scores[7], total = 0;
        for (int64_t j = 0; j < 7; ++j) {
          double score = 0;
          for (int64_t d = 0; d < 4; ++d) {
            score += project(x, "to_q", b, i, h * 4 + d) * project(e, "to_k", b, j, h * 4 + d);
          }
          total += scores[j] = std::exp(score / 2);
        }
        for (int64_t j = 0; j < 7; ++j) {
          EXPECT_NEAR(probs.data()[((b * 2 + h) * 3 + i) * 7 + j], scores[j] / total, 1e-6);
        }
      }
    }
  }
  // Without the hook the module is as before.
  attention.SetAttentionProbsHook({});
  EXPECT_LT(Difference(results[0], attention.Forward({x, e})), 2e-6);
  EXPECT_EQ(CountNodes(attention.Export({{"x", x.type()}, {"e", e.type()}})).fused, 1);
  attention.SetAttentionProbsHook(
      {.edit = [](Value probs) { return Slice(probs, 0, 0, 1); }, .wants = {}});
  EXPECT_THAT(MessageOf<ShapeError>([&] {
                attention.Forward({x, e});
              }),
              HasSubstr("must keep their shape"));
}

class UNetHookTest : public ::testing::Test {
 protected:
  // The U-Net with some layers' probabilities as outputs, or taken from inputs.
  ComputationGraph Graph(const ScopedAttentionHooks::Wants& wants, bool inputs = false) {
    return UNetGraph(*model_, {.batch = 2},
                     [&](ComputationGraph& graph, Value sample, Value timestep, Value context) {
                       std::vector<Value> results(1);
                       ScopedAttentionHooks scope(
                           model_->unet(), wants, [&](const AttentionPlace& place, Value probs) {
                             places_.push_back(place);
                             results.push_back(probs);
                             return inputs ? graph.Input(place.path, probs.shape()) : probs;
                           });
                       results[0] = model_->Denoise(sample, timestep, context);
                       if (inputs) results.resize(1);
                       return results;
                     });
  }
  std::unique_ptr<DiffusionModel> model_ = test::TinyModel({.sharpness = 2});
  std::vector<AttentionPlace> places_;
  std::vector<Tensor> inputs_ = {Normal({2, 3, 16, 16}, 1), Tensor::Full({2}, 400),
                                 Normal({2, 8, 8}, 2)};
};

TEST_F(UNetHookTest, OnlyLayersThatAreLookedAtStoreTheirScores) {
  auto none = [](const AttentionPlace&, int64_t, int64_t) { return false; };
  auto cross = [](const AttentionPlace& place, int64_t, int64_t) { return place.cross; };
  ComputationGraph plain = UNetGraph(*model_, {.batch = 2}), unseen = Graph(none);
  ComputationGraph seen = Graph(cross);
  // Self- and cross-attention of the down block, the mid block and two layers of the up block.
  EXPECT_EQ(CountNodes(plain).fused, 8);
  EXPECT_EQ(CountNodes(unseen).fused, 8);
  EXPECT_EQ(CountNodes(unseen).softmax, 0);
  EXPECT_EQ(CountNodes(seen).fused, 4);
  EXPECT_EQ(CountNodes(seen).softmax, 4);
  // The modules are as before.
  EXPECT_EQ(CountNodes(UNetGraph(*model_, {.batch = 2})).fused, 8);
  using Block = AttentionPlace::Block;
  std::vector<Block> blocks;
  for (const AttentionPlace& place : places_) blocks.push_back(place.block);
  EXPECT_THAT(blocks, ElementsAre(Block::kDown, Block::kMid, Block::kUp, Block::kUp));
  EXPECT_EQ(places_[0].path, "down_blocks.1.attentions.0.transformer_blocks.0.attn2");

  // Compiled code: as many fewer kernels of fused attention.
  auto kernels = [](const ComputationGraph& graph) {
    int count = 0;
    auto compiled = jit::Compile(graph);
    for (const auto& step : compiled->steps()) {
      count += step.kind.find("attention") != std::string::npos;
    }
    return count;
  };
  int all = kernels(plain);
  EXPECT_GE(all, 8);
  EXPECT_EQ(kernels(unseen), all);
  EXPECT_EQ(kernels(seen), all / 2);
}

TEST_F(UNetHookTest, ProbabilitiesComeOutAndGoBackIn) {
  auto all = [](const AttentionPlace&, int64_t, int64_t) { return true; };
  Tensor plain = Interpreter(UNetGraph(*model_, {.batch = 2})).Run(inputs_)[0];
  ComputationGraph out = Graph(all);
  auto eager = Interpreter(out).Run(inputs_);
  auto compiled = jit::Compile(out)->Run(inputs_);
  ASSERT_EQ(eager.size(), 9u);
  EXPECT_LT(Difference(eager[0], plain), 5e-6);
  for (size_t i = 0; i < eager.size(); ++i) EXPECT_LT(Difference(compiled[i], eager[i]), 5e-6);
  for (size_t i = 1; i < eager.size(); ++i) {
    int64_t keys = eager[i].shape()[3];
    for (int64_t row = 0; row < eager[i].elements() / keys; ++row) {
      double sum = 0;
      for (int64_t j = 0; j < keys; ++j) sum += eager[i].data()[row * keys + j];
      ASSERT_NEAR(sum, 1, 1e-5);
    }
  }
  places_.clear();
  ComputationGraph in = Graph(all, true);
  std::vector<Tensor> inputs = inputs_;
  inputs.insert(inputs.end(), eager.begin() + 1, eager.end());
  EXPECT_LT(Difference(Interpreter(in).Run(inputs)[0], plain), 5e-6);
  EXPECT_LT(Difference(jit::Compile(in)->Run(inputs)[0], plain), 5e-6);
  inputs[4] = Tensor::Zeros(inputs[4].shape());  // other probabilities do change the result
  EXPECT_GT(Difference(jit::Compile(in)->Run(inputs)[0], plain), 1e-3);
}

// ---------------------------------------------------------------- tables

nlohmann::json Golden() {
  return ParseJson(test::ReadText(CALOTYPE_TEST_DATA "/prompts/prompt_to_prompt.json"));
}

PromptTokens FromGolden(const nlohmann::json& prompt, int64_t length) {
  PromptTokens tokens;
  tokens.ids = prompt["ids"].get<std::vector<int64_t>>();
  tokens.words = SplitWords(prompt["text"].get<std::string>());
  tokens.positions =
      TokensOfWords(tokens.words, prompt["pieces"].get<std::vector<std::string>>(), 1);
  tokens.length = length;
  return tokens;
}

std::map<std::string, StepRange> Ranges(const nlohmann::json& ranges) {
  std::map<std::string, StepRange> result;
  for (const auto& [word, range] : ranges.items()) result[word] = {range[0], range[1]};
  return result;
}

TEST(PromptToPromptTest, TablesAreThoseOfTheAuthorsProgram) {
  auto golden = Golden();
  int64_t length = golden["length"], steps = golden["steps"];
  ASSERT_EQ(golden["replace"].size(), 7u);
  for (const auto& entry : golden["replace"]) {
    PromptTokens source = FromGolden(entry["source"], length);
    PromptTokens target = FromGolden(entry["target"], length);
    for (const auto& [word, positions] : entry["words"].items()) {
      EXPECT_EQ(target.Of(word), positions.get<std::vector<int64_t>>()) << word;
    }
    Tensor map = ReplacementMap(source, target), expected = Tensor::Zeros({length, length});
    for (const auto& cell : entry["map"]) {
      expected.data()[cell[0].get<int64_t>() * length + cell[1].get<int64_t>()] = cell[2];
    }
    for (int64_t i = 0; i < map.elements(); ++i) {
      EXPECT_NEAR(map.data()[i], expected.data()[i], 1e-6) << entry["target"]["text"] << " " << i;
    }
    Tensor table = CrossReplaceTable(target, Ranges(entry["ranges"]), steps);
    for (int64_t step = 0; step <= steps; ++step) {
      for (int64_t j = 0; j < length; ++j) {
        EXPECT_EQ(table.data()[step * length + j], entry["table"][step][j].get<float>());
      }
    }
  }
  ASSERT_EQ(golden["refine"].size(), 6u);
  for (const auto& entry : golden["refine"]) {
    PromptTokens source = FromGolden(entry["source"], length);
    PromptTokens target = FromGolden(entry["target"], length);
    EXPECT_EQ(RefinementMap(source.ids, target.ids, length),
              entry["map"].get<std::vector<int64_t>>())
        << entry["target"]["text"];
  }
}

// A source of "a red circle", tokens 1 to 3 of 8.
PromptTokens Words(const std::string& text) {
  PromptTokens tokens;
  tokens.words = SplitWords(text);
  tokens.positions = TokensOfWords(tokens.words, tokens.words, 1);
  tokens.ids = {1};
  for (const std::string& word : tokens.words) tokens.ids.push_back(100 + word[0]);
  tokens.ids.push_back(2);
  tokens.length = 8;
  return tokens;
}

TEST(PromptToPromptTest, TablesOfSteps) {
  std::vector<PromptTokens> prompts = {Words("a red circle"), Words("a large red circle")};
  AttentionEditOptions options{.edit_type = "refine",
                               .n_cross_replace = {{"default_", {0, .5}}, {"red", {0, 0}}},
                               .n_self_replace = {.25, .5},
                               .equalizer_words = {"large", "circle"},
                               .equalizer_strengths = {2, -3}};
  AttentionEditTables tables = MakeAttentionEditTables(prompts, options, 8);
  ASSERT_EQ(tables.own.size(), 9u);
  EXPECT_THAT(tables.self, ElementsAre(0, 0, 1, 1, 0, 0, 0, 0, 0));
  // bos, a, large (new), red (never the source's), circle, eos, padding: A_i = eq A_0 or eq A_i.
  EXPECT_THAT(std::vector<float>(tables.from_source[0].values().begin(),
                                 tables.from_source[0].values().end()),
              ElementsAre(1, 1, 2, 0, -3, 1, 1, 1));
  EXPECT_THAT(std::vector<float>(tables.own[0].values().begin(), tables.own[0].values().end()),
              ElementsAre(0, 0, 2, 1, 0, 0, 0, 0));
  // Behind int(.5 * 9) steps all is the target's own.
  EXPECT_THAT(std::vector<float>(tables.own[4].values().begin(), tables.own[4].values().end()),
              ElementsAre(1, 1, 1, 1, 1, 1, 1, 1));
  EXPECT_EQ(tables.from_source[4].data()[2], 0);
  // Column 2, "large", comes from nowhere; column 4, "circle", from 3.
  auto column = [&](int64_t j) {
    std::vector<int64_t> from;
    for (int64_t i = 0; i < 8; ++i) {
      if (tables.map.data()[i * 8 + j] != 0) from.push_back(i);
    }
    return from;
  };
  EXPECT_TRUE(column(2).empty());
  EXPECT_THAT(column(4), ElementsAre(3));
}

TEST(PromptToPromptTest, MistakesAreNamed) {
  std::vector<PromptTokens> prompts = {Words("a red circle"), Words("a blue circle")};
  auto message = [&](AttentionEditOptions options, size_t count = 2) {
    return MessageOf<ValueError>(
        [&] { MakeAttentionEditTables(std::span(prompts).first(count), options, 10); });
  };
  EXPECT_THAT(message({}, 1), HasSubstr("1 prompts"));
  EXPECT_THAT(message({.edit_type = "swap"}), HasSubstr("`swap` is unknown"));
  EXPECT_THAT(message({.edit_type = "reweight"}), HasSubstr("without equalizer_words"));
  EXPECT_THAT(message({.n_cross_replace = {{"default_", {.5, .2}}}}), HasSubstr("0.5 to 0.2"));
  EXPECT_THAT(message({.n_cross_replace = {{"green", {0, 1}}}}), HasSubstr("\"green\""));
  EXPECT_THAT(message({.equalizer_words = {"red"}, .equalizer_strengths = {2}}),
              HasSubstr("no target has the equalizer word \"red\""));
  EXPECT_THAT(message({.equalizer_words = {"blue"}}), HasSubstr("0 equalizer_strengths"));
  EXPECT_THAT(
      message({.edit_type = "reweight", .equalizer_words = {"blue"}, .equalizer_strengths = {2}}),
      HasSubstr("keeps the words of the source"));
  prompts[1] = Words("a large blue circle");
  EXPECT_THAT(message({}), HasSubstr("use refine"));
  EXPECT_THAT(MessageOf<ValueError>([&] { prompts[0].Of("dog"); }), HasSubstr("a, red, circle"));
  EXPECT_THAT(prompts[1].Of("large blue"), ElementsAre(2, 3));
}

TEST(PromptToPromptTest, BlendMask) {
  // Two pictures, 2 x 2 pixels, 3 tokens; token 1 of the source, tokens 1 and 2 of the target.
  Tensor map = Tensor::From({2, 4, 3}, std::vector<float>{9, 0, 0, 9, 8, 0, 9, 0, 0, 9, 0,   0,  //
                                                          9, 0, 0, 9, 0, 0, 9, 1, 1, 9, .3f, .2f});
  std::vector<std::vector<int64_t>> positions = {{1}, {1, 2}};
  Tensor mask = LocalBlendMask(std::vector{map}, positions, 4, 4, .3, false);
  std::vector<float> source(mask.values().begin(), mask.values().begin() + 16);
  std::vector<float> target(mask.values().begin() + 16, mask.values().end());
  EXPECT_THAT(source, ElementsAre(0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0));
  // .5 of 2 is below .3; where the source's word is counts too.
  EXPECT_THAT(target, ElementsAre(0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0));
  Tensor pooled = LocalBlendMask(std::vector{map}, positions, 2, 2, .3, true);
  for (float v : pooled.values()) EXPECT_EQ(v, 1);
}

// ---------------------------------------------------------------- pictures

class EditTest : public ::testing::Test {
 protected:
  Tensor Edit(TextToImagePipeline& pipeline, const AttentionEditOptions& edit,
              const std::vector<std::string>& prompts = {"a red circle", "a blue square"}) {
    return EditPictures(pipeline, prompts, options_, edit);
  }
  Tensor Plain(TextToImagePipeline& pipeline, const std::string& prompt) {
    GenerateOptions options = options_;
    options.prompts = {prompt};
    return pipeline.Generate(options);
  }
  std::unique_ptr<DiffusionModel> model_ = test::TinyModel({.sharpness = 2});
  TextToImagePipeline eager_{*model_, Backend::kEager}, jit_{*model_, Backend::kJit};
  GenerateOptions options_{.seeds = {3}, .steps = 4, .guidance_scale = 3};
};

// Every kind of edit, whole pictures, against diffusers' pipeline with the probabilities of its
// attention modules edited by a program of its own (tests/prompts/make_edits.py).
TEST(EditedPicturesTest, AreThoseOfDiffusers) {
  const std::filesystem::path data = CALOTYPE_TEST_DATA;
  SetThreads(1);
  const auto golden = ReadSafetensors(data / "prompts/edits.safetensors").tensors;
  const auto document = ParseJson(test::ReadText(data / "prompts/edits.json"));
  ASSERT_EQ(document.at("cases").size(), golden.size());
  auto range = [](const nlohmann::json& j) { return StepRange{j.at(0), j.at(1)}; };
  for (Backend backend : {Backend::kEager, Backend::kJit}) {
    auto pipeline = TextToImagePipeline::Open(data / "fixtures/stable_diffusion/model", backend);
    for (const auto& [name, c] : document.at("cases").items()) {
      if (backend == Backend::kJit && name != "blend") continue;  // compiling takes longest
      AttentionEditOptions edit{.edit_type = c.at("edit_type"),
                                .n_cross_replace = {},
                                .n_self_replace = range(c.at("self")),
                                .local_blend_words = c.at("blend"),
                                .substruct_words = c.at("substruct")};
      for (const auto& [word, share] : c.at("cross").items())
        edit.n_cross_replace[word] = range(share);
      for (const auto& [word, factor] : c.at("equalizer").items()) {
        edit.equalizer_words.push_back(word);
        edit.equalizer_strengths.push_back(factor);
      }
      GenerateOptions options{.seeds = {c.at("seed").get<uint64_t>()},
                              .negative_prompt = c.at("negative_prompt"),
                              .steps = c.at("steps"),
                              .guidance_scale = c.at("guidance_scale").get<double>(),
                              .sampler = c.at("sampler"),
                              .rng = "torch"};
      const std::vector<std::string> prompts = c.at("prompts");
      const Tensor pictures = EditPictures(*pipeline, prompts, options, edit);
      const Tensor expected = golden.at(name).To(DType::kF32);
      ASSERT_EQ(pictures.shape(), expected.shape());
      double largest = 0;  // of 255; the golden ones are rounded
      for (int64_t i = 0; i < pictures.elements(); ++i) {
        const double value = std::clamp(pictures.data()[i] * 127.5 + 127.5, 0.0, 255.0);
        largest = std::max(largest, std::abs(value - expected.data()[i]));
      }
      EXPECT_LT(largest, 0.6) << name;
    }
  }
}

TEST_F(EditTest, WithoutReplacingTheTargetIsItself) {
  AttentionEditOptions none{.n_cross_replace = {{"default_", {0, 0}}}, .n_self_replace = {0, 0}};
  Tensor pictures = Edit(eager_, none);
  EXPECT_LT(Difference(Row(pictures, 0), Plain(eager_, "a red circle")), 1e-5);
  EXPECT_LT(Difference(Row(pictures, 1), Plain(eager_, "a blue square")), 1e-5);
  EXPECT_GT(Difference(Row(pictures, 1), Row(pictures, 0)), 1e-3);
}

TEST_F(EditTest, ReplacingChangesTheTargetOnlyAndCompiledCodeAgrees) {
  for (const char* type : {"replace", "refine"}) {
    AttentionEditOptions all{.edit_type = type,
                             .n_cross_replace = {{"default_", {0, 1}}},
                             .n_self_replace = {0, 1},
                             .local_blend_words = {}};
    Tensor pictures = Edit(eager_, all), compiled = Edit(jit_, all);
    EXPECT_LT(Difference(compiled, pictures), 2e-5);
    EXPECT_LT(Difference(Row(pictures, 0), Plain(eager_, "a red circle")), 1e-5);
    EXPECT_GT(Difference(Row(pictures, 1), Plain(eager_, "a blue square")), 1e-3);
    // The values still are the target's.
    EXPECT_GT(Difference(Row(pictures, 1), Row(pictures, 0)), 1e-3);
  }
  // The same words: the same picture.
  AttentionEditOptions all{.n_cross_replace = {{"default_", {0, 1}}}, .n_self_replace = {0, 1}};
  Tensor same = Edit(eager_, all, {"a red circle", "a red circle"});
  EXPECT_LT(Difference(Row(same, 1), Row(same, 0)), 1e-6);
}

TEST_F(EditTest, ReweightAndBlend) {
  std::vector<std::string> prompts = {"a red circle", "a red circle"};
  AttentionEditOptions reweight{.edit_type = "reweight",
                                .n_cross_replace = {{"default_", {0, 1}}},
                                .equalizer_words = {"red"},
                                .equalizer_strengths = {1}};
  Tensor pictures = Edit(jit_, reweight, prompts);
  EXPECT_LT(Difference(Row(pictures, 1), Row(pictures, 0)), 1e-6);
  reweight.equalizer_strengths = {4};
  pictures = Edit(jit_, reweight, prompts);
  EXPECT_GT(Difference(Row(pictures, 1), Row(pictures, 0)), 1e-3);
  EXPECT_LT(Difference(Edit(eager_, reweight, prompts), pictures), 2e-5);
  // No pixel is above twice the largest: all stays the source's. All above 0: nothing does.
  AttentionEditOptions blend = reweight;
  blend.local_blend_words = prompts;
  blend.start_blend = 0;
  blend.blend_threshold = 2;
  Tensor blended = Edit(jit_, blend, prompts);
  EXPECT_EQ(Difference(Row(blended, 1), Row(blended, 0)), 0);
  blend.blend_threshold = 0;
  EXPECT_LT(Difference(Edit(jit_, blend, prompts), pictures), 1e-5);
  // Except where the same words are.
  blend.substruct_words = prompts;
  blended = Edit(jit_, blend, prompts);
  EXPECT_EQ(Difference(Row(blended, 1), Row(blended, 0)), 0);
  blend.substruct_words = {"red"};
  EXPECT_THAT(MessageOf<ValueError>([&] { Edit(jit_, blend, prompts); }),
              HasSubstr("1 texts of substruct_words for 2 prompts"));
}

TEST_F(EditTest, PicturesShareOneNoise) {
  options_.rng = "torch";
  AttentionEditOptions none{.n_cross_replace = {{"default_", {0, 0}}}, .n_self_replace = {0, 0}};
  Tensor same = Edit(eager_, none, {"a red circle", "a red circle"});
  EXPECT_LT(Difference(Row(same, 1), Row(same, 0)), 1e-6);
  options_.rng = "torch-batch";
  EXPECT_THAT(MessageOf<ValueError>([&] { Edit(eager_, none); }), HasSubstr("take torch"));
}

// ---------------------------------------------------------------- heat maps

TEST(HeatMapTest, BicubicIsPyTorchs) {
  Tensor x = Tensor::From({1, 2, 3}, std::vector<float>{1, 2, -1, 0, 4, .5f});
  Tensor y = ResizeBicubic(x, 4, 5);
  // torch.nn.functional.interpolate(mode="bicubic", align_corners=False)
  std::vector<float> expected = {1.0398f, 1.5829f, 1.7891f, .0346f,  -1.4411f, .6122f,  1.6493f,
                                 2.4531f, .6687f,  -.9590f, -.0922f, 1.7587f,  3.5469f, 1.7133f,
                                 -.1650f, -.5198f, 1.8251f, 4.2109f, 2.3474f,  .3171f};
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(y.data()[i], expected[i], 6e-5) << i;
}

TEST(HeatMapTest, SidesOfMaps) {
  EXPECT_EQ(MapSides(64 * 96, 64, 96), std::pair(int64_t{64}, int64_t{96}));
  EXPECT_EQ(MapSides(16 * 24, 64, 96), std::pair(int64_t{16}, int64_t{24}));
  EXPECT_EQ(MapSides(8 * 5, 15, 9), std::pair(int64_t{8}, int64_t{5}));
  EXPECT_THAT(MessageOf<ShapeError>([] { MapSides(50, 16, 16); }), HasSubstr("50 pixels"));
}

TEST(HeatMapTest, MapsOfAllTokensAddToTheSteps) {
  auto model = test::TinyModel();  // so that the cubic stays above 0
  TextToImagePipeline pipeline(*model, Backend::kJit);
  GenerateOptions options{.prompts = {"a red circle", "a blue square", "a red circle"},
                          .seeds = {1, 2, 1},
                          .steps = 3,
                          .guidance_scale = 2};
  Tensor plain = pipeline.Generate(options);
  HeatMaps maps;
  options.hooks = maps.Hooks(*model);
  options.batch_size = 2;
  EXPECT_LT(Difference(pipeline.Generate(options), plain), 2e-5);
  ASSERT_EQ(maps.pictures(), 3u);
  Tensor tokens = maps.Tokens(0);
  ASSERT_EQ(tokens.shape(), Shape({8, 16, 16}));
  for (int64_t p = 0; p < 256; ++p) {
    double sum = 0;
    for (int64_t t = 0; t < 8; ++t) sum += tokens.data()[t * 256 + p];
    ASSERT_NEAR(sum, 3, 1e-4);
  }
  // The same picture in another batch has the same maps; another has others.
  EXPECT_LT(Difference(maps.Tokens(2), tokens), 1e-4);
  EXPECT_GT(Difference(maps.Tokens(1), tokens), 1e-3);
  // A word of two tokens has the mean of their maps.
  std::vector<int64_t> two = {1, 2}, one = {1}, other = {2};
  Tensor both = maps.Word(0, two, two), a = maps.Word(0, one, two), b = maps.Word(0, other, two);
  for (int64_t p = 0; p < 256; ++p) {
    ASSERT_NEAR(both.data()[p], (a.data()[p] + b.data()[p]) / 2, 1e-6);
  }
  EXPECT_THAT(MessageOf<ValueError>([&] { maps.Tokens(3); }), HasSubstr("has not been drawn"));

  HeatMaps normal({.normalize = true});
  options.hooks = normal.Hooks(*model);
  pipeline.Generate(options);
  Tensor share = normal.Word(0, two, two);
  for (float v : share.values()) ASSERT_NEAR(v, .5, 1e-3);
}

TEST(HeatMapTest, Overlay) {
  Image picture{2, 1, {0, 0, 0, 255, 255, 255}};
  Image overlay = HeatMapOverlay(picture, Tensor::From({1, 2}, std::vector<float>{0, 1}));
  EXPECT_EQ(overlay.width, 256);
  EXPECT_EQ(overlay.height, 128);
  std::vector<std::vector<int>> row;
  for (size_t x = 0; x < 256; ++x) {
    row.push_back({overlay.rgb[3 * x], overlay.rgb[3 * x + 1], overlay.rgb[3 * x + 2]});
  }
  // The least is blue on black, the largest red on white.
  EXPECT_THAT(std::vector(row.begin(), row.begin() + 128), Contains(ElementsAre(0, 0, 140)));
  EXPECT_THAT(std::vector(row.begin() + 128, row.end()), Contains(ElementsAre(255, 115, 115)));
}

// ---------------------------------------------------------------- the demo

TEST(AttentionDemoTest, ForegroundIsWhatDiffersFromTheBackground) {
  for (int64_t caption = 0; caption < kShapeCaptions; ++caption) {
    Tensor mask = ForegroundMask(RenderShape(caption, 0, 0), caption);
    double area = 0;
    for (float v : mask.values()) area += v / 256;
    // From a small cross to a large square; the borders of white on gray count less.
    bool large = ShapeAttributesOf(caption).size == 1;
    EXPECT_GT(area, large ? .25 : .07) << ShapeCaption(caption);
    EXPECT_LT(area, large ? .8 : .35) << ShapeCaption(caption);
    EXPECT_EQ(mask.data()[0], 0);
    EXPECT_EQ(RenderShape(caption, 0, 0).data()[0], ShapeBackground(caption));
    EXPECT_EQ(ShapeCaptionIndex(ShapeAttributesOf(caption)), caption);
    EXPECT_EQ(mask.data()[8 * 16 + 8], 1);
  }
}

// A model of the captions' words that has learned nothing.
void SaveUntrained(const std::filesystem::path& folder) {
  std::vector<std::string> captions;
  for (int64_t caption = 0; caption < kShapeCaptions; ++caption) {
    captions.push_back(ShapeCaption(caption));
  }
  CaptionEncoderConfig encoder;
  encoder.vocabulary = CaptionTokenizer::BuildVocabulary(captions);
  encoder.max_length = 9;  // <start> and 8 words
  encoder.hidden_size = 8;
  encoder.num_attention_heads = 2;
  SchedulerConfig scheduler;
  scheduler.type = "DDIMScheduler";
  scheduler.prediction_type = "v_prediction";
  DiffusionModel model(UNet2DConditionConfig::FromJson(test::kTinyUNet), encoder, scheduler);
  model.Initialize(1);
  model.Save(folder);
}

TEST(AttentionDemoTest, WritesFiguresAndPictures) {
  test::TempFolder folder;
  SaveUntrained(folder / "demo");
  AttentionDemoSummary summary = RunAttentionDemo(
      {.folder = folder / "demo", .sampling_steps = 2, .captions = 16, .local_blend = true});
  EXPECT_EQ(summary.edited.pictures, 80);
  EXPECT_EQ(summary.redrawn.pictures, 80);
  // A model that has learned nothing draws the same for all prompts, and looks nowhere.
  EXPECT_LT(summary.edited.color, .5);
  EXPECT_GT(summary.edited.overlap, .9);
  EXPECT_NEAR(summary.shape.median, 1, .1);
  auto json = ParseJson(test::ReadText(folder / "demo/edit.json"));
  EXPECT_EQ(json["edited"]["pictures"], 80);
  EXPECT_EQ(json["heat_shape"]["median"], summary.shape.median);
  EXPECT_THAT(
      MessageOf<ValueError>([&] { RunAttentionDemo({.folder = folder / "demo", .captions = 97}); }),
      HasSubstr("97 captions"));
}

TEST(ProgramTest, EditsMapsAndReadsPrompts) {
  test::TempFolder folder;
  SaveUntrained(folder / "demo");
  auto run = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin() + 1,
                     {"--model", (folder / "demo").string(), "--steps", "2", "--backend", "eager",
                      "--out", (folder / "x.png").string(), "-q", "-t", "1"});
    arguments.insert(arguments.begin(), std::string(CALOTYPE_BIN_DIR) + "/calotype");
    return test::RunProgram(arguments);
  };
  const std::string red = "a small red circle", blue = "a small blue circle";
  auto maps = run({"sample", "-p", red, "--attention-maps", (folder / "maps").string()});
  EXPECT_EQ(maps.code, 0) << maps.err;
  for (const char* name : {"000-0-a.png", "000-1-small.png", "000-2-red.png", "000-3-circle.png"}) {
    EXPECT_TRUE(std::filesystem::exists(folder / "maps" / name)) << name;
  }
  auto edit = run({"edit", "-p", red, "-e", blue, "-e", "a small green circle", "--n-cross-replace",
                   "0.1:0.9", "--n-cross-replace", "blue=0.5", "--equalizer-words", "blue",
                   "--equalizer-strengths", "2"});
  EXPECT_EQ(edit.code, 0) << edit.err;
  for (const char* name : {"x-000.png", "x-001.png", "x-002.png"}) {
    EXPECT_THAT(edit.out, HasSubstr(name));
    EXPECT_TRUE(std::filesystem::exists(folder / name)) << name;
  }
  EXPECT_EQ(run({"sample", "-p", "a (small:1.3) [red:blue:0.5] circle AND a cross :0.3",
                 "--prompt-syntax", "a1111"})
                .code,
            0);
  EXPECT_EQ(run({"sample", "-p", "a small++ (red)0.5 circle", "--prompt-syntax", "compel"}).code,
            0);
  auto expect_usage = [&](const std::vector<std::string>& arguments, const char* text) {
    auto result = run(arguments);
    EXPECT_EQ(result.code, 2);
    EXPECT_THAT(result.err, HasSubstr(text));
  };
  expect_usage({"edit", "-p", red}, "--edit-prompt");
  expect_usage({"edit", "-p", red, "-e", "a circle"}, "use refine");
  expect_usage({"edit", "-p", red, "-e", blue, "--n-self-replace", "x"}, "`x`");
  expect_usage({"sample", "-p", red, "--prompt-syntax", "x"}, "`x` is unknown");
  expect_usage({"sample", "-p", red, "--prompt-syntax", "a1111", "--attention-maps", "m"},
               "plain prompts");
  expect_usage({"sample", "-p", "(red:1.2.3)", "--prompt-syntax", "a1111"}, "is no number");
}

}  // namespace
}  // namespace calotype
