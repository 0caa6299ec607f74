#include "models/clip_tokenizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>

#include "core/json.h"
#include "models/json_fields.h"

namespace calotype {

namespace {

constexpr std::string_view kOwner = "CLIPTokenizer";
constexpr std::string_view kWordEnd = "</w>";

void AppendUtf8(int32_t character, std::string& text) {
  utf8proc_uint8_t bytes[4];
  auto size = utf8proc_encode_char(character, bytes);
  text.append(reinterpret_cast<const char*>(bytes), static_cast<size_t>(size));
}

// The character that stands for each byte in the vocabulary: printable bytes for themselves, the
// others for U+0100 and up, in order.
const std::array<int32_t, 256>& ByteCharacters() {
  static const std::array<int32_t, 256> characters = [] {
    std::array<int32_t, 256> map;
    int32_t next = 256;
    for (int32_t byte = 0; byte < 256; ++byte) {
      bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
      map[static_cast<size_t>(byte)] = printable ? byte : next++;
    }
    return map;
  }();
  return characters;
}

// Characters of a text. Errors: ValueError at the first byte that is not UTF-8.
std::vector<int32_t> Characters(std::string_view text) {
  std::vector<int32_t> characters;
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  for (size_t i = 0; i < text.size();) {
    utf8proc_int32_t character;
    auto size =
        utf8proc_iterate(bytes + i, static_cast<utf8proc_ssize_t>(text.size() - i), &character);
    Check(size > 0, "{}: the text is not UTF-8 at byte {}", kOwner, i);
    characters.push_back(character);
    i += static_cast<size_t>(size);
  }
  return characters;
}

// Unicode's White_Space, what "\s" means in the tokenizer's pattern.
bool IsSpace(int32_t c) {
  if ((c >= 0x09 && c <= 0x0d) || c == 0x85) return true;
  auto category = utf8proc_category(c);
  return category == UTF8PROC_CATEGORY_ZS || category == UTF8PROC_CATEGORY_ZL ||
         category == UTF8PROC_CATEGORY_ZP;
}
bool IsLetter(int32_t c) {
  auto category = utf8proc_category(c);
  return category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_LO;
}
bool IsNumber(int32_t c) {
  auto category = utf8proc_category(c);
  return category >= UTF8PROC_CATEGORY_ND && category <= UTF8PROC_CATEGORY_NO;
}

// Normal form C, white space runs to one space, lower case.
std::string Normalize(std::string_view text) {
  utf8proc_uint8_t* mapped = nullptr;
  auto size = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                           static_cast<utf8proc_ssize_t>(text.size()), &mapped,
                           static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(mapped, std::free);
  Check(size >= 0, "{}: the text cannot be normalised: {}", kOwner, utf8proc_errmsg(size));
  std::string normal;
  bool space = false;
  for (int32_t c : Characters({reinterpret_cast<const char*>(mapped), static_cast<size_t>(size)})) {
    if (IsSpace(c)) {
      if (!space) normal += ' ';
      space = true;
      continue;
    }
    space = false;
    AppendUtf8(utf8proc_tolower(c), normal);
    // The one character whose lower case is two whatever surrounds it (Unicode's SpecialCasing).
    if (c == 0x130) AppendUtf8(0x307, normal);
  }
  return normal;
}

// The pieces of a normalised text, in order: contractions, runs of letters, single digits, runs of
// other characters. What reads like one of CLIP's special tokens only after lower-casing is split
// like other text, but on its own (with `literals`).
template <class F>
void ForEachPiece(std::string_view text, const F& take, bool literals = true) {
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  auto next = [&](size_t at, int32_t& character) {
    utf8proc_int32_t c;
    auto size = utf8proc_iterate(bytes + at, static_cast<utf8proc_ssize_t>(text.size() - at), &c);
    character = c;
    return at + static_cast<size_t>(size);
  };
  auto prefix = [&](size_t at, std::initializer_list<std::string_view> words) -> size_t {
    for (std::string_view word : words) {
      if (text.substr(at).starts_with(word)) return word.size();
    }
    return 0;
  };
  auto kind = [](int32_t c) { return IsSpace(c) ? 0 : IsLetter(c) ? 1 : IsNumber(c) ? 2 : 3; };
  for (size_t at = 0; at < text.size();) {
    int32_t c;
    size_t end = next(at, c);
    size_t literal = literals ? prefix(at, {"<|startoftext|>", "<|endoftext|>"}) : 0;
    if (literal > 0) {
      end = at + literal;
      ForEachPiece(text.substr(at, literal), take, false);
    } else if (size_t size = prefix(at, {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})) {
      end = at + size;
      take(text.substr(at, size));
    } else if (int k = kind(c); k != 0) {
      while (k != 2 && end < text.size()) {
        size_t after = next(end, c);
        if (kind(c) != k) break;
        end = after;
      }
      take(text.substr(at, end - at));
    }
    at = end;
  }
}

}  // namespace

CLIPTokenizerConfig CLIPTokenizerConfig::FromJson(std::string_view text) {
  CLIPTokenizerConfig c;
  JsonFields fields(kOwner, text);
  fields.Token("bos_token", c.bos_token);
  fields.Token("eos_token", c.eos_token);
  fields.Token("unk_token", c.unk_token);
  fields.Token("pad_token", c.pad_token);
  fields.Field("model_max_length", c.model_max_length);
  Check(c.model_max_length >= 2, "{}: field 'model_max_length' is {}, must be at least 2", kOwner,
        c.model_max_length);
  fields.Only("do_lower_case", true);
  fields.Only("add_prefix_space", false);
  std::string tokenizer_class(kOwner);
  fields.Field("tokenizer_class", tokenizer_class);
  Check<UnsupportedError>(tokenizer_class == kOwner || tokenizer_class == "CLIPTokenizerFast",
                          "{}: tokenizer_class is '{}'", kOwner, tokenizer_class);
  fields.Only("padding_side", "right");
  fields.Only("truncation_side", "right");
  fields.Only("pad_token_type_id", 0);
  // max_length to truncation_strategy: what transformers 5 writes once the tokenizer has been
  // called, the arguments of that call.
  for (const char* name : {"added_tokens_decoder", "backend", "clean_up_tokenization_spaces",
                           "errors", "extra_special_tokens", "is_local", "local_files_only",
                           "name_or_path", "special_tokens_map_file", "tokenizer_file",
                           "max_length", "pad_to_multiple_of", "stride", "truncation_strategy"}) {
    fields.Ignore(name);
  }
  fields.CheckAllRead();
  return c;
}

CLIPTokenizer::CLIPTokenizer(std::string_view vocab_json, std::string_view merges_txt,
                             CLIPTokenizerConfig config)
    : config_(std::move(config)) {
  Check(config_.model_max_length >= 2, "{}: model_max_length {} must be at least 2", kOwner,
        config_.model_max_length);
  // The parser would silently keep the last of two equal keys.
  auto refuse_twice = [this](const std::string& token) {
    const bool is_new = ids_.emplace(token, -1).second;
    Check(is_new, "{}: the vocabulary has token '{}' twice", kOwner, token);
  };
  const nlohmann::json vocabulary = ParseJsonObject<ValueError>(
      vocab_json, fmt::format("{}: the vocabulary", kOwner), refuse_twice);
  for (const auto& [token, id] : vocabulary.items()) {
    Check(id.is_number_integer() && id.get<int64_t>() >= 0 && id.get<int64_t>() < INT32_MAX,
          "{}: the id of token '{}' is {}, expected a small non-negative integer", kOwner, token,
          JsonText(id));
    auto number = id.get<int32_t>();
    ids_[token] = number;
    auto [other, is_new] = tokens_.emplace(number, token);
    Check(is_new, "{}: tokens '{}' and '{}' have the same id {}", kOwner, other->second, token,
          number);
  }
  // Of n distinct ids that are not negative, one is n or larger exactly if one below n is missing.
  for (int32_t id = 0; id < static_cast<int32_t>(tokens_.size()); ++id) {
    Check(tokens_.contains(id), "{}: the vocabulary has {} tokens, but none with id {}", kOwner,
          tokens_.size(), id);
  }

  auto id_of = [this](std::string_view token) {
    auto it = ids_.find(token);
    return it == ids_.end() ? -1 : it->second;
  };
  for (size_t byte = 0; byte < 256; ++byte) {
    std::string character;
    AppendUtf8(ByteCharacters()[byte], character);
    bytes_[byte] = id_of(character);
    last_bytes_[byte] = id_of(character + std::string(kWordEnd));
  }
  bos_ = IdOf(config_.bos_token);
  eos_ = IdOf(config_.eos_token);
  unk_ = IdOf(config_.unk_token);
  pad_ = IdOf(config_.pad_token);

  int64_t line_number = 0;
  int32_t rank = 0;
  while (!merges_txt.empty()) {
    size_t end = std::min(merges_txt.find('\n'), merges_txt.size());
    std::string_view line = merges_txt.substr(0, end);
    merges_txt.remove_prefix(std::min(end + 1, merges_txt.size()));
    if (line.ends_with('\r')) line.remove_suffix(1);
    ++line_number;
    if (line_number == 1) {
      Check(line.starts_with("#version"),
            "{}: line 1 of the merges is '{}', expected '#version...'", kOwner, line);
      continue;
    }
    if (line.empty() && merges_txt.empty()) break;
    size_t space = line.find(' ');
    Check(space != 0 && space < line.size() - 1 && line.find(' ', space + 1) == line.npos,
          "{}: line {} of the merges is '{}', expected two tokens with one space between them",
          kOwner, line_number, line);
    std::string left(line.substr(0, space)), right(line.substr(space + 1));
    auto known = [&](const std::string& token) {
      int32_t id = id_of(token);
      Check(id >= 0, "{}: line {} of the merges needs token '{}', which the vocabulary lacks",
            kOwner, line_number, token);
      return id;
    };
    uint64_t key = static_cast<uint64_t>(known(left)) << 32 | static_cast<uint32_t>(known(right));
    bool is_new = merges_.emplace(key, Merge{rank++, known(left + right)}).second;
    Check(is_new, "{}: line {} of the merges, '{}', is there twice", kOwner, line_number, line);
  }
  Check(line_number > 0, "{}: the merges are empty", kOwner);
}

int64_t CLIPTokenizer::IdOf(std::string_view token) const {
  auto it = ids_.find(token);
  Check(it != ids_.end(), "{}: the vocabulary has no token '{}'", kOwner, token);
  return it->second;
}

void CLIPTokenizer::AppendPiece(std::string_view piece, std::vector<int64_t>& ids) const {
  std::vector<int32_t> symbols;
  for (size_t i = 0; i < piece.size(); ++i) {
    auto byte = static_cast<unsigned char>(piece[i]);
    symbols.push_back(i + 1 == piece.size() ? last_bytes_[byte] : bytes_[byte]);
  }
  auto find = [&](size_t i) -> const Merge* {
    if (symbols[i] < 0 || symbols[i + 1] < 0) return nullptr;
    auto it = merges_.find(static_cast<uint64_t>(symbols[i]) << 32 |
                           static_cast<uint32_t>(symbols[i + 1]));
    return it == merges_.end() ? nullptr : &it->second;
  };
  while (symbols.size() > 1) {
    const Merge* best = nullptr;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      const Merge* merge = find(i);
      if (merge && (!best || merge->rank < best->rank)) best = merge;
    }
    if (!best) break;
    // All places of this merge at once, from left to right.
    size_t out = 0;
    for (size_t i = 0; i < symbols.size(); ++i) {
      bool joins = i + 1 < symbols.size() && find(i) == best;
      symbols[out++] = joins ? best->result : symbols[i];
      i += joins;
    }
    symbols.resize(out);
  }
  for (int32_t symbol : symbols) ids.push_back(symbol < 0 ? unk_ : symbol);
}

void CLIPTokenizer::AddToken(const std::string& token, int64_t first_id, int64_t vectors) {
  Check(!token.empty(), "{}: a token to add has no characters", kOwner);
  for (int32_t c : Characters(token))
    Check(!IsSpace(c) && c >= 32, "{}: the token '{}' has white space in it", kOwner, token);
  const std::string normal = Normalize(token);
  auto known = [&](const std::string& text) {
    return ids_.contains(text) || ids_.contains(text + std::string(kWordEnd));
  };
  Check(!known(token) && !known(normal) &&
            std::ranges::none_of(added_, [&](const Added& a) { return a.normal == normal; }),
        "{}: the vocabulary already has the token '{}'; choose another name", kOwner, token);
  Check(vectors >= 1 && first_id >= vocab_size() && first_id + vectors < INT32_MAX,
        "{}: {} ids from {} on for the token '{}'; the vocabulary has {}", kOwner, vectors,
        first_id, token, vocab_size());
  for (const Added& a : added_) {
    Check(first_id >= a.first_id + a.vectors || first_id + vectors <= a.first_id,
          "{}: another added token has the id {}", kOwner, first_id);
  }
  added_.push_back({normal, static_cast<int32_t>(first_id), static_cast<int32_t>(vectors)});
  for (int64_t i = 0; i < vectors; ++i)
    added_texts_[static_cast<int32_t>(first_id + i)] = i + 1 == vectors ? token : "";
}

int64_t CLIPTokenizer::end_of_ids() const {
  int64_t end = vocab_size();
  for (const Added& a : added_) end = std::max<int64_t>(end, a.first_id + a.vectors);
  return end;
}

void CLIPTokenizer::AppendNormal(std::string_view text, std::vector<int64_t>& ids) const {
  while (!text.empty()) {
    size_t begin = text.size();
    const Added* next = nullptr;  // the added token that comes first, of several there the longest
    for (const Added& a : added_) {
      size_t at = text.find(a.normal);
      if (at < begin || (next && at == begin && a.normal.size() > next->normal.size()))
        begin = at, next = &a;
    }
    ForEachPiece(text.substr(0, begin), [&](std::string_view piece) { AppendPiece(piece, ids); });
    if (!next) return;
    for (int32_t i = 0; i < next->vectors; ++i) ids.push_back(next->first_id + i);
    text.remove_prefix(begin + next->normal.size());
  }
}

std::vector<int64_t> CLIPTokenizer::Tokenize(std::string_view text) const {
  Characters(text);  // names the byte that is not UTF-8
  std::vector<int64_t> ids;
  while (!text.empty()) {
    // The special token that comes first, as it is spelled: lower-casing comes later.
    size_t begin = text.size();
    std::string_view special;
    for (std::string_view token :
         {std::string_view(config_.bos_token), std::string_view(config_.eos_token),
          std::string_view(config_.unk_token), std::string_view(config_.pad_token)}) {
      size_t at = text.find(token);
      if (at < begin || (at == begin && token.size() > special.size())) begin = at, special = token;
    }
    AppendNormal(Normalize(text.substr(0, begin)), ids);
    if (!special.empty()) ids.push_back(IdOf(special));
    text.remove_prefix(std::min(begin + special.size(), text.size()));
  }
  return ids;
}

CLIPTokenizer::Encoded CLIPTokenizer::Encode(std::string_view text) const {
  std::vector<int64_t> own = Tokenize(text);
  auto length = static_cast<size_t>(config_.model_max_length);
  size_t kept = std::min(own.size(), length - 2);
  Encoded result;
  result.tokens = static_cast<int64_t>(own.size());
  result.cut = Decode(std::span(own).subspan(kept));
  result.ids.push_back(bos_);
  result.ids.insert(result.ids.end(), own.begin(), own.begin() + static_cast<std::ptrdiff_t>(kept));
  result.ids.push_back(eos_);
  result.ids.resize(length, pad_);
  return result;
}

Tensor CLIPTokenizer::EncodeAll(std::span<const std::string> texts) const {
  Tensor rows({static_cast<int64_t>(texts.size()), config_.model_max_length}, DType::kI64);
  int64_t* out = rows.data<int64_t>();
  for (const std::string& text : texts) out = std::ranges::copy(Encode(text).ids, out).out;
  return rows;
}

std::string CLIPTokenizer::Decode(std::span<const int64_t> ids) const {
  static const std::map<int32_t, char> bytes = [] {
    std::map<int32_t, char> map;
    for (size_t byte = 0; byte < 256; ++byte) {
      map[ByteCharacters()[byte]] = static_cast<char>(byte);
    }
    return map;
  }();
  std::string joined;
  for (int64_t id : ids) {
    if (auto added = added_texts_.find(static_cast<int32_t>(id));
        id < INT32_MAX && added != added_texts_.end()) {
      joined += added->second;
      if (!added->second.empty()) joined += ' ';
      continue;
    }
    auto it = id < INT32_MAX ? tokens_.find(static_cast<int32_t>(id)) : tokens_.end();
    Check(it != tokens_.end(), "{}: no token has the id {}", kOwner, id);
    if (id == bos_ || id == eos_ || id == pad_) continue;
    std::string_view token = it->second;
    bool ends_word = token.ends_with(kWordEnd);
    if (ends_word) token.remove_suffix(kWordEnd.size());
    for (int32_t character : Characters(token)) {
      auto byte = bytes.find(character);
      if (byte != bytes.end()) {
        joined += byte->second;
      } else {
        AppendUtf8(character, joined);  // a token that was added to the vocabulary as text
      }
    }
    if (ends_word) joined += ' ';
  }
  if (joined.ends_with(' ')) joined.pop_back();
  // A token may be a part of a character.
  std::string text;
  const auto* data = reinterpret_cast<const utf8proc_uint8_t*>(joined.data());
  for (size_t i = 0; i < joined.size();) {
    utf8proc_int32_t character;
    auto size =
        utf8proc_iterate(data + i, static_cast<utf8proc_ssize_t>(joined.size() - i), &character);
    AppendUtf8(size > 0 ? character : 0xfffd, text);
    i += size > 0 ? static_cast<size_t>(size) : 1;
  }
  return text;
}

}  // namespace calotype
