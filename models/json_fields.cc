#include "models/json_fields.h"

#include <cmath>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>

#include "core/error.h"
#include "core/json.h"

namespace calotype {
namespace {

// What Convert needs to say that a field has the wrong type.
struct Place {
  const std::string &owner, &name;
};

[[noreturn]] void Wrong(const Place& at, const nlohmann::json& value, std::string_view wanted) {
  Fail("{}: field '{}' is {}, expected {}", at.owner, at.name, JsonText(value), wanted);
}
void Convert(const Place& at, const nlohmann::json& json, bool& value) {
  if (!json.is_boolean()) Wrong(at, json, "true or false");
  value = json.get<bool>();
}
void Convert(const Place& at, const nlohmann::json& json, int64_t& value) {
  if (!json.is_number_integer()) Wrong(at, json, "an integer");
  value = json.get<int64_t>();
}
void Convert(const Place& at, const nlohmann::json& json, double& value) {
  if (!json.is_number()) Wrong(at, json, "a number");
  value = json.get<double>();
}
void Convert(const Place& at, const nlohmann::json& json, std::string& value) {
  if (!json.is_string()) Wrong(at, json, "a text");
  value = json.get<std::string>();
}
template <class T>
void Convert(const Place& at, const nlohmann::json& json, std::vector<T>& values) {
  if (!json.is_array()) Wrong(at, json, "a list");
  values.clear();
  for (const nlohmann::json& item : json) {
    T value;
    Convert(at, item, value);
    values.push_back(value);
  }
}
template <class T>
void Convert(const Place& at, const nlohmann::json& json, std::optional<T>& value) {
  value.reset();
  if (!json.is_null()) Convert(at, json, value.emplace());
}

template <class T>
nlohmann::json JsonOf(const T& value) {
  return value;
}
template <class T>
nlohmann::json JsonOf(const std::optional<T>& value) {
  return value ? nlohmann::json(*value) : nlohmann::json(nullptr);
}

}  // namespace

JsonConstant::JsonConstant(int value) : text_(JsonText(nlohmann::json(value))) {}
JsonConstant::JsonConstant(double value) : text_(JsonText(nlohmann::json(value))) {}
JsonConstant::JsonConstant(std::string_view value) : text_(JsonText(nlohmann::json(value))) {}
JsonConstant::JsonConstant(std::initializer_list<std::string_view> values)
    : text_(JsonText(nlohmann::json(std::vector<std::string>(values.begin(), values.end())))) {}

JsonWriter::JsonWriter()
    : object_(std::make_unique<nlohmann::json>(nlohmann::json::value_t::object)) {}
JsonWriter::~JsonWriter() = default;

template <class T>
void JsonWriter::Field(const std::string& name, const T& value) {
  (*object_)[name] = JsonOf(value);
}
void JsonWriter::Number(const std::string& name, double value) {
  const bool whole = std::abs(value) < 1e15 && std::trunc(value) == value;
  (*object_)[name] = whole ? nlohmann::json(static_cast<int64_t>(value)) : nlohmann::json(value);
}
template <class T>
void JsonWriter::OneOrMany(const std::string& name, const std::vector<T>& values) {
  if (AllEqual(values)) {
    (*object_)[name] = static_cast<T>(values[0]);
  } else {
    (*object_)[name] = values;
  }
}
void JsonWriter::Only(const std::string& name, const JsonConstant& value) {
  (*object_)[name] = ParseJson(value.text());
}
std::string JsonWriter::Text() const { return JsonFile(*object_); }

JsonFields::JsonFields(std::string_view owner, std::string_view text)
    : owner_(owner),
      object_(std::make_unique<const nlohmann::json>(
          ParseJsonObject<ValueError>(text, owner_ + ": the configuration"))) {}
JsonFields::~JsonFields() = default;

template <class T>
void JsonFields::Field(const std::string& name, T& value) {
  if (const nlohmann::json* field = Take(name)) Convert({owner_, name}, *field, value);
}
template <class T>
void JsonFields::OneOrMany(const std::string& name, std::vector<T>& values) {
  const nlohmann::json* field = Take(name);
  if (!field) return;
  if (field->is_array()) {
    Convert({owner_, name}, *field, values);
    Check(!values.empty(), "{}: field '{}' must not be an empty list", owner_, name);
  } else {
    T value;
    Convert({owner_, name}, *field, value);
    values.assign(1, value);
  }
}
void JsonFields::Only(const std::string& name, const JsonConstant& supported) {
  const nlohmann::json* field = Take(name);
  Check<UnsupportedError>(!field || *field == ParseJson(supported.text()),
                          "{}: field '{}' is {}; only {} is supported", owner_, name,
                          field ? JsonText(*field) : "", supported.text());
}
void JsonFields::Token(const std::string& name, std::string& token) {
  const nlohmann::json* field = Take(name);
  if (!field) return;
  const nlohmann::json value =
      field->is_object() ? field->value("content", nlohmann::json()) : *field;
  Check(value.is_string() && !value.get<std::string>().empty(),
        "{}: field '{}' must be a token or an object with its 'content'", owner_, name);
  token = value.get<std::string>();
}
void JsonFields::CheckAllRead() const {
  for (const auto& [name, value] : object_->items()) {
    Check(seen_.contains(name) || name.starts_with("_"), "{}: unknown field '{}'", owner_, name);
  }
}
const nlohmann::json* JsonFields::Take(const std::string& name) {
  seen_.insert(name);
  auto it = object_->find(name);
  return it == object_->end() ? nullptr : &*it;
}

#define CALOTYPE_FIELD(...)                                                \
  template void JsonWriter::Field(const std::string&, const __VA_ARGS__&); \
  template void JsonFields::Field(const std::string&, __VA_ARGS__&);
#define CALOTYPE_FIELDS(T)                                                        \
  CALOTYPE_FIELD(T)                                                               \
  CALOTYPE_FIELD(std::optional<T>)                                                \
  CALOTYPE_FIELD(std::vector<T>)                                                  \
  template void JsonWriter::OneOrMany(const std::string&, const std::vector<T>&); \
  template void JsonFields::OneOrMany(const std::string&, std::vector<T>&);
CALOTYPE_FIELDS(bool)
CALOTYPE_FIELDS(int64_t)
CALOTYPE_FIELDS(double)
CALOTYPE_FIELDS(std::string)
#undef CALOTYPE_FIELDS
#undef CALOTYPE_FIELD

}  // namespace calotype
