// A struct of options as JSON, a file of its own or a section of one: one with a static
// Visit(options, f) that calls f(name, field, ...) for each field.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>

#include "core/error.h"
#include "core/json.h"
#include "io/file.h"

namespace calotype {

template <class Options>
nlohmann::ordered_json OptionsDocument(const Options& options) {
  nlohmann::ordered_json document;
  Options::Visit(options,
                 [&](const char* name, const auto& field, auto...) { document[name] = field; });
  return document;
}

template <class Options>
std::string OptionsToJson(const Options& options) {
  return JsonFile(OptionsDocument(options));
}

// The options of the object `section` of the text, or, if that is empty, of all of it except the
// objects named in `sections`. `path` is for errors: FileError naming the file and a missing, wrong
// or unknown field.
template <class Options>
Options ParseOptions(std::string_view text, const std::filesystem::path& path,
                     const std::string& section = "", std::set<std::string> sections = {}) {
  Options options;
  try {
    auto document = ParseJsonObject(text, path.string() + ": not a training options file");
    if (!section.empty()) document = nlohmann::json(document.at(section));
    Check<FileError>(document.is_object(), "{}: not a training options file", path.string());
    std::set<std::string>& known = sections;
    const std::string prefix = section.empty() ? "" : section + ".";
    Options::Visit(options, [&](const char* name, auto& field, auto...) {
      known.insert(name);
      Check<FileError>(document.contains(name),
                       "{}: the field `{}{}` is missing; a run of an earlier version of the "
                       "program cannot be continued",
                       path.string(), prefix, name);
      try {
        document.at(name).get_to(field);
      } catch (const nlohmann::json::exception&) {
        Fail<FileError>("{}: the field `{}{}` is {}, of the wrong type", path.string(), prefix,
                        name, JsonText(document.at(name)));
      }
    });
    for (const auto& [name, value] : document.items()) {
      Check<FileError>(known.count(name) == 1, "{}: unknown field {}", path.string(),
                       Quoted(prefix + name));
    }
  } catch (const nlohmann::json::exception& e) {
    Fail<FileError>("{}: not a training options file: {}", path.string(), e.what());
  }
  return options;
}

}  // namespace calotype
