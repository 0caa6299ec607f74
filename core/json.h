// JSON text to values of the JSON library and back. Its parser and writer take one to two seconds
// to compile in each file that calls them; here they are compiled once, and every syntax error has
// the same form. Who looks into the values includes <nlohmann/json.hpp>.
#pragma once

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

#include "core/error.h"

namespace calotype {

// The value that the text is; one with is_discarded() if it is not JSON, or lists and objects nest
// deeper than 100 levels. Json: nlohmann::json, or ordered_json, which keeps the order of keys.
template <class Json = nlohmann::json>
Json ParseJson(std::string_view text);

// The object that the text is; `on_key` hears each key, inner ones included, before equal keys are
// merged. Errors: E (FileError or ValueError) "{what}: not a JSON object: ..." with line (of a
// text of several) and column, or if lists and objects nest deeper than 100 levels; what on_key
// throws.
template <class E = FileError>
nlohmann::json ParseJsonObject(std::string_view text, std::string_view what,
                               const std::function<void(const std::string&)>& on_key = nullptr);

// In one line, or indented. Errors: ValueError if a string is not UTF-8; so JsonFile.
std::string JsonText(const nlohmann::json& value, int indent = -1);
std::string JsonText(const nlohmann::ordered_json& value, int indent = -1);
std::string JsonText(const std::string& text);  // in quotes
// As a file: indented by 2, a newline at the end.
std::string JsonFile(const nlohmann::json& value);
std::string JsonFile(const nlohmann::ordered_json& value);

}  // namespace calotype
