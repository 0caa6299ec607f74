// Configurations as flat JSON objects. A configuration lists its fields once, in a function
//   template <class C, class Fields> void VisitFields(C& config, Fields& fields)
// that JsonFields runs to read (every field has a type, none is overlooked) and JsonWriter to
// write.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.h"

namespace calotype {

// Written into configs as _diffusers_version: that of the golden files.
constexpr const char* kDiffusersVersion = "0.42.1";

class JsonWriter {
 public:
  template <class T>
  void Field(const std::string& name, const T& value) {
    object_[name] = value;
  }
  template <class T>
  void Field(const std::string& name, const std::optional<T>& value) {
    object_[name] = value ? nlohmann::json(*value) : nlohmann::json(nullptr);
  }
  void Number(const std::string& name, double value) {
    const bool whole = std::abs(value) < 1e15 && std::trunc(value) == value;
    object_[name] = whole ? nlohmann::json(static_cast<int64_t>(value)) : nlohmann::json(value);
  }
  template <class T>
  void OneOrMany(const std::string& name, const std::vector<T>& values) {
    if (AllEqual(values)) {
      object_[name] = static_cast<T>(values[0]);
    } else {
      object_[name] = values;
    }
  }
  void Only(const std::string& name, const nlohmann::json& value) { object_[name] = value; }
  void Ignore(const std::string& name,
              const nlohmann::json& written = nlohmann::json::value_t::discarded) {
    if (!written.is_discarded()) object_[name] = written;
  }
  // Sorted keys, indented by 2, a newline at the end.
  std::string Text() const { return object_.dump(2) + "\n"; }

  template <class T>
  static bool AllEqual(const std::vector<T>& list) {
    return std::adjacent_find(list.begin(), list.end(), std::not_equal_to<>()) == list.end();
  }

 private:
  nlohmann::json object_ = nlohmann::json::object();
};

class JsonFields {
 public:
  // `owner` names the configuration in messages. Errors: ValueError if `text` is not a JSON object.
  JsonFields(std::string_view owner, std::string_view text) : owner_(owner) {
    try {
      object_ = nlohmann::json::parse(text);
    } catch (const nlohmann::json::exception& error) {
      Fail("{}: the configuration is not JSON: {}", owner_, error.what());
    }
    Check(object_.is_object(), "{}: the configuration must be a JSON object", owner_);
  }

  // Sets `value` if the field is there. Errors: ValueError for another type of value.
  template <class T>
  void Field(const std::string& name, T& value) {
    const nlohmann::json* field = Take(name);
    if (field) Convert(name, *field, value);
  }
  // A field that may be null.
  template <class T>
  void Field(const std::string& name, std::optional<T>& value) {
    const nlohmann::json* field = Take(name);
    if (!field) return;
    value.reset();
    if (!field->is_null()) Convert(name, *field, value.emplace());
  }
  // A number that is written without a point if it is whole.
  void Number(const std::string& name, double& value) { Field(name, value); }
  // A list, or one value that stands for a list of one; equal values are written as one.
  template <class T>
  void OneOrMany(const std::string& name, std::vector<T>& values) {
    const nlohmann::json* field = Take(name);
    if (!field) return;
    values.clear();
    if (field->is_array()) {
      for (const nlohmann::json& item : *field) {
        T value;
        Convert(name, item, value);
        values.push_back(value);
      }
      Check(!values.empty(), "{}: field '{}' must not be an empty list", owner_, name);
    } else {
      T value;
      Convert(name, *field, value);
      values.push_back(value);
    }
  }
  // A known field that is supported with this one value only. Errors: UnsupportedError naming it.
  void Only(const std::string& name, const nlohmann::json& supported) {
    const nlohmann::json* field = Take(name);
    Check<UnsupportedError>(!field || *field == supported,
                            "{}: field '{}' is {}; only {} is supported", owner_, name,
                            field ? field->dump() : "", supported.dump());
  }
  // A field of any type, for the caller to convert.
  void ReadJson(const std::string& name, nlohmann::json& value) {
    const nlohmann::json* field = Take(name);
    if (field) value = *field;
  }
  // A known field whose value does not matter here; `written` is what goes into a file, if
  // anything.
  void Ignore(const std::string& name, const nlohmann::json& = nlohmann::json::value_t::discarded) {
    Take(name);
  }
  // Errors: ValueError naming a field that nobody has read; those with a leading "_" are allowed.
  void CheckAllRead() const {
    for (const auto& [name, value] : object_.items()) {
      Check(seen_.contains(name) || name.starts_with("_"), "{}: unknown field '{}'", owner_, name);
    }
  }

 private:
  const nlohmann::json* Take(const std::string& name) {
    seen_.insert(name);
    auto it = object_.find(name);
    return it == object_.end() ? nullptr : &*it;
  }
  [[noreturn]] void Wrong(const std::string& name, const nlohmann::json& value,
                          std::string_view wanted) const {
    Fail("{}: field '{}' is {}, expected {}", owner_, name, value.dump(), wanted);
  }
  void Convert(const std::string& name, const nlohmann::json& json, bool& value) const {
    if (!json.is_boolean()) Wrong(name, json, "true or false");
    value = json.get<bool>();
  }
  void Convert(const std::string& name, const nlohmann::json& json, int64_t& value) const {
    if (!json.is_number_integer()) Wrong(name, json, "an integer");
    value = json.get<int64_t>();
  }
  void Convert(const std::string& name, const nlohmann::json& json, double& value) const {
    if (!json.is_number()) Wrong(name, json, "a number");
    value = json.get<double>();
  }
  void Convert(const std::string& name, const nlohmann::json& json, std::string& value) const {
    if (!json.is_string()) Wrong(name, json, "a text");
    value = json.get<std::string>();
  }
  template <class T>
  void Convert(const std::string& name, const nlohmann::json& json, std::vector<T>& values) const {
    if (!json.is_array()) Wrong(name, json, "a list");
    values.clear();
    for (const nlohmann::json& item : json) Convert(name, item, values.emplace_back());
  }

  std::string owner_;
  nlohmann::json object_;
  std::set<std::string> seen_;
};

}  // namespace calotype
