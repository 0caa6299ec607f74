// The prompt syntax of compel, the library that diffusers' documentation recommends for weights:
// "a cat playing with a ball++ in the (dark forest)0.8", blends and conjunctions. A pure function
// from text to plain data; pipelines/prompt_encoding.h turns the data into vectors.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "models/prompt_a1111.h"

namespace calotype {

// One prompt, or several whose encodings are added: sum of weight * encoding, divided by the sum of
// weights if `normalize`.
struct CompelBlend {
  std::vector<std::vector<WeightedText>> prompts;  // fragments; a single prompt is no blend
  std::vector<double> weights;
  bool normalize = true;
  bool operator==(const CompelBlend&) const = default;
};

// Encodings that follow each other along the tokens. A part of weight w is
// empty + w * (part - empty), where `empty` is the encoding of "".
struct CompelPrompt {
  std::vector<CompelBlend> parts;
  std::vector<double> weights;
  bool operator==(const CompelPrompt&) const = default;
};

//   word+  word--              weight * 1.1 for each +, * 0.9 for each -
//   (some words)++  (words)1.3  "words"-  (words).attend(1.3)
//   ("a", "b+").blend(1, 0.5)  also .blend(1, -1, no_normalize); without weights: 1 each
//   ("a", "b").and(1, 0.5)     also .add
//   \( \) \"                   the characters themselves
// Brackets nest, and factors multiply. Fragments of equal weight that follow each other are one,
// joined by a space. Whatever is not of these forms is text.
// Errors: ValueError for text behind .blend(...) or .and(...), weights that are no numbers or too
// few or too many, and for brackets nested deeper than 60; UnsupportedError for .swap(...),
// withLora(...) and useLora(...).
CompelPrompt ParseCompel(std::string_view text);

}  // namespace calotype
