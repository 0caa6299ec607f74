// Which tokens of a prompt's row stand for which of its words: what attention editing and heat maps
// speak about.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "pipelines/diffusion_model.h"

namespace calotype {

struct PromptTokens {
  std::vector<int64_t> ids;                     // of the row, without padding: [bos,] text [, eos]
  std::vector<std::string> words;               // of the text
  std::vector<std::vector<int64_t>> positions;  // of each word's tokens in the row
  int64_t length = 0;                           // S, tokens of a row with padding

  // Positions of all occurrences of a word, of one or several words in a row ("hot dog"). Errors:
  // ValueError if the prompt does not have it, or behind its end, listing its words.
  std::vector<int64_t> Of(std::string_view word) const;
};

// The words and tokens of a text for the model's text encoder. CLIP: the words are what spaces
// separate, and tokens belong to the word that their decoded characters fill. Caption encoder:
// words are tokens. Tokens that do not fit into a row are left out.
PromptTokens TokenizePrompt(const DiffusionModel& model, std::string_view text);

// For each word the positions of its tokens, which are `first`, first + 1, ... : a word ends with
// the token that makes the characters of its tokens as many as its own. What is left over belongs
// to the last word.
std::vector<std::vector<int64_t>> TokensOfWords(std::span<const std::string> words,
                                                std::span<const std::string> tokens, int64_t first);

// The text between spaces.
std::vector<std::string> SplitWords(std::string_view text);

}  // namespace calotype
