// CLIPTokenizer of transformers: texts as rows of token ids, by byte-level byte-pair encoding
// (Sennrich et al. 2016, arXiv:1508.07909) with the vocabulary of CLIP or any other of its form.
// Gives the ids of transformers' fast tokenizer.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/tensor.h"

namespace calotype {

// The fields of tokenizer_config.json that matter.
struct CLIPTokenizerConfig {
  std::string bos_token = "<|startoftext|>", eos_token = "<|endoftext|>";
  std::string unk_token = "<|endoftext|>", pad_token = "<|endoftext|>";
  int64_t model_max_length = 77;

  // Errors: ValueError for text that is not JSON, a field of a wrong type, an unknown field, or a
  // model_max_length below 2; UnsupportedError naming a field with an unsupported value.
  static CLIPTokenizerConfig FromJson(std::string_view text);
};

class CLIPTokenizer {
 public:
  struct Encoded {
    std::vector<int64_t> ids;  // model_max_length of them: bos, the text's, eos, then padding
    int64_t tokens = 0;        // of the text, without bos and eos, before truncation
    std::string cut;           // the text of the tokens that did not fit, "" if all did
  };

  // vocab_json: {"token": id}; merges_txt: a line "#version...", then a merge "left right" a line,
  // the first the strongest. Errors: ValueError naming the token or line for text that is not of
  // this form, an id or token that is there twice, a negative id, an id below the number of tokens
  // that none has, a merge that is there twice or of or into tokens that the vocabulary does not
  // have, and special tokens outside the vocabulary.
  CLIPTokenizer(std::string_view vocab_json, std::string_view merges_txt,
                CLIPTokenizerConfig config = {});

  // Errors (of all): ValueError for text that is not UTF-8.
  Encoded Encode(std::string_view text) const;
  // Adds a word of its own, such as "<new1>", which reads as the ids first_id, first_id + 1, ...
  // (`vectors` of them) wherever it stands, in any case of letters, also within other words, as
  // transformers' add_tokens does. Errors: ValueError for a word that is empty, has white space, is
  // not UTF-8, or that the vocabulary has; for ids that other tokens have.
  void AddToken(const std::string& token, int64_t first_id, int64_t vectors = 1);
  // Rows of ids, i64 [texts, model_max_length].
  Tensor EncodeAll(std::span<const std::string> texts) const;
  // The ids of a text alone: no bos, eos, truncation or padding.
  //   The four special tokens, spelled exactly, are themselves, and so are added ones after lower
  // case. The text between them: normal form
  //   C, runs of white space to one space, lower case (accents stay); split into 's 't 're 've 'm
  //   'll 'd, runs of letters, single digits, runs of anything else but space; the UTF-8 bytes of
  //   each piece, the last one marked with "</w>", joined by the strongest merge that applies until
  //   none does. A byte that is not in the vocabulary gives unk_token.
  std::vector<int64_t> Tokenize(std::string_view text) const;
  // Back to text: bytes of the tokens, a space behind each end of a word, bytes that are not UTF-8
  // as U+FFFD; special tokens are left out. Errors: ValueError for an id that no token has.
  std::string Decode(std::span<const int64_t> ids) const;

  const CLIPTokenizerConfig& config() const { return config_; }
  int64_t vocab_size() const { return static_cast<int64_t>(ids_.size()); }
  // The ids of the vocabulary and of added tokens are below this.
  int64_t end_of_ids() const;
  int64_t bos() const { return bos_; }
  int64_t eos() const { return eos_; }
  int64_t pad() const { return pad_; }
  // The id of a token as the vocabulary spells it ("cat</w>"). Errors: ValueError if it has none.
  int64_t IdOf(std::string_view token) const;

 private:
  struct Merge {
    int32_t rank;
    int32_t result;
  };
  struct Added {
    std::string normal;  // what is looked for in a normalised text
    int32_t first_id, vectors;
  };
  void AppendPiece(std::string_view piece, std::vector<int64_t>& ids) const;
  void AppendNormal(std::string_view text, std::vector<int64_t>& ids) const;

  CLIPTokenizerConfig config_;
  std::map<std::string, int32_t, std::less<>> ids_;
  std::unordered_map<int32_t, std::string> tokens_;
  std::vector<Added> added_;
  std::unordered_map<int32_t, std::string> added_texts_;  // by id; all but a token's last are ""
  std::unordered_map<uint64_t, Merge> merges_;            // by left id * 2^32 + right id
  int32_t bytes_[256], last_bytes_[256];  // ids of single bytes, -1 if there is none
  int64_t bos_, eos_, unk_, pad_;
};

}  // namespace calotype
