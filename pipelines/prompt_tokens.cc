#include "pipelines/prompt_tokens.h"

#include <algorithm>

#include "core/error.h"

namespace calotype {
namespace {

// Characters of UTF-8 text.
int64_t Characters(std::string_view text) {
  return std::count_if(text.begin(), text.end(),
                       [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

}  // namespace

std::vector<std::string> SplitWords(std::string_view text) {
  std::vector<std::string> words;
  std::string word;
  for (char c : text) {
    if (c != ' ' && !(c >= '\t' && c <= '\r')) {
      word += c;
    } else if (!word.empty()) {
      words.push_back(std::exchange(word, {}));
    }
  }
  if (!word.empty()) words.push_back(word);
  return words;
}

std::vector<std::vector<int64_t>> TokensOfWords(std::span<const std::string> words,
                                                std::span<const std::string> tokens,
                                                int64_t first) {
  std::vector<std::vector<int64_t>> positions(words.size());
  size_t word = 0;
  int64_t characters = 0;
  for (size_t i = 0; i < tokens.size() && !words.empty(); ++i) {
    positions[word].push_back(first + static_cast<int64_t>(i));
    characters += Characters(tokens[i]);
    if (characters >= Characters(words[word]) && word + 1 < words.size()) {
      ++word;
      characters = 0;
    }
  }
  return positions;
}

std::vector<int64_t> PromptTokens::Of(std::string_view word) const {
  std::vector<std::string> wanted = SplitWords(word);
  std::vector<int64_t> result;
  for (size_t i = 0; !wanted.empty() && i + wanted.size() <= words.size(); ++i) {
    if (!std::equal(wanted.begin(), wanted.end(), words.begin() + static_cast<int64_t>(i)))
      continue;
    for (size_t j = i; j < i + wanted.size(); ++j) {
      result.insert(result.end(), positions[j].begin(), positions[j].end());
    }
  }
  Check(!result.empty(), "prompt: no tokens for \"{}\"; its words are: {}", word,
        fmt::join(words, ", "));
  return result;
}

PromptTokens TokenizePrompt(const DiffusionModel& model, std::string_view text) {
  PromptTokens result;
  result.length = model.caption_tokens();
  if (const CLIPTokenizer* tokenizer = model.tokenizer()) {
    result.words = SplitWords(text);
    std::vector<int64_t> ids = tokenizer->Tokenize(text);
    ids.resize(std::min(ids.size(), static_cast<size_t>(result.length - 2)));
    std::vector<std::string> pieces;
    for (int64_t id : ids) {
      std::string piece = tokenizer->Decode(std::span(&id, 1));
      piece.erase(piece.find_last_not_of(' ') + 1);
      pieces.push_back(piece);
    }
    result.positions = TokensOfWords(result.words, pieces, 1);
    result.ids.push_back(tokenizer->bos());
    result.ids.insert(result.ids.end(), ids.begin(), ids.end());
    result.ids.push_back(tokenizer->eos());
    return result;
  }
  const CaptionTokenizer& tokenizer = *model.caption_tokenizer();
  result.words = CaptionWords(text);
  std::vector<int64_t> ids = tokenizer.Tokenize(text).ids;
  ids.resize(std::min(ids.size(), static_cast<size_t>(tokenizer.capacity())));
  if (tokenizer.start()) result.ids.push_back(*tokenizer.start());
  const auto first = static_cast<int64_t>(result.ids.size());
  result.ids.insert(result.ids.end(), ids.begin(), ids.end());
  result.positions.resize(result.words.size());
  for (size_t i = 0; i < ids.size(); ++i)
    result.positions[i].push_back(first + static_cast<int64_t>(i));
  return result;
}

}  // namespace calotype
