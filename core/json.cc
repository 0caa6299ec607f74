#include "core/json.h"

#include <algorithm>
#include <nlohmann/json.hpp>

namespace calotype {
namespace {

// "parse error at line 1, column 5: ..." of the library's text, without the part of the input that
// it repeats: that may be long and need not be UTF-8.
std::string Reason(std::string_view text) {
  constexpr size_t kLongest = 200;  // a number may be as long
  if (text.starts_with('[')) text.remove_prefix(std::min(text.size(), text.find(']') + 2));
  return std::string(text.substr(0, std::min(text.find("; last read"), kLongest)));
}

// The library's writer and destructors call themselves for each level of nesting, so that a file of
// brackets alone would take the program's stack.
constexpr int kMostNested = 100;

// True if brackets outside strings nest deeper. What the parser reads before it stops at an error
// is counted as it reads it.
bool NestsTooDeep(std::string_view text) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kMostNested) return true;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

template <class Json>
std::string Written(const Json& value, int indent) {
  try {
    return value.dump(indent);
  } catch (const nlohmann::json::exception& error) {
    Fail("JSON: {}", Reason(error.what()));
  }
}

}  // namespace

template <class Json>
Json ParseJson(std::string_view text) {
  if (NestsTooDeep(text)) return Json(Json::value_t::discarded);
  return Json::parse(text, nullptr, /*allow_exceptions=*/false);
}
template nlohmann::json ParseJson(std::string_view);
template nlohmann::ordered_json ParseJson(std::string_view);

template <class E>
nlohmann::json ParseJsonObject(std::string_view text, std::string_view what,
                               const std::function<void(const std::string&)>& on_key) {
  using nlohmann::json;
  Check<E>(!NestsTooDeep(text), "{}: not a JSON object: nested deeper than {} levels", what,
           kMostNested);
  json value;
  try {
    json::parser_callback_t hear;
    if (on_key) {
      hear = [&](int, json::parse_event_t event, json& key) {
        if (event == json::parse_event_t::key) on_key(key.get_ref<const std::string&>());
        return true;
      };
    }
    value = json::parse(text, hear);
  } catch (const json::exception& error) {
    std::string reason = Reason(error.what());
    // A text of one line may itself be a line of a file, which `what` names.
    constexpr std::string_view kLine = "line 1, ";
    const size_t at = reason.find(kLine);
    if (at != reason.npos && text.find('\n') == text.npos) reason.erase(at, kLine.size());
    Fail<E>("{}: not a JSON object: {}", what, reason);
  }
  Check<E>(value.is_object(), "{}: not a JSON object: it is {} {}", what,
           value.is_array() ? "an" : "a", value.type_name());
  return value;
}
template nlohmann::json ParseJsonObject<FileError>(std::string_view, std::string_view,
                                                   const std::function<void(const std::string&)>&);
template nlohmann::json ParseJsonObject<ValueError>(std::string_view, std::string_view,
                                                    const std::function<void(const std::string&)>&);

std::string JsonText(const nlohmann::json& value, int indent) { return Written(value, indent); }
std::string JsonText(const nlohmann::ordered_json& value, int indent) {
  return Written(value, indent);
}
std::string JsonText(const std::string& text) { return Written(nlohmann::json(text), -1); }
std::string JsonFile(const nlohmann::json& value) { return Written(value, 2) + "\n"; }
std::string JsonFile(const nlohmann::ordered_json& value) { return Written(value, 2) + "\n"; }

}  // namespace calotype
