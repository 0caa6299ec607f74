#include "models/caption_tokenizer.h"

#include <algorithm>
#include <set>

namespace calotype {

namespace {

bool IsWordByte(char c) {
  auto byte = static_cast<unsigned char>(c);
  return byte >= 128 || (byte >= '0' && byte <= '9') || (byte >= 'a' && byte <= 'z');
}
char Lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }

}  // namespace

std::vector<std::string> CaptionWords(std::string_view text) {
  std::vector<std::string> words;
  std::string word;
  for (char c : text) {
    c = Lower(c);
    if (IsWordByte(c)) {
      word += c;
    } else if (!word.empty()) {
      words.push_back(std::exchange(word, {}));
    }
  }
  if (!word.empty()) words.push_back(word);
  return words;
}

CaptionTokenizer::CaptionTokenizer(std::vector<std::string> vocabulary, int64_t length)
    : vocabulary_(std::move(vocabulary)), length_(length) {
  Check(length > 0, "caption tokenizer: length {} must be positive", length);
  Check(vocabulary_.size() >= 2 && vocabulary_[kPad] == "<pad>" && vocabulary_[kUnknown] == "<unk>",
        "caption tokenizer: the vocabulary must start with <pad>, <unk>");
  if (vocabulary_.size() > 2 && vocabulary_[2] == "<start>") start_ = 2;
  Check(capacity() > 0, "caption tokenizer: length {} leaves no place for a word behind <start>",
        length);
  const size_t marks = start_ ? 3 : 2;
  for (size_t i = 0; i < vocabulary_.size(); ++i) {
    const std::string& word = vocabulary_[i];
    Check(i < marks || CaptionWords(word) == std::vector{word},
          "caption tokenizer: vocabulary entry {} is '{}', not a lower-case word", i, word);
    Check(ids_.emplace(word, static_cast<int64_t>(i)).second,
          "caption tokenizer: '{}' is in the vocabulary twice", word);
  }
}

std::vector<std::string> CaptionTokenizer::BuildVocabulary(std::span<const std::string> captions) {
  std::set<std::string> words;
  for (const std::string& caption : captions) {
    for (std::string& word : CaptionWords(caption)) words.insert(std::move(word));
  }
  std::vector<std::string> vocabulary = {"<pad>", "<unk>", "<start>"};
  vocabulary.insert(vocabulary.end(), words.begin(), words.end());
  return vocabulary;
}

CaptionTokenizer::Encoded CaptionTokenizer::Tokenize(std::string_view text) const {
  Encoded result;
  for (const std::string& word : CaptionWords(text)) {
    ++result.words;
    auto it = ids_.find(word);
    if (it == ids_.end() && std::ranges::find(result.unknown, word) == result.unknown.end()) {
      result.unknown.push_back(word);
    }
    result.ids.push_back(it == ids_.end() ? kUnknown : it->second);
  }
  return result;
}

CaptionTokenizer::Encoded CaptionTokenizer::Encode(std::string_view text) const {
  Encoded result = Tokenize(text);
  if (result.words > capacity()) {
    std::vector<std::string> words = CaptionWords(text);
    result.cut.assign(words.begin() + capacity(), words.end());
  }
  result.ids.resize(static_cast<size_t>(capacity()), kPad);
  if (start_) result.ids.insert(result.ids.begin(), *start_);
  return result;
}

Tensor CaptionTokenizer::EncodeAll(std::span<const std::string> texts) const {
  Tensor rows({static_cast<int64_t>(texts.size()), length_}, DType::kI64);
  int64_t* out = rows.data<int64_t>();
  for (const std::string& text : texts) out = std::ranges::copy(Encode(text).ids, out).out;
  return rows;
}

}  // namespace calotype
