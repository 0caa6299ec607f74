// Configurations as flat JSON objects. A configuration lists its fields once, in a function
//   template <class C, class Fields> void VisitFields(C& config, Fields& fields)
// that JsonFields runs to read (every field has a type, none is overlooked) and JsonWriter to
// write. The JSON library stays in json_fields.cc: its header takes seconds to compile.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <initializer_list>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace calotype {

// Written into configs as _diffusers_version: that of the golden files.
constexpr const char* kDiffusersVersion = "0.42.1";

// A constant of a configuration: null, true, a number, a text or a list of texts.
class JsonConstant {
 public:
  JsonConstant(std::nullptr_t) : text_("null") {}
  JsonConstant(bool value) : text_(value ? "true" : "false") {}
  JsonConstant(int value);
  JsonConstant(double value);
  JsonConstant(const char* value) : JsonConstant(std::string_view(value)) {}
  JsonConstant(std::string_view value);
  JsonConstant(std::initializer_list<std::string_view> values);
  // As it stands in JSON.
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

// T below: bool, int64_t, double, std::string, and for Field std::optional or std::vector of one;
// others do not link.
class JsonWriter {
 public:
  JsonWriter();
  ~JsonWriter();

  template <class T>
  void Field(const std::string& name, const T& value);
  void Number(const std::string& name, double value);
  template <class T>
  void OneOrMany(const std::string& name, const std::vector<T>& values);
  void Only(const std::string& name, const JsonConstant& value);
  void Ignore(const std::string&) {}
  void Ignore(const std::string& name, const JsonConstant& written) { Only(name, written); }
  // Sorted keys, indented by 2, a newline at the end.
  std::string Text() const;

  template <class T>
  static bool AllEqual(const std::vector<T>& list) {
    return std::adjacent_find(list.begin(), list.end(), std::not_equal_to<>()) == list.end();
  }

 private:
  std::unique_ptr<nlohmann::json> object_;
};

class JsonFields {
 public:
  // `owner` names the configuration in messages. Errors: ValueError if `text` is not a JSON object.
  JsonFields(std::string_view owner, std::string_view text);
  ~JsonFields();

  // Sets `value` if the field is there; only std::optional may be null. Errors: ValueError for
  // another type of value.
  template <class T>
  void Field(const std::string& name, T& value);
  // A number that is written without a point if it is whole.
  void Number(const std::string& name, double& value) { Field(name, value); }
  // A list, or one value that stands for a list of one; equal values are written as one.
  template <class T>
  void OneOrMany(const std::string& name, std::vector<T>& values);
  // A known field that is supported with this one value only. Errors: UnsupportedError naming it.
  void Only(const std::string& name, const JsonConstant& supported);
  // A token: "<|endoftext|>", or {"content": "<|endoftext|>", ...}. Errors: ValueError.
  void Token(const std::string& name, std::string& token);
  // A known field whose value does not matter here; `written` is what goes into a file, if
  // anything.
  void Ignore(const std::string& name) { Take(name); }
  void Ignore(const std::string& name, const JsonConstant& /*written*/) { Take(name); }
  // Errors: ValueError naming a field that nobody has read; those with a leading "_" are allowed.
  void CheckAllRead() const;

 private:
  const nlohmann::json* Take(const std::string& name);

  std::string owner_;
  std::unique_ptr<const nlohmann::json> object_;
  std::set<std::string> seen_;
};

}  // namespace calotype
