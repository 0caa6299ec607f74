// Prompts as text: what the syntaxes of AUTOMATIC1111 and compel mean, against golden results of
// both (tests/prompts) and the facts of their documentation.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "core/error.h"
#include "core/json.h"
#include "core/parallel.h"
#include "io/safetensors.h"
#include "models/prompt_a1111.h"
#include "models/prompt_compel.h"
#include "pipelines/model_folder.h"
#include "pipelines/prompt_encoding.h"
#include "pipelines/prompt_tokens.h"
#include "pipelines/rows.h"
#include "tests/expect_error.h"
#include "tests/temp_folder.h"
#include "tests/tiny_model.h"
#include "tests/tiny_stable_diffusion.h"

namespace calotype {

void PrintTo(const WeightedText& run, std::ostream* out) {
  *out << "[\"" << run.text << "\", " << run.weight << "]";
}
void PrintTo(const ScheduledText& text, std::ostream* out) {
  *out << "[" << text.last_step << ", \"" << text.text << "\"]";
}

namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

nlohmann::json Golden(const std::string& name) {
  return ParseJson(test::ReadText(CALOTYPE_TEST_DATA "/prompts/" + name));
}

// Equal texts; weights equal but for the order of a product.
void ExpectRuns(const std::vector<WeightedText>& runs, const nlohmann::json& expected,
                const std::string& text) {
  ASSERT_EQ(runs.size(), expected.size()) << text << ": " << ::testing::PrintToString(runs);
  for (size_t i = 0; i < runs.size(); ++i) {
    EXPECT_EQ(runs[i].text, expected[i][0].get<std::string>()) << text;
    EXPECT_DOUBLE_EQ(runs[i].weight, expected[i][1].get<double>()) << text;
  }
}

std::vector<WeightedText> Rounded(std::vector<WeightedText> runs) {
  for (WeightedText& run : runs) run.weight = std::round(run.weight * 1e6) / 1e6;
  return runs;
}

TEST(A1111Test, WeightsAreThoseOfTheWebInterface) {
  auto golden = Golden("a1111.json")["weights"];
  ASSERT_GE(golden.size(), 30u);
  for (const auto& entry : golden) {
    std::string text = entry["text"];
    ExpectRuns(ParseA1111Weights(text), entry["runs"], text);
  }
}

TEST(A1111Test, DocumentedExamples) {
  using W = WeightedText;
  EXPECT_THAT(Rounded(ParseA1111Weights("an (important) word")),
              ElementsAre(W{"an ", 1}, W{"important", 1.1}, W{" word", 1}));
  EXPECT_THAT(ParseA1111Weights("\\(literal\\]"), ElementsAre(W{"(literal]", 1}));
  EXPECT_THAT(Rounded(ParseA1111Weights("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).")),
              ElementsAre(W{"a ", 1}, W{"house", 1.573}, W{" ", 1.1}, W{"on", 1}, W{" a ", 1.1},
                          W{"hill", .55}, W{", sun, ", 1.1}, W{"sky", 1.4641}, W{".", 1.1}));
}

TEST(A1111Test, BreakStandsAlone) {
  auto runs = ParseA1111Weights("a BREAK b BREAK BREAK c");
  std::vector<std::string> texts;
  for (const auto& run : runs) texts.push_back(run.IsBreak() ? "|" : run.text);
  EXPECT_THAT(texts, ElementsAre("a", "|", "b", "|", "", "|", "c"));
  // In brackets too: the weights of the text around it grow, the break stays one.
  runs = ParseA1111Weights("(a BREAK b:2)");
  EXPECT_THAT(runs,
              ElementsAre(WeightedText{"a", 2}, WeightedText{"BREAK", -1}, WeightedText{"b", 2}));
  EXPECT_TRUE(runs[1].IsBreak());
  EXPECT_FALSE((WeightedText{"BREAK", 1}).IsBreak());
}

TEST(A1111Test, FactorsThatAreNoNumbers) {
  EXPECT_THAT(MessageOf<ValueError>([] { ParseA1111Weights("a (b:1.2.3) c"); }),
              HasSubstr("\":1.2.3)\" is no number"));
  EXPECT_THAT(MessageOf<ValueError>([] { ParseA1111Weights("(b:.)"); }), HasSubstr("no number"));
}

TEST(A1111Test, SchedulesAreThoseOfTheWebInterface) {
  auto golden = Golden("a1111.json")["schedules"];
  ASSERT_GE(golden.size(), 30u);
  for (const auto& entry : golden) {
    std::string text = entry["text"];
    auto parts = ParseA1111Schedule(text, entry["steps"]);
    ASSERT_EQ(parts.size(), entry["texts"].size()) << text;
    for (size_t i = 0; i < parts.size(); ++i) {
      EXPECT_EQ(parts[i].last_step, entry["texts"][i][0].get<int64_t>()) << text;
      EXPECT_EQ(parts[i].text, entry["texts"][i][1].get<std::string>()) << text;
    }
  }
}

TEST(A1111Test, SchedulesThatTheGrammarOfTheWebInterfaceRefuses) {
  // "|" is text where it separates nothing.
  EXPECT_THAT(ParseA1111Schedule("a | b [c:2]", 4),
              ElementsAre(ScheduledText{2, "a | b "}, ScheduledText{4, "a | b c"}));
  EXPECT_THAT(ParseA1111Schedule("a [{b|d{:.5] c", 10),
              ElementsAre(ScheduledText{5, "a  c"}, ScheduledText{10, "a {b|d{ c"}));
  EXPECT_THAT(ParseA1111Schedule("(a|b)", 2), ElementsAre(ScheduledText{2, "(a|b)"}));
  // A closing bracket that belongs to nothing makes the square one around it text.
  EXPECT_THAT(ParseA1111Schedule("[a) b:3]", 5), ElementsAre(ScheduledText{5, "[a) b:3]"}));
  EXPECT_THAT(MessageOf<ValueError>([] { ParseA1111Schedule("a", 0); }), HasSubstr("0 steps"));
  EXPECT_THAT(MessageOf<ValueError>([] { ParseA1111Schedule(std::string(300, '['), 5); }),
              HasSubstr("nested deeper than 200"));
}

TEST(A1111Test, Composition) {
  using W = WeightedText;
  EXPECT_THAT(ParseA1111Composition("a cat"), ElementsAre(W{"a cat", 1}));
  EXPECT_THAT(ParseA1111Composition("a AND b :0.5 AND c:-1"),
              ElementsAre(W{"a", 1}, W{" b", .5}, W{" c", -1}));
  EXPECT_THAT(ParseA1111Composition("sANDy AND_x"), ElementsAre(W{"sANDy AND_x", 1}));
  EXPECT_THAT(ParseA1111Composition("(a:1.2) AND [b:c:3]"),
              ElementsAre(W{"(a:1.2)", 1}, W{" [b:c:3]", 1}));
  EXPECT_THAT(ParseA1111Composition("at 10:30 AND b: x"),
              ElementsAre(W{"at 10", 30}, W{" b: x", 1}));
  EXPECT_THAT(ParseA1111Composition("a:1e3 AND"), ElementsAre(W{"a:1e3", 1}, W{"", 1}));
}

TEST(CompelTest, PromptsAreThoseOfCompel) {
  auto golden = Golden("compel.json");
  ASSERT_GE(golden.size(), 70u);
  for (const auto& entry : golden) {
    std::string text = entry["text"];
    CompelPrompt prompt = ParseCompel(text);
    ASSERT_EQ(prompt.parts.size(), entry["parts"].size()) << text;
    ASSERT_EQ(prompt.weights.size(), prompt.parts.size()) << text;
    for (size_t i = 0; i < prompt.parts.size(); ++i) {
      const auto& part = entry["parts"][i];
      EXPECT_EQ(prompt.weights[i], part["weight"].get<double>()) << text;
      EXPECT_EQ(prompt.parts[i].normalize, part["normalize"].get<bool>()) << text;
      ASSERT_EQ(prompt.parts[i].prompts.size(), part["prompts"].size()) << text;
      for (size_t j = 0; j < part["prompts"].size(); ++j) {
        EXPECT_EQ(prompt.parts[i].weights[j], part["prompts"][j]["weight"].get<double>()) << text;
        ExpectRuns(prompt.parts[i].prompts[j], part["prompts"][j]["fragments"], text);
      }
    }
  }
}

TEST(CompelTest, MistakesAreNamed) {
  auto message = [](std::string text) { return MessageOf<ValueError>([&] { ParseCompel(text); }); };
  EXPECT_THAT(message("(\"a\",\"b\").blend(1)"), HasSubstr("1 weights for 2 prompts"));
  EXPECT_THAT(message("(\"a\",\"b\").blend(x,1)"), HasSubstr("`x`"));
  EXPECT_THAT(message("(\"a\",\"b\").blend(1,1) foo"), HasSubstr("\" foo\" behind .blend"));
  EXPECT_THAT(message("(\"a\",\"b\").and(1,1) foo"), HasSubstr("behind .and"));
  EXPECT_THAT(message("(\"a\",\"b\").blend(1,-1)"), HasSubstr("add to 0"));
  EXPECT_THAT(message(std::string(100, '(') + "a"), HasSubstr("nested deeper than 60"));
  auto unsupported = [](std::string text) {
    return MessageOf<UnsupportedError>([&] { ParseCompel(text); });
  };
  EXPECT_THAT(unsupported("a cat.swap(dog)"), HasSubstr(".swap"));
  EXPECT_THAT(unsupported("a (big cat).swap(dog)"), HasSubstr(".swap"));
  EXPECT_THAT(unsupported("a withLora(x, 1)"), HasSubstr("withLora"));
}

TEST(CompelTest, NestingCostsNoMoreThanItsLength) {
  std::string text = "a";
  for (int i = 0; i < 40; ++i) text = "(" + text + " b)1.01";
  CompelPrompt prompt = ParseCompel(text);
  ASSERT_EQ(prompt.parts[0].prompts[0].size(), 40u);
  EXPECT_NEAR(prompt.parts[0].prompts[0][0].weight, std::pow(1.01, 40), 1e-12);
}

// ---------------------------------------------------------------- encodings

double Difference(const Tensor& a, const Tensor& b) {
  EXPECT_EQ(a.shape(), b.shape());
  if (a.shape() != b.shape()) return INFINITY;
  double largest = 0, difference = 0;
  for (int64_t i = 0; i < b.elements(); ++i) {
    largest = std::max<double>(largest, std::abs(b.data()[i]));
    difference = std::max<double>(difference, std::abs(a.data()[i] - b.data()[i]));
  }
  return difference / largest;
}

// The tiny CLIP of the fixtures; a word is one token, numbered by its letters.
class ClipEncodingTest : public ::testing::Test {
 protected:
  ClipEncodingTest() {
    SetThreads(1);
    model_ = LoadCLIPTextModel(std::string(CALOTYPE_TEST_DATA) + "/fixtures/clip/tiny");
    model_->SetTrainingMode(false);
    encoder_ = {.length = 20, .bos = 97, .eos = 98, .pad = 98};
    encoder_.tokenize = [](std::string_view text) {
      std::vector<int64_t> ids;
      for (const std::string& word : SplitWords(text)) {
        int64_t sum = 0;
        for (char c : word) sum += c;
        ids.push_back(sum % 90 + 1);
      }
      return ids;
    };
    encoder_.encode = [this](const Tensor& ids, const Tensor& mask) {
      return model_->Forward({ids, mask});
    };
  }
  std::unique_ptr<CLIPTextModel> model_;
  PromptEncoder encoder_;
};

TEST_F(ClipEncodingTest, EncodingsAreThoseOfCompelAndTheWebInterface) {
  auto texts = Golden("encodings.json");
  auto tensors =
      ReadSafetensors(std::string(CALOTYPE_TEST_DATA) + "/prompts/encodings.safetensors").tensors;
  ASSERT_EQ(texts["compel"].size(), 10u);
  for (size_t i = 0; i < texts["compel"].size(); ++i) {
    std::string text = texts["compel"][i];
    for (auto [name, mode] :
         {std::pair{"mask", Downweight::kMask}, {"remove", Downweight::kRemove}}) {
      Tensor encoding = EncodeCompel(encoder_, ParseCompel(text), mode);
      EXPECT_LT(Difference(encoding, tensors.at(fmt::format("compel.{}.{}", name, i))), 2e-6)
          << text << " " << name;
    }
  }
  ASSERT_EQ(texts["a1111"].size(), 6u);
  for (size_t i = 0; i < texts["a1111"].size(); ++i) {
    std::string text = texts["a1111"][i];
    EXPECT_LT(Difference(EncodeA1111(encoder_, ParseA1111Weights(text)),
                         tensors.at(fmt::format("a1111.{}", i))),
              2e-6)
        << text;
  }
}

TEST_F(ClipEncodingTest, ChunksWithoutInnerMarkers) {
  auto runs = ParseA1111Weights("a cat BREAK (on:1.5) a mat");
  encoder_.restore_mean = false;
  Tensor all = EncodeA1111(encoder_, runs, {.min_chunks = 3});
  ASSERT_EQ(all.shape(), Shape({60, 16}));
  Tensor some = EncodeA1111(encoder_, runs, {.min_chunks = 3, .inner_markers = false});
  ASSERT_EQ(some.shape(), Shape({56, 16}));  // 3 * 18 + 2
  std::vector<int64_t> kept;
  for (int64_t t = 0; t < 60; ++t) {
    if (t != 19 && t != 20 && t != 39 && t != 40) kept.push_back(t);
  }
  for (size_t i = 0; i < kept.size(); ++i) {
    for (int64_t d = 0; d < 16; ++d) {
      EXPECT_EQ(some.data()[static_cast<int64_t>(i) * 16 + d], all.data()[kept[i] * 16 + d]);
    }
  }
  int64_t cut = 0;
  EncodeCompel(encoder_,
               ParseCompel(std::string(40, 'a') + std::string(" b c d e") +
                           " f g h i j k l m n o p q r s t u"),
               Downweight::kMask, [&](int64_t tokens) { cut = tokens; });
  EXPECT_EQ(cut, 21 - 18);
}

TEST(CaptionPromptTest, AStartTokenIsNoWord) {
  auto model = test::TinyModel({.start = true});
  TextToImagePipeline pipeline(*model, Backend::kEager);
  auto plain = [&](const std::string& text) {
    Tensor z = pipeline.Encode(model->Tokens(std::vector{text}, {}));
    return z.Reshape({8, 8});
  };
  PromptTokens tokens = TokenizePrompt(*model, "a red circle");
  EXPECT_THAT(tokens.ids, ElementsAre(2, 3, 7, 5));
  EXPECT_THAT(tokens.Of("red"), ElementsAre(2));
  tokens = TokenizePrompt(*model, "a a a a a red circle blue square");
  EXPECT_THAT(tokens.Of("circle"), ElementsAre(7));
  EXPECT_THAT(MessageOf<ValueError>([&] { tokens.Of("blue"); }), HasSubstr("blue"));

  // Weights and chunks: each chunk has a start of its own, of weight 1.
  GenerateOptions options;
  auto encode = [&](const std::string& text, PromptSyntax syntax) {
    options.prompts = {text};
    return PromptContexts(pipeline, options, syntax)(0, 0, 4).positive.at(0);
  };
  for (PromptSyntax syntax : {PromptSyntax::kA1111, PromptSyntax::kCompel}) {
    EXPECT_EQ(Difference(encode("a red circle", syntax), plain("a red circle")), 0);
  }
  Tensor weighted = encode("(a red:1.5) circle", PromptSyntax::kA1111), z = plain("a red circle");
  for (int64_t i = 0; i < z.elements(); ++i) {
    float factor = i / 8 == 1 || i / 8 == 2 ? 1.5f : 1.0f;
    EXPECT_FLOAT_EQ(weighted.data()[i], factor * z.data()[i]);
  }
  Tensor two = encode("a a a a a a red circle", PromptSyntax::kA1111);
  ASSERT_EQ(two.shape(), Shape({16, 8}));
  EXPECT_EQ(Difference(Rows(two, 0, 8), plain("a a a a a a red")), 0);
  EXPECT_EQ(Difference(Rows(two, 8, 16), plain("circle")), 0);
}

// Chunks of 30 tokens, encoded as their own ids; w1 is token 1 and so on, a comma 99.
std::vector<std::vector<int>> Chunks(const std::string& text, int64_t backtrack = 20) {
  PromptEncoder encoder{.length = 32, .bos = 97, .eos = 98, .pad = 98, .comma = 99};
  encoder.restore_mean = false;
  encoder.tokenize = [](std::string_view part) {
    std::vector<int64_t> ids;
    for (const std::string& word : SplitWords(part)) {
      ids.push_back(word == "," ? 99 : std::stoi(word.substr(1)));
    }
    return ids;
  };
  encoder.encode = [](const Tensor& ids, const Tensor&) {
    Tensor z({1, ids.shape()[1], 1});
    for (int64_t i = 0; i < z.elements(); ++i) {
      z.data()[i] = static_cast<float>(ids.data<int64_t>()[i]);
    }
    return z;
  };
  Tensor z = EncodeA1111(encoder, ParseA1111Weights(text), {.comma_backtrack = backtrack});
  std::vector<std::vector<int>> chunks;
  for (int64_t i = 0; i < z.elements(); ++i) {
    if (i % 32 == 0) chunks.emplace_back();
    int id = static_cast<int>(z.data()[i]);
    EXPECT_EQ(i % 32 == 0, id == 97);
    if (i % 32 == 31) {
      EXPECT_EQ(id, 98);
    }
    if (id < 97 || id == 99) chunks.back().push_back(id);
  }
  return chunks;
}
// "w1 w2 .. ", with commas in place of some.
std::string Words(int count, const std::set<int>& commas) {
  std::string text;
  for (int i = 1; i <= count; ++i) text += commas.contains(i) ? ", " : fmt::format("w{} ", i);
  return text;
}
std::vector<size_t> Sizes(const std::vector<std::vector<int>>& chunks) {
  std::vector<size_t> sizes;
  for (const auto& chunk : chunks) sizes.push_back(chunk.size());
  return sizes;
}

TEST(ChunkTest, EndBehindTheLastCommaIfItIsNear) {
  EXPECT_THAT(Sizes(Chunks(Words(70, {}))), ElementsAre(30, 30, 10));
  auto chunks = Chunks(Words(40, {5, 25}));
  ASSERT_THAT(Sizes(chunks), ElementsAre(25, 15));
  EXPECT_EQ(chunks[0].back(), 99);
  EXPECT_EQ(chunks[1][0], 26);
  EXPECT_EQ(chunks[1].back(), 40);
  // 20 tokens from the comma on are near, 21 are not.
  EXPECT_THAT(Sizes(Chunks(Words(40, {11}))), ElementsAre(11, 29));
  EXPECT_THAT(Sizes(Chunks(Words(40, {10}))), ElementsAre(30, 10));
  // A comma at the end moves nothing; one behind the end stays with what follows it.
  EXPECT_THAT(Sizes(Chunks(Words(40, {30}))), ElementsAre(30, 10));
  chunks = Chunks(Words(40, {25, 31}));
  ASSERT_THAT(Sizes(chunks), ElementsAre(30, 10));
  EXPECT_EQ(chunks[1][0], 99);
  // The next chunk looks for commas of its own.
  EXPECT_THAT(Sizes(Chunks(Words(80, {25, 45}))), ElementsAre(25, 20, 30, 5));
  EXPECT_THAT(Sizes(Chunks(Words(40, {25}), 0)), ElementsAre(30, 10));
  EXPECT_THAT(Sizes(Chunks(Words(40, {25}), 5)), ElementsAre(30, 10));
  EXPECT_THAT(Sizes(Chunks(Words(40, {25}), 6)), ElementsAre(25, 15));
  // A BREAK forgets the comma before it.
  EXPECT_THAT(Sizes(Chunks("w1 , w2 BREAK " + Words(40, {}))), ElementsAre(3, 30, 10));
}

TEST(ChunkTest, WeightsMoveWithTheirTokens) {
  // 28 tokens, a comma, a weighted word, and one more.
  auto chunks = Chunks(Words(28, {}) + ", (w2:3) w4");
  ASSERT_THAT(Sizes(chunks), ElementsAre(29, 2));
  EXPECT_THAT(chunks[1], ElementsAre(6, 4));
}

class ContextTest : public ::testing::Test {
 protected:
  Tensor Plain(const std::string& text) {
    Tensor z = pipeline_.Encode(model_->Tokens(std::vector{text}, {}));
    return z.Reshape({8, 8});
  }
  auto Contexts(PromptSyntax syntax, const std::string& prompt) {
    options_.prompts = {prompt};
    return PromptContexts(pipeline_, options_, syntax,
                          [this](const std::string& text) { warnings_.push_back(text); });
  }
  Tensor Draw(const std::string& prompt, std::optional<PromptSyntax> syntax) {
    GenerateOptions options = options_;
    options.prompts = {prompt};
    if (syntax) options.context = PromptContexts(pipeline_, options, *syntax);
    return pipeline_.Generate(options);
  }
  std::unique_ptr<DiffusionModel> model_ = test::TinyModel();
  TextToImagePipeline pipeline_{*model_, Backend::kEager};
  GenerateOptions options_{.seeds = {3}, .steps = 4, .guidance_scale = 3};
  std::vector<std::string> warnings_;
};

TEST_F(ContextTest, SchedulesChangeTheContextFromStepToStep) {
  auto context = Contexts(PromptSyntax::kA1111, "a [red:blue:2] circle");
  for (int64_t step = 0; step < 6; ++step) {
    EXPECT_EQ(Difference(context(0, step, 4).positive.at(0),
                         Plain(step < 2 ? "a red circle" : "a blue circle")),
              0)
        << step;
  }
  EXPECT_EQ(Difference(context(0, 0, 4).negative, Plain("")), 0);
  // The encoder of captions keeps no mean: weights are factors.
  context = Contexts(PromptSyntax::kA1111, "a (red:1.5) circle");
  Tensor weighted = context(0, 0, 4).positive[0], plain = Plain("a red circle");
  for (int64_t t = 0; t < 8; ++t) {
    for (int64_t d = 0; d < 8; ++d) {
      float factor = t == 1 ? 1.5f : 1.0f;
      EXPECT_FLOAT_EQ(weighted.data()[t * 8 + d], factor * plain.data()[t * 8 + d]);
    }
  }
}

TEST_F(ContextTest, CompositionsAndLengths) {
  options_.negative_prompt = "square BREAK blue";
  auto context = Contexts(PromptSyntax::kA1111, "a red circle AND a large square :0.5");
  PictureContext at = context(0, 3, 4);
  EXPECT_THAT(at.weights, ElementsAre(1, .5));
  ASSERT_EQ(at.positive.size(), 2u);
  EXPECT_EQ(at.negative.shape(), Shape({16, 8}));
  ASSERT_EQ(at.positive[1].shape(), Shape({16, 8}));
  Tensor first = Plain("a large square"), empty = Plain("");
  for (int64_t k = 0; k < 64; ++k) {
    EXPECT_EQ(at.positive[1].data()[k], first.data()[k]);
    EXPECT_EQ(at.positive[1].data()[64 + k], empty.data()[k]);
  }
  Contexts(PromptSyntax::kA1111, "a green (green:1.2) circle");
  EXPECT_THAT(warnings_, ElementsAre(HasSubstr("\"green\"")));
}

TEST_F(ContextTest, CompelMasksWithPaddingAndReportsWhatItCuts) {
  auto context = Contexts(PromptSyntax::kCompel, "a red+ circle");
  Tensor weighted = context(0, 0, 4).positive[0], plain = Plain("a red circle"), empty = Plain("");
  for (int64_t d = 0; d < 8; ++d) {
    EXPECT_NEAR(weighted.data()[8 + d],
                empty.data()[8 + d] + 1.1 * (plain.data()[8 + d] - empty.data()[8 + d]), 1e-6);
    EXPECT_EQ(weighted.data()[16 + d], plain.data()[16 + d]);
  }
  // Weight 0: as if the word were padding.
  context = Contexts(PromptSyntax::kCompel, "a (red)0 circle");
  Tensor gone = context(0, 0, 4).positive[0];
  for (int64_t d = 0; d < 8; ++d) EXPECT_NEAR(gone.data()[8 + d], empty.data()[8 + d], 1e-5);
  Contexts(PromptSyntax::kCompel, "a a a a a a a a red circle");
  EXPECT_THAT(warnings_, ElementsAre(HasSubstr("the last 2 tokens")));
}

TEST_F(ContextTest, PicturesOfPromptsWithoutSyntaxAreThePlainOnes) {
  Tensor plain = Draw("a red circle", {});
  EXPECT_EQ(Difference(Draw("a red circle", PromptSyntax::kA1111), plain), 0);
  EXPECT_EQ(Difference(Draw("a red circle", PromptSyntax::kCompel), plain), 0);
  // Twice the half is the whole.
  EXPECT_LT(
      Difference(Draw("a red circle :0.5 AND a red circle :0.5", PromptSyntax::kA1111), plain),
      1e-5);
  EXPECT_GT(Difference(Draw("a (red:3) circle", PromptSyntax::kA1111), plain), 1e-3);
  EXPECT_GT(Difference(Draw("a [red|blue] circle", PromptSyntax::kA1111), plain), 1e-3);
  EXPECT_GT(
      Difference(Draw("(\"a red circle\", \"a blue square\").blend(1, 1)", PromptSyntax::kCompel),
                 plain),
      1e-3);
  EXPECT_THAT(MessageOf<ValueError>([] { ParsePromptSyntax("x"); }), HasSubstr("`x` is unknown"));
}

// The filler of each side is made as that side's text is: with its layers, and with the syntax's
// padding.
TEST(ClipContextTest, ShorterEmbeddingsAreFollowedByThatOfNoText) {
  SetThreads(1);
  test::TempFolder folder;
  test::TinyStableDiffusion()->Save(folder / "model");
  // Padding that is not the end token, as that of Stable Diffusion 2.
  folder.Write("model/tokenizer/tokenizer_config.json",
               R"({"model_max_length": 16, "pad_token": "!"})");
  auto model = DiffusionModel::Load(folder / "model");
  ASSERT_EQ(model->tokenizer()->pad(), 0);
  TextToImagePipeline pipeline(*model, Backend::kEager);
  auto no_text = [&](int64_t fill, int64_t clip_skip) {
    std::vector<int64_t> ids(16, fill);
    ids[0] = 512, ids[1] = 513;
    return pipeline.Encode(Tensor::From({1, 16}, ids), clip_skip).Reshape({16, 8});
  };
  const struct {
    PromptSyntax syntax;
    const char* longer;
    int64_t fill;
  } kCases[] = {{PromptSyntax::kA1111, "a BREAK b", 513},
                {PromptSyntax::kCompel, "(\"a\", \"b\").and()", 0}};
  for (const auto& c : kCases) {
    for (bool positive : {true, false}) {
      GenerateOptions options{.prompts = {positive ? "c" : c.longer},
                              .seeds = {3},
                              .negative_prompt = positive ? c.longer : "c",
                              .steps = 2,
                              .guidance_scale = 3,
                              .clip_skip = 1};
      PictureContext at = PromptContexts(pipeline, options, c.syntax)(0, 0, 2);
      Tensor shorter = positive ? at.positive.at(0) : at.negative;
      ASSERT_EQ(shorter.shape(), Shape({32, 8}));
      Tensor filler = Rows(shorter, 16, 32);
      EXPECT_EQ(Difference(filler, no_text(c.fill, positive ? 1 : 0)), 0);
      EXPECT_GT(Difference(filler, no_text(c.fill, positive ? 0 : 1)), 1e-3);
      EXPECT_GT(Difference(filler, no_text(513 - c.fill, positive ? 1 : 0)), 1e-3);
    }
  }
}

// Of an opened pipeline one part is in memory at a time: once all is encoded, CLIP is not, even
// though a mask (of a word below 1) had it compute in a graph of its own.
TEST(ClipContextTest, ClipIsLetGoBeforeTheUNetSamples) {
  SetThreads(1);
  test::TempFolder folder;
  test::TinyStableDiffusion()->Save(folder / "model");
  auto pipeline = TextToImagePipeline::Open(folder / "model", Backend::kEager);
  GenerateOptions options{.prompts = {"a (b)0.5"}, .seeds = {3}, .steps = 2};
  options.context = PromptContexts(*pipeline, options, PromptSyntax::kCompel);
  const std::weak_ptr<Parameter> weight =
      pipeline->model().text_encoder()->NamedParameters().front();
  EXPECT_FALSE(weight.expired());
  int steps = 0;
  options.hooks.after_step = [&](const PictureBatch&, int64_t, const Tensor& sample) {
    ++steps;
    EXPECT_TRUE(weight.expired());
    return sample;
  };
  pipeline->Generate(options);
  EXPECT_EQ(steps, 2);
}

// A word that comes after the encoder was made.
TEST(ClipContextTest, AnEncoderReadsLaterWords) {
  auto model = test::TinyStableDiffusion();
  TextToImagePipeline pipeline(*model, Backend::kEager);
  PromptEncoder encoder = MakePromptEncoder(pipeline, 0);
  const Tensor all = Tensor::Full({1, 16}, 1);
  auto encode = [&](const std::string& text) {
    const Tensor ids = model->Tokens(std::vector{text}, {});
    const Tensor plain = encoder.encode(ids, {}), masked = encoder.encode(ids, all);
    EXPECT_LT(Difference(plain, masked), 1e-5);
    return plain;
  };
  const Tensor before = encode("a <new1>");
  EXPECT_GT(encoder.tokenize("<new1>").size(), 1u);
  model->AddToken("<new1>", Tensor::Full({1, 8}, 1));
  EXPECT_EQ(encoder.tokenize("<new1>"), std::vector<int64_t>{514});
  EXPECT_GT(Difference(encode("a <new1>"), before), 1e-3);
}

}  // namespace
}  // namespace calotype
