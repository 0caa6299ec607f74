// Prompts as text: what the syntaxes of AUTOMATIC1111 and compel mean, against golden results of
// both (tests/prompts) and the facts of their documentation.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "models/prompt_a1111.h"
#include "models/prompt_compel.h"
#include "tests/expect_error.h"

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
  std::ifstream file(std::string(CALOTYPE_TEST_DATA) + "/prompts/" + name);
  return nlohmann::json::parse(file);
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

}  // namespace
}  // namespace calotype
