// The examples do what their comments say: each is run and its output is checked.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <string>

#include "tests/run_program.h"

namespace calotype {
namespace {

using test::ProgramResult;
using test::ReadText;
using test::RunProgram;
using ::testing::HasSubstr;

std::string Example(const std::string& name) {
  ProgramResult result = RunProgram({std::string(CALOTYPE_BIN_DIR) + "/example_" + name});
  EXPECT_EQ(result.code, 0) << result.out << result.err;
  return result.out;
}

// The number behind `key` in the text.
double Number(const std::string& text, const std::string& key) {
  size_t at = text.find(key);
  EXPECT_NE(at, std::string::npos) << "no `" << key << "` in\n" << text;
  return at == std::string::npos ? NAN : std::atof(text.c_str() + at + key.size());
}

TEST(ExampleTest, Op) {
  std::string text = Example("01_op");
  // x^2 / (1 + exp(-x)) at -1, 0, 1, 2.
  double expected = 0;
  for (double x : {-1.0, 0.0, 1.0, 2.0}) expected += x * x / (1 + std::exp(-x));
  EXPECT_NEAR(Number(text, "y  ="), expected, 1e-5);
  EXPECT_NEAR(Number(text, "dx ="), Number(text, "by differences ="), 1e-5);
}

TEST(ExampleTest, Layer) {
  std::string text = Example("02_layer");
  EXPECT_THAT(text, HasSubstr("gate.weight"));
  EXPECT_LT(Number(text, "step 300: loss"), 0.1 * Number(text, "step   0: loss"));
}

TEST(ExampleTest, Train) {
  std::string text = Example("03_train");
  EXPECT_GT(Number(text, "step    1: loss"), 0.1);
  EXPECT_LT(Number(text, "step 1000: loss"), 2e-3);
}

// The README shows the whole main of the example.
TEST(ExampleTest, TheReadmeShowsTheTrainingLoop) {
  std::string source = ReadText(std::string(CALOTYPE_SOURCE_DIR) + "/examples/03_train.cc");
  EXPECT_THAT(ReadText(std::string(CALOTYPE_SOURCE_DIR) + "/README.md"),
              HasSubstr("```cpp\n" + source.substr(source.find("int main")) + "```"));
}

TEST(ExampleTest, Compile) {
  std::string text = Example("04_compile");
  EXPECT_LT(Number(text, "fresh weights: largest difference from eager"), 2e-5);
  EXPECT_LT(Number(text, "changed weights: largest difference from eager"), 2e-5);
  EXPECT_GT(Number(text, "compiled in"), 0);
}

}  // namespace
}  // namespace calotype
