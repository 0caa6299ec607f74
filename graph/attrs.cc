#include "graph/attrs.h"

#include <algorithm>

#include "core/error.h"

namespace calotype {

namespace {

template <class T>
const T& Get(const AttrValue* value, std::string_view name) {
  const T* typed = value ? std::get_if<T>(value) : nullptr;
  Check<InternalError>(typed != nullptr, "attribute \"{}\" is missing or of another type", name);
  return *typed;
}

}  // namespace

Attrs::Attrs(std::initializer_list<std::pair<std::string, AttrValue>> entries) {
  for (const auto& [name, value] : entries) Set(name, value);
}

void Attrs::Set(std::string name, AttrValue value) {
  auto at = std::lower_bound(entries_.begin(), entries_.end(), name,
                             [](const auto& entry, const auto& key) { return entry.first < key; });
  if (at != entries_.end() && at->first == name) {
    at->second = std::move(value);
  } else {
    entries_.insert(at, {std::move(name), std::move(value)});
  }
}

const AttrValue* Attrs::Find(std::string_view name) const {
  for (const auto& [key, value] : entries_) {
    if (key == name) return &value;
  }
  return nullptr;
}

int64_t Attrs::Int(std::string_view name) const { return Get<int64_t>(Find(name), name); }
double Attrs::Float(std::string_view name) const { return Get<double>(Find(name), name); }
const std::vector<int64_t>& Attrs::Ints(std::string_view name) const {
  return Get<std::vector<int64_t>>(Find(name), name);
}
const std::string& Attrs::Text(std::string_view name) const {
  return Get<std::string>(Find(name), name);
}
int64_t Attrs::Int(std::string_view name, int64_t missing) const {
  return Has(name) ? Int(name) : missing;
}
double Attrs::Float(std::string_view name, double missing) const {
  return Has(name) ? Float(name) : missing;
}

std::string Attrs::ToString() const {
  if (entries_.empty()) return "";
  std::string text = "{";
  for (const auto& [name, value] : entries_) {
    if (text.size() > 1) text += ", ";
    text += name + "=";
    if (auto* i = std::get_if<int64_t>(&value)) text += fmt::format("{}", *i);
    // A number always shows a point or exponent, so that the parser can tell it from an integer.
    if (auto* d = std::get_if<double>(&value)) {
      std::string number = fmt::format("{}", *d);
      if (number.find_first_of(".en") == std::string::npos) number += ".0";
      text += number;
    }
    if (auto* v = std::get_if<std::vector<int64_t>>(&value)) {
      text += fmt::format("[{}]", fmt::join(*v, ", "));
    }
    if (auto* s = std::get_if<std::string>(&value)) text += fmt::format("\"{}\"", *s);
  }
  return text + "}";
}

}  // namespace calotype
