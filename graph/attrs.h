// Attrs: the attributes of a node, a small map from name to integer, number, integer list or text,
// kept sorted by name so that equal attributes compare and hash equal.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace calotype {

using AttrValue = std::variant<int64_t, double, std::vector<int64_t>, std::string>;

class Attrs {
 public:
  Attrs() = default;
  Attrs(std::initializer_list<std::pair<std::string, AttrValue>> entries);

  // The value of `name`. Errors: InternalError if it is missing or has another type.
  int64_t Int(std::string_view name) const;
  double Float(std::string_view name) const;
  const std::vector<int64_t>& Ints(std::string_view name) const;
  const std::string& Text(std::string_view name) const;
  // As above with a default for a missing attribute.
  int64_t Int(std::string_view name, int64_t missing) const;
  double Float(std::string_view name, double missing) const;
  bool Has(std::string_view name) const { return Find(name) != nullptr; }
  void Set(std::string name, AttrValue value);

  const std::vector<std::pair<std::string, AttrValue>>& entries() const { return entries_; }
  bool operator==(const Attrs&) const = default;
  // "{axis=1, eps=1e-05, shape=[2, 3]}"; empty text for no attributes. Numbers round-trip.
  std::string ToString() const;

 private:
  const AttrValue* Find(std::string_view name) const;
  std::vector<std::pair<std::string, AttrValue>> entries_;
};

}  // namespace calotype
