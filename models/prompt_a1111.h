// The prompt syntax of AUTOMATIC1111's web interface: weights "(word:1.3)", chunks "BREAK",
// schedules "[from:to:when]" and "[a|b]", compositions "a AND b :0.5". Pure functions from text to
// plain data; pipelines/prompt_encoding.h turns the data into vectors.
//
// A prompt is read in the order of these functions: compositions first, then the schedules of each
// part, then the weights of each text.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace calotype {

// A run of text whose tokens have one weight.
struct WeightedText {
  std::string text;
  double weight = 1;

  // "BREAK" with weight -1: what follows begins a new chunk.
  bool IsBreak() const { return weight == -1 && text == "BREAK"; }
  bool operator==(const WeightedText&) const = default;
};

// The runs of a text, neighbours of equal weight merged; one empty run for an empty text:
//   (x)  weight * 1.1      [x]  weight / 1.1      (x:1.3)  weight * 1.3
//   \( \) \[ \] \\         the characters themselves
// Brackets nest, and factors multiply. A bracket that is not closed reaches to the end; one that
// was not opened is text. The word BREAK stands alone, also in brackets.
// Errors: ValueError for a factor that is no number ("(x:1.2.3)").
std::vector<WeightedText> ParseA1111Weights(std::string_view text);

// What the prompt is up to and including the step `last_step`, counted from 1.
struct ScheduledText {
  int64_t last_step = 0;
  std::string text;
  bool operator==(const ScheduledText&) const = default;
};

// The texts of a walk of `steps` steps, in order; the last one ends with it. Weights stay in them.
//   [from:to:when]  `from` up to step int(when), then `to`
//   [to:when]       nothing, then `to`;   [from::when]  `from`, then nothing
//   [a|b|c]         a in step 1, b in step 2, c in step 3, a in step 4, ...
// A `when` below 1 is a fraction of the steps. These nest. Whatever is not of these forms is text.
// Errors: ValueError unless steps >= 1, or
// for brackets nested deeper than 200.
std::vector<ScheduledText> ParseA1111Schedule(std::string_view text, int64_t steps);

// The parts of "a AND b :0.5 AND c": text and weight, 1 unless a number follows behind a colon at
// the end. The model's output for the prompt is u + sum of weight * guidance_scale * (c_i - u).
std::vector<WeightedText> ParseA1111Composition(std::string_view text);

}  // namespace calotype
