// CaptionTokenizer: captions as rows of word numbers, for a model that is trained on one data set.
// The vocabulary is the set of words that the data set's captions contain. As CLIP's tokenizer
// does, it can set a start token before the words of each row, on which attention can rest.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/tensor.h"

namespace calotype {

// The words of a text: runs of letters and digits, ASCII letters in lower case; every byte above
// 127 counts as a letter, so words of any language in UTF-8 stay whole. Everything else separates.
std::vector<std::string> CaptionWords(std::string_view text);

class CaptionTokenizer {
 public:
  static constexpr int64_t kPad = 0, kUnknown = 1;  // "<pad>", "<unk>"

  struct Encoded {
    std::vector<int64_t> ids;  // exactly length() of them: cut off or filled with kPad
    std::vector<std::string>
        unknown;                   // words outside the vocabulary, each once; their id is kUnknown
    std::vector<std::string> cut;  // words behind the first capacity() ones
    int64_t words = 0;             // in the text
  };

  // vocabulary[i] is the word of number i: "<pad>", "<unk>", "<start>" if rows shall begin with it,
  // then words as CaptionWords gives them. Errors: ValueError if it is not of that form, has a word
  // twice, or a row of `length` tokens has no place for a word.
  CaptionTokenizer(std::vector<std::string> vocabulary, int64_t length);
  // The vocabulary of these captions: "<pad>", "<unk>", "<start>" and all words, sorted bytewise.
  static std::vector<std::string> BuildVocabulary(std::span<const std::string> captions);

  Encoded Encode(std::string_view text) const;  // the row of a text
  // The ids of all words, without start and padding; nothing is cut.
  Encoded Tokenize(std::string_view text) const;
  // Rows of ids, i64 [texts, length].
  Tensor EncodeAll(std::span<const std::string> texts) const;

  const std::vector<std::string>& vocabulary() const { return vocabulary_; }
  int64_t length() const { return length_; }  // of a row
  std::optional<int64_t> start() const { return start_; }
  int64_t capacity() const { return length_ - (start_ ? 1 : 0); }  // words of a row

 private:
  std::vector<std::string> vocabulary_;
  std::map<std::string, int64_t, std::less<>> ids_;
  int64_t length_;
  std::optional<int64_t> start_;
};

}  // namespace calotype
