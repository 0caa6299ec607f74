#include "optim/parameter_values.h"

#include <set>

#include "core/error.h"

namespace calotype {

std::map<std::string, Tensor> ValuesByName(std::span<const ParameterPtr> parameters) {
  std::map<std::string, Tensor> values;
  for (const ParameterPtr& p : parameters) values.emplace(p->name(), p->value());
  return values;
}

void SetValuesByName(std::span<const ParameterPtr> parameters,
                     const std::map<std::string, Tensor>& values) {
  std::set<std::string> names;
  for (const ParameterPtr& p : parameters) {
    const auto value = values.find(p->name());
    Check(value != values.end(), "restore: \"{}\" is missing", p->name());
    Check<ShapeError>(value->second.defined() && value->second.type() == p->value().type(),
                      "restore: \"{}\" is {}, expected {}", p->name(),
                      value->second.defined() ? ToString(value->second.type()) : "undefined",
                      p->value().type());
    names.insert(p->name());
  }
  for (const auto& [name, value] : values) {
    Check(names.contains(name), "restore: \"{}\" belongs to no parameter", name);
  }
  for (const ParameterPtr& p : parameters) p->Write().CopyFrom(values.at(p->name()));
}

}  // namespace calotype
