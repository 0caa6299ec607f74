#include "models/prompt_a1111.h"

#include <algorithm>
#include <charconv>
#include <memory>
#include <optional>
#include <set>

#include "core/error.h"

namespace calotype {
namespace {

constexpr size_t kDeepest = 200;  // nested brackets of a schedule

bool IsSpace(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
bool IsDigit(char c) { return c >= '0' && c <= '9'; }
// Bytes above 127 belong to words of other languages.
bool IsWord(char c) {
  return IsDigit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' ||
         static_cast<unsigned char>(c) >= 128;
}

std::string_view StripRight(std::string_view text) {
  while (!text.empty() && IsSpace(text.back())) text.remove_suffix(1);
  return text;
}
std::string_view Strip(std::string_view text) {
  while (!text.empty() && IsSpace(text.front())) text.remove_prefix(1);
  return StripRight(text);
}

// The number that `text` is, all of it, with an optional sign.
std::optional<double> ParseNumber(std::string_view text) {
  bool positive = text.starts_with('+');
  if (positive) text.remove_prefix(1);
  if (text.empty() || (positive && text[0] == '-')) return std::nullopt;
  // from_chars also reads "inf" and "nan".
  if (!IsDigit(text[0]) && text[0] != '.' && text[0] != '-') return std::nullopt;
  double value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// Positions of `word` in `text` where it stands alone.
std::vector<size_t> FindWord(std::string_view text, std::string_view word) {
  std::vector<size_t> found;
  for (size_t at = text.find(word); at != text.npos; at = text.find(word, at + word.size())) {
    size_t end = at + word.size();
    if (at > 0 && IsWord(text[at - 1])) continue;
    if (end < text.size() && IsWord(text[end])) continue;
    found.push_back(at);
  }
  return found;
}

// The text at `at` if it is ": 1.3 )", with its end.
struct Factor {
  std::string_view number;
  size_t end;
};
std::optional<Factor> MatchFactor(std::string_view text, size_t at) {
  size_t i = at + 1;
  while (i < text.size() && IsSpace(text[i])) ++i;
  size_t begin = i;
  if (i < text.size() && (text[i] == '+' || text[i] == '-')) ++i;
  size_t digits = i;
  while (i < text.size() && (IsDigit(text[i]) || text[i] == '.')) ++i;
  if (i == digits) return std::nullopt;
  size_t end = i;
  while (i < text.size() && IsSpace(text[i])) ++i;
  if (i == text.size() || text[i] != ')') return std::nullopt;
  return Factor{text.substr(begin, end - begin), i + 1};
}

}  // namespace

// ---------------------------------------------------------------- weights

std::vector<WeightedText> ParseA1111Weights(std::string_view text) {
  constexpr double kRound = 1.1, kSquare = 1 / 1.1;
  std::vector<WeightedText> runs;
  std::vector<size_t> round, square;  // first runs of the open brackets
  auto multiply = [&](size_t begin, double factor) {
    for (size_t i = begin; i < runs.size(); ++i) {
      if (!runs[i].IsBreak()) runs[i].weight *= factor;
    }
  };
  auto close = [&](std::vector<size_t>& open, double factor) {
    multiply(open.back(), factor);
    open.pop_back();
  };
  auto add_text = [&](std::string_view part) {
    size_t begin = 0;
    for (size_t at : FindWord(part, "BREAK")) {
      std::string_view before = StripRight(part.substr(begin, at - begin));
      runs.push_back({std::string(begin > 0 ? Strip(before) : before), 1});
      runs.push_back({"BREAK", -1});
      begin = at + 5;
    }
    std::string_view rest = part.substr(begin);
    while (begin > 0 && !rest.empty() && IsSpace(rest.front())) rest.remove_prefix(1);
    runs.push_back({std::string(rest), 1});
  };
  for (size_t i = 0; i < text.size();) {
    char c = text[i];
    std::optional<Factor> factor = c == ':' ? MatchFactor(text, i) : std::nullopt;
    if (c == '\\') {
      bool escapes = i + 1 < text.size() && std::string_view("()[]\\").find(text[i + 1]) < 5;
      runs.push_back({escapes ? std::string(1, text[i + 1]) : "", 1});
      i += escapes ? 2 : 1;
    } else if (c == '(' || c == '[') {
      (c == '(' ? round : square).push_back(runs.size());
      ++i;
    } else if (factor && !round.empty()) {
      std::optional<double> value = ParseNumber(factor->number);
      Check(value.has_value(), "prompt: the weight in \"{}\" is no number",
            text.substr(i, factor->end - i));
      close(round, *value);
      i = factor->end;
    } else if (factor) {
      add_text(text.substr(i, factor->end - i));
      i = factor->end;
    } else if (c == ')' && !round.empty()) {
      close(round, kRound);
      ++i;
    } else if (c == ']' && !square.empty()) {
      close(square, kSquare);
      ++i;
    } else {
      size_t end = c == ')' || c == ']' || c == ':' ? i + 1 : text.find_first_of("\\()[]:", i);
      end = std::min(end, text.size());
      add_text(text.substr(i, end - i));
      i = end;
    }
  }
  for (size_t begin : round) multiply(begin, kRound);
  for (size_t begin : square) multiply(begin, kSquare);

  std::vector<WeightedText> merged;
  for (WeightedText& run : runs) {
    bool joins = !merged.empty() && merged.back().weight == run.weight &&
                 !merged.back().IsBreak() && !run.IsBreak();
    if (joins) {
      merged.back().text += run.text;
    } else {
      merged.push_back(std::move(run));
    }
  }
  if (merged.empty()) merged.push_back({"", 1});
  return merged;
}

// ---------------------------------------------------------------- schedules

namespace {

// Texts and choices in order.
struct Sequence;
struct Choice {
  enum class Kind : uint8_t { kText, kSwitch, kAlternate } kind = Kind::kText;
  std::string text;
  std::vector<Sequence> options;  // of a switch: before, after
  double when = 0;
};
struct Sequence {
  std::vector<Choice> parts;

  void Add(std::string_view text) {
    if (parts.empty() || parts.back().kind != Choice::Kind::kText) parts.emplace_back();
    parts.back().text += text;
  }
  void Add(Sequence&& other) {
    for (Choice& part : other.parts) {
      if (part.kind == Choice::Kind::kText) {
        Add(part.text);
      } else {
        parts.push_back(std::move(part));
      }
    }
  }
};

// A bracket that is open, with what stands between its separators so far.
struct Bracket {
  char open = 0;  // '(' or '[', 0 for the whole text
  std::vector<Sequence> parts = std::vector<Sequence>(1);
  std::string separators;  // ':' and '|' between the parts, in a '['
  bool broken = false;     // a bracket in it does not fit: it is text itself
};

// All of a bracket as text, from its opening to before its closing.
Sequence AsText(Bracket&& bracket) {
  Sequence all;
  if (bracket.open) all.Add(std::string_view(&bracket.open, 1));
  for (size_t i = 0; i < bracket.parts.size(); ++i) {
    if (i > 0) all.Add(std::string_view(&bracket.separators[i - 1], 1));
    all.Add(std::move(bracket.parts[i]));
  }
  return all;
}

// The text of a part if it is only that.
std::optional<std::string> PlainText(const Sequence& part) {
  if (part.parts.empty()) return "";
  if (part.parts.size() > 1 || part.parts[0].kind != Choice::Kind::kText) return std::nullopt;
  return part.parts[0].text;
}

// Joins the parts of a bracket that "|" separates: in a schedule it is text.
void JoinBars(Bracket& bracket) {
  std::vector<Sequence> parts;
  std::string separators;
  for (size_t i = 0; i < bracket.parts.size(); ++i) {
    if (i > 0 && bracket.separators[i - 1] == '|') {
      parts.back().Add("|");
      parts.back().Add(std::move(bracket.parts[i]));
    } else {
      if (i > 0) separators += ':';
      parts.push_back(std::move(bracket.parts[i]));
    }
  }
  bracket.parts = std::move(parts);
  bracket.separators = std::move(separators);
}

// What a closed '[' stands for.
Sequence Close(Bracket&& bracket) {
  Sequence result;
  auto colons = std::count(bracket.separators.begin(), bracket.separators.end(), ':');
  std::optional<double> when;
  if (!bracket.broken && (colons == 1 || colons == 2) && bracket.separators.back() == ':') {
    if (auto text = PlainText(bracket.parts.back())) when = ParseNumber(Strip(*text));
  }
  if (when) {
    JoinBars(bracket);
    Choice choice{.kind = Choice::Kind::kSwitch, .when = *when};
    choice.options.resize(2);
    if (colons == 2) choice.options[0] = std::move(bracket.parts[0]);
    choice.options[1] = std::move(bracket.parts[static_cast<size_t>(colons) - 1]);
    result.parts.push_back(std::move(choice));
  } else if (!bracket.broken && colons == 0 && !bracket.separators.empty()) {
    result.parts.push_back({.kind = Choice::Kind::kAlternate, .options = std::move(bracket.parts)});
  } else {
    result = AsText(std::move(bracket));
    result.Add("]");
  }
  return result;
}

Sequence ParseSequence(std::string_view text) {
  std::vector<Bracket> open(1);
  // Ends the innermost bracket as `content`.
  auto end = [&](Sequence&& content, bool broken) {
    open.pop_back();
    open.back().broken |= broken;
    open.back().parts.back().Add(std::move(content));
  };
  for (size_t i = 0; i < text.size(); ++i) {
    Bracket& top = open.back();
    char c = text[i];
    if (c == '\\' && i + 1 < text.size()) {
      top.parts.back().Add(text.substr(i++, 2));
    } else if (c == '(' || c == '[') {
      Check(open.size() <= kDeepest, "prompt: brackets are nested deeper than {}", kDeepest);
      open.push_back({.open = c});
    } else if ((c == ')' && top.open == '(') || (c == ']' && top.open == '[')) {
      bool broken = top.broken;
      if (c == ']') {
        end(Close(std::move(top)), broken);
      } else {
        Sequence content = AsText(std::move(top));
        content.Add(")");
        end(std::move(content), broken);
      }
    } else if ((c == ':' || c == '|') && top.open == '[') {
      top.separators += c;
      top.parts.emplace_back();
    } else {
      top.broken |= c == ')' || c == ']';
      top.parts.back().Add(text.substr(i, 1));
    }
  }
  while (open.size() > 1) end(AsText(std::move(open.back())), true);
  return std::move(open[0].parts[0]);
}

// The last step of `before`.
int64_t SwitchStep(double when, int64_t steps) {
  double step = when < 1 ? when * static_cast<double>(steps) : when;
  return step >= static_cast<double>(steps) ? steps : static_cast<int64_t>(std::max(step, 0.0));
}

void CollectSteps(const Sequence& sequence, int64_t steps, std::set<int64_t>& ends) {
  for (const Choice& part : sequence.parts) {
    if (part.kind == Choice::Kind::kSwitch) {
      if (int64_t step = SwitchStep(part.when, steps); step >= 1) ends.insert(step);
    } else if (part.kind == Choice::Kind::kAlternate) {
      for (int64_t step = 1; step <= steps; ++step) ends.insert(step);
    }
    for (const Sequence& option : part.options) CollectSteps(option, steps, ends);
  }
}

std::string TextAt(const Sequence& sequence, int64_t step, int64_t steps) {
  std::string text;
  for (const Choice& part : sequence.parts) {
    switch (part.kind) {
      case Choice::Kind::kText:
        text += part.text;
        break;
      case Choice::Kind::kSwitch:
        text += TextAt(part.options[step <= SwitchStep(part.when, steps) ? 0 : 1], step, steps);
        break;
      case Choice::Kind::kAlternate: {
        auto count = static_cast<int64_t>(part.options.size());
        text += TextAt(part.options[static_cast<size_t>((step - 1) % count)], step, steps);
        break;
      }
    }
  }
  return text;
}

}  // namespace

std::vector<ScheduledText> ParseA1111Schedule(std::string_view text, int64_t steps) {
  Check(steps >= 1, "prompt: a schedule over {} steps, must be at least 1", steps);
  Sequence sequence = ParseSequence(text);
  std::set<int64_t> ends = {steps};
  CollectSteps(sequence, steps, ends);
  std::vector<ScheduledText> result;
  for (int64_t step : ends) result.push_back({step, TextAt(sequence, step, steps)});
  return result;
}

// ---------------------------------------------------------------- compositions

std::vector<WeightedText> ParseA1111Composition(std::string_view text) {
  std::vector<size_t> ands = FindWord(text, "AND");
  std::vector<WeightedText> parts;
  size_t begin = 0;
  for (size_t i = 0; i <= ands.size(); ++i) {
    size_t end = i < ands.size() ? ands[i] : text.size();
    std::string_view part = StripRight(text.substr(begin, end - begin));
    double weight = 1;
    size_t colon = part.rfind(':');
    if (colon != part.npos) {
      std::string_view number = Strip(part.substr(colon + 1));
      // Digits with at most one point: an exponent is text.
      bool plain = number.find_first_not_of("+-.0123456789") == number.npos;
      if (auto value = plain ? ParseNumber(number) : std::nullopt) {
        weight = *value;
        part = StripRight(part.substr(0, colon));
      }
    }
    parts.push_back({std::string(part), weight});
    begin = end + 3;
  }
  return parts;
}

}  // namespace calotype
