// A parsing expression grammar, as compel's own: alternatives are tried in order, the first that
// fits counts. Each rule is a function from a position to a match; those that the grammar tries
// again at one position remember their results, so that nesting costs no more than its length.
#include "models/prompt_compel.h"

#include <charconv>
#include <cmath>
#include <map>
#include <numeric>
#include <optional>
#include <utility>

#include "core/error.h"

namespace calotype {
namespace {

constexpr int kDeepest = 60;
constexpr double kPlus = 1.1, kMinus = 0.9;
constexpr std::string_view kSyntax = "()\",.+-=";

bool IsDigit(char c) { return c >= '0' && c <= '9'; }
// What the grammar skips before a symbol, and what ends a word.
bool IsBlank(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }
bool IsSpace(char c) { return IsBlank(c) || c == '\v' || c == '\f'; }
bool IsSyntax(char c) { return kSyntax.find(c) != kSyntax.npos; }
bool IsKeyword(char c) {
  return IsDigit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || c == '-';
}

using Fragments = std::vector<WeightedText>;

struct Match {
  size_t end = 0;
  Fragments fragments;
};
using Result = std::optional<Match>;

Fragments Scaled(Fragments fragments, double weight) {
  for (WeightedText& fragment : fragments) fragment.weight *= weight;
  return fragments;
}

void Append(Fragments& to, Fragments&& from) {
  for (WeightedText& fragment : from) to.push_back(std::move(fragment));
}

void ReplaceAll(std::string& text, std::string_view from, std::string_view to) {
  for (size_t at = text.find(from); at != text.npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
}

WeightedText Fragment(std::string_view text) {
  std::string plain(text);
  for (const char* escaped : {"\\(", "\\)", "\\\""}) ReplaceAll(plain, escaped, escaped + 1);
  return {plain, 1};
}

// Neighbours of equal weight become one; an empty list one empty fragment.
Fragments Fused(Fragments fragments) {
  Fragments fused;
  for (WeightedText& fragment : fragments) {
    if (!fused.empty() && fused.back().weight == fragment.weight) {
      fused.back().text += " " + fragment.text;
    } else {
      fused.push_back(std::move(fragment));
    }
  }
  if (fused.empty()) fused.push_back({"", 1});
  return fused;
}

class Parser {
 public:
  Parser(std::string_view text, int depth) : text_(text), depth_(depth) { CheckDepth(); }

  // A whole prompt as a user writes it.
  CompelPrompt Root();

 private:
  enum class Rule : uint8_t { kAttention, kParenthesized, kQuoted };

  void CheckDepth() const {
    Check(depth_ <= kDeepest, "prompt: brackets and quotes are nested deeper than {}", kDeepest);
  }
  size_t Skip(size_t at) const {
    while (at < text_.size() && IsBlank(text_[at])) ++at;
    return at;
  }
  // The end of `symbol` behind blanks.
  std::optional<size_t> Symbol(size_t at, std::string_view symbol) const {
    at = Skip(at);
    if (!text_.substr(std::min(at, text_.size())).starts_with(symbol)) return std::nullopt;
    return at + symbol.size();
  }
  Result Remember(Rule rule, size_t at, Result (Parser::*parse)(size_t));

  Result Word(size_t at) const;
  Result Quoted(size_t at) { return Remember(Rule::kQuoted, Skip(at), &Parser::ParseQuoted); }
  Result Parenthesized(size_t at) {
    return Remember(Rule::kParenthesized, Skip(at), &Parser::ParseParenthesized);
  }
  Result Attention(size_t at) {
    return Remember(Rule::kAttention, Skip(at), &Parser::ParseAttention);
  }
  Result ParseQuoted(size_t at);
  Result ParseParenthesized(size_t at);
  Result ParseAttention(size_t at);
  Result Target(size_t at);
  void RefuseUnsupported(size_t at);
  // The inside of brackets and quotes, and of a whole prompt; as far as it goes.
  Match Inside(size_t at);
  Match Prompt(size_t at);
  // The text between quotes at `at`, unescaped.
  std::optional<std::pair<std::string, size_t>> QuotedText(size_t at) const;
  // The factor that an operator behind a target stands for.
  std::optional<std::pair<double, size_t>> Signs(size_t at) const;
  std::optional<std::pair<double, size_t>> Number(size_t at) const;

  struct Operation {
    std::string name;  // ".blend", ".and"
    std::vector<Fragments> targets;
    std::vector<std::string> options;
    size_t end = 0;
  };
  // ("a", "b").name(options)
  std::optional<Operation> ParseOperation();

  std::string_view text_;
  int depth_;
  std::map<std::pair<Rule, size_t>, Result> known_;
};

Result Parser::Remember(Rule rule, size_t at, Result (Parser::*parse)(size_t)) {
  auto it = known_.find({rule, at});
  if (it != known_.end()) return it->second;
  Result result = (this->*parse)(at);
  known_[{rule, at}] = result;
  return result;
}

// Characters without a meaning of their own: escaped symbols, a sign in front of one, any others.
Result Parser::Word(size_t at) const {
  at = Skip(at);
  size_t begin = at;
  while (at < text_.size()) {
    char c = text_[at], next = at + 1 < text_.size() ? text_[at + 1] : ' ';
    if (c == '\\' && at + 1 < text_.size() && IsSyntax(next)) {
      at += 2;
    } else if ((c == '+' || c == '-') ? !IsSpace(next) && !IsSyntax(next)
                                      : !IsSpace(c) && !IsSyntax(c)) {
      ++at;
    } else {
      break;
    }
  }
  if (at == begin) return std::nullopt;
  return Match{at, {Fragment(text_.substr(begin, at - begin))}};
}

std::optional<std::pair<double, size_t>> Parser::Signs(size_t at) const {
  if (at >= text_.size() || (text_[at] != '+' && text_[at] != '-')) return std::nullopt;
  size_t end = at;
  while (end < text_.size() && text_[end] == text_[at]) ++end;
  double base = text_[at] == '+' ? kPlus : kMinus;
  return std::pair{std::pow(base, static_cast<double>(end - at)), end};
}

std::optional<std::pair<double, size_t>> Parser::Number(size_t at) const {
  size_t end = at;
  if (end < text_.size() && (text_[end] == '+' || text_[end] == '-')) ++end;
  size_t digits = 0, points = 0;
  for (; end < text_.size(); ++end) {
    if (IsDigit(text_[end])) {
      ++digits;
    } else if (text_[end] == '.' && points == 0) {
      ++points;
    } else {
      break;
    }
  }
  // A whole number has no plus sign.
  if (digits == 0 || (points == 0 && text_[at] == '+')) return std::nullopt;
  size_t begin = text_[at] == '+' ? at + 1 : at;
  double value = 0;
  std::from_chars(text_.data() + begin, text_.data() + end, value);
  return std::pair{value, end};
}

std::optional<std::pair<std::string, size_t>> Parser::QuotedText(size_t at) const {
  if (at >= text_.size() || text_[at] != '"') return std::nullopt;
  std::string inside;
  for (size_t i = at + 1; i < text_.size() && text_[i] != '\n' && text_[i] != '\r'; ++i) {
    if (text_[i] == '\\' && i + 1 < text_.size() && text_[i + 1] == '"') {
      inside += text_[++i];
    } else if (text_[i] == '"') {
      return std::pair{inside, i + 1};
    } else {
      inside += text_[i];
    }
  }
  return std::nullopt;
}

Result Parser::ParseQuoted(size_t at) {
  auto quoted = QuotedText(at);
  if (!quoted) return std::nullopt;
  auto& [inside, end] = *quoted;
  if (inside.find_first_not_of(" \t\n\r\v\f") == inside.npos) return Match{end, {{"", 1}}};
  ReplaceAll(inside, "\"", "\\\"");
  Parser parser(inside, depth_ + 1);
  Match match = parser.Inside(0);
  if (parser.Skip(match.end) != inside.size()) return std::nullopt;
  return Match{end, std::move(match.fragments)};
}

Result Parser::ParseParenthesized(size_t at) {
  if (at >= text_.size() || text_[at] != '(') return std::nullopt;
  ++depth_;
  CheckDepth();
  Match inside = Inside(at + 1);
  --depth_;
  auto end = Symbol(inside.end, ")");
  if (!end) return std::nullopt;
  return Match{*end, std::move(inside.fragments)};
}

Result Parser::Target(size_t at) {
  if (Result quoted = Quoted(at)) return quoted;
  if (Result parenthesized = Parenthesized(at)) return parenthesized;
  return Word(at);
}

Result Parser::ParseAttention(size_t at) {
  Result target = Target(at);
  if (target) {
    auto open = Symbol(target->end, ".attend");
    if (open) open = Symbol(*open, "(");
    if (open) {
      size_t argument = Skip(*open);
      auto weight = Signs(argument);
      if (!weight) weight = Number(argument);
      auto close = weight ? Symbol(weight->second, ")") : std::nullopt;
      if (close) return Match{*close, Scaled(target->fragments, weight->first)};
    }
  }
  // Without a blank in between. Only brackets and quotes take a number: "model 1.5" is text.
  bool bracket = at < text_.size() && (text_[at] == '(' || text_[at] == '"');
  if (!target) return std::nullopt;
  auto weight = Signs(target->end);
  if (!weight && bracket) weight = Number(target->end);
  if (!weight) return std::nullopt;
  return Match{weight->second, Scaled(std::move(target->fragments), weight->first)};
}

void Parser::RefuseUnsupported(size_t at) {
  for (const char* lora : {"useLora", "withLora"}) {
    auto open = Symbol(at, lora);
    if (open) open = Symbol(*open, "(");
    Check<UnsupportedError>(!open, "prompt: {}(...) is not supported", lora);
  }
  if (Result target = Target(at)) {
    auto open = Symbol(target->end, ".swap");
    if (open) open = Symbol(*open, "(");
    Check<UnsupportedError>(!open,
                            "prompt: .swap(...) is not supported; edit the picture by a second "
                            "prompt instead (Prompt-to-Prompt)");
  }
}

Match Parser::Inside(size_t at) {
  Match match{at, {}};
  for (;;) {
    RefuseUnsupported(match.end);
    Result next = Attention(match.end);
    if (!next) next = Parenthesized(match.end);
    if (!next) next = Quoted(match.end);
    if (!next) next = Word(match.end);
    size_t mark = Skip(match.end);
    if (!next && mark < text_.size() && (text_[mark] == ',' || text_[mark] == '.')) {
      next = Match{mark + 1, {{std::string(1, text_[mark]), 1}}};
    }
    if (!next) return match;
    match.end = next->end;
    Append(match.fragments, std::move(next->fragments));
  }
}

Match Parser::Prompt(size_t at) {
  Match match{at, {}};
  while (match.end < text_.size()) {
    RefuseUnsupported(match.end);
    Result next = Attention(match.end);
    if (!next) next = Quoted(match.end);
    if (!next) next = Parenthesized(match.end);
    if (!next) {
      size_t end = match.end;
      while (end < text_.size() && !IsSpace(text_[end])) ++end;
      bool blank = end == match.end;
      next = Match{blank ? end + 1 : end, {}};
      if (!blank) next->fragments = {Fragment(text_.substr(match.end, end - match.end))};
    }
    match.end = next->end;
    Append(match.fragments, std::move(next->fragments));
  }
  return match;
}

std::optional<Parser::Operation> Parser::ParseOperation() {
  Operation operation;
  auto at = Symbol(0, "(");
  while (at) {
    Result target = Target(*at);
    if (!target) {  // quotes around what only a whole prompt may hold
      auto quoted = QuotedText(Skip(*at));
      if (!quoted) return std::nullopt;
      ReplaceAll(quoted->first, "\"", "\\\"");
      target = Match{quoted->second, Parser(quoted->first, depth_ + 1).Prompt(0).fragments};
    }
    operation.targets.push_back(std::move(target->fragments));
    at = Symbol(target->end, ",");
    if (!at) {
      at = Symbol(target->end, ")");
      break;
    }
  }
  if (!at) return std::nullopt;
  for (const char* name : {".blend", ".and", ".add"}) {
    if (auto end = Symbol(*at, name)) {
      operation.name = name;
      at = Symbol(*end, "(");
      break;
    }
  }
  if (operation.name.empty() || !at) return std::nullopt;
  if (auto end = Symbol(*at, ")")) {
    operation.end = *end;
    return operation;
  }
  for (;;) {
    size_t begin = Skip(*at), end = begin;
    if (auto number = Number(begin)) {
      end = number->second;
    } else {
      while (end < text_.size() && IsKeyword(text_[end])) ++end;
    }
    if (end == begin) return std::nullopt;
    operation.options.emplace_back(text_.substr(begin, end - begin));
    if (auto close = Symbol(end, ")")) {
      operation.end = *close;
      return operation;
    }
    at = Symbol(end, ",");
    if (!at) return std::nullopt;
  }
}

// The numbers of an operation: as many as targets, or none.
std::vector<double> Weights(const std::vector<std::string>& options, size_t targets,
                            std::string_view name) {
  if (options.empty()) return std::vector<double>(targets, 1);
  std::vector<double> weights;
  for (const std::string& option : options) {
    const char* begin = option.data() + (option.starts_with('+') ? 1 : 0);
    const char* last = option.data() + option.size();
    double weight = 0;
    auto [end, error] = std::from_chars(begin, last, weight);
    Check(error == std::errc() && end == last && std::isfinite(weight),
          "prompt: `{}` in {}(...) is no weight", option, name);
    weights.push_back(weight);
  }
  Check(weights.size() == targets, "prompt: {}(...) has {} weights for {} prompts", name,
        weights.size(), targets);
  return weights;
}

CompelPrompt Parser::Root() {
  CompelPrompt prompt;
  std::optional<Operation> operation = ParseOperation();
  if (!operation) {
    prompt.parts.push_back({{Fused(Prompt(0).fragments)}, {1}});
    prompt.weights = {1};
    return prompt;
  }
  Check(Skip(operation->end) == text_.size(), "prompt: \"{}\" behind {}(...) would be lost",
        text_.substr(operation->end), operation->name);
  std::vector<Fragments> targets;
  for (Fragments& target : operation->targets) targets.push_back(Fused(std::move(target)));
  if (operation->name == ".blend") {
    CompelBlend blend{.prompts = std::move(targets)};
    if (!operation->options.empty() && operation->options.back() == "no_normalize") {
      blend.normalize = false;
      operation->options.pop_back();
    }
    blend.weights = Weights(operation->options, blend.prompts.size(), operation->name);
    double sum = std::accumulate(blend.weights.begin(), blend.weights.end(), 0.0);
    Check(!blend.normalize || sum != 0,
          "prompt: the weights of .blend(...) add to 0; add no_normalize or change them");
    prompt.parts.push_back(std::move(blend));
    prompt.weights = {1};
  } else {
    prompt.weights = Weights(operation->options, targets.size(), operation->name);
    for (Fragments& target : targets) prompt.parts.push_back({{std::move(target)}, {1}});
  }
  return prompt;
}

}  // namespace

CompelPrompt ParseCompel(std::string_view text) {
  // A comma ends a word.
  std::string spaced;
  for (size_t i = 0; i < text.size(); ++i) {
    spaced += text[i];
    if (text[i] == ',' && i + 1 < text.size() && !IsSpace(text[i + 1])) spaced += ' ';
  }
  return Parser(spaced, 0).Root();
}

}  // namespace calotype
