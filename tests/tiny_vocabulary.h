// The files of a CLIP tokenizer with next to no merges.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <string>
#include <vector>

namespace calotype::test {

// 256 byte characters, the same with </w>, these merges, bos, eos: the rule of CLIP's vocabulary.
struct TinyVocabulary {
  std::string vocab = "{", merges = "#version: 0.2\n";
  int64_t size = 0;

  explicit TinyVocabulary(const std::vector<std::string>& pairs = {}) {
    auto add = [&](const std::string& token) {
      std::string escaped;
      for (char c : token) {
        if (c == '"' || c == '\\') escaped += '\\';
        escaped += c;
      }
      vocab += fmt::format("{}\"{}\": {}", size ? ", " : "", escaped, size);
      ++size;
    };
    std::vector<int> order;
    for (int b = 33; b < 127; ++b) order.push_back(b);
    for (int b = 161; b < 173; ++b) order.push_back(b);
    for (int b = 174; b < 256; ++b) order.push_back(b);
    for (int b = 0; b < 68; ++b) order.push_back(256 + b);
    for (const char* end : {"", "</w>"}) {
      for (int c : order) {
        std::string utf8;
        if (c < 128) {
          utf8 = static_cast<char>(c);
        } else {
          utf8 += static_cast<char>(0xc0 | (c >> 6));
          utf8 += static_cast<char>(0x80 | (c & 63));
        }
        add(utf8 + end);
      }
    }
    for (const std::string& pair : pairs) {
      merges += pair + "\n";
      std::string joined = pair;
      joined.erase(joined.find(' '), 1);
      add(joined);
    }
    add("<|startoftext|>");
    add("<|endoftext|>");
    vocab += "}";
  }
};

}  // namespace calotype::test
