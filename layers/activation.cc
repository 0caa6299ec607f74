#include "layers/activation.h"

namespace calotype {

namespace {

Value Identity(Value x) { return x; }

struct Entry {
  std::string_view name;
  Value (*function)(Value);
};
constexpr Entry kActivations[] = {
    {"silu", Silu}, {"swish", Silu},           {"gelu", Gelu}, {"gelu-approximate", GeluTanh},
    {"mish", Mish}, {"quick_gelu", QuickGelu}, {"relu", Relu}, {"identity", Identity}};

const Entry& Find(std::string_view name) {
  std::string known;
  for (const Entry& entry : kActivations) {
    if (entry.name == name) return entry;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", entry.name);
  }
  Fail("unknown activation '{}'; known are {}", name, known);
}

}  // namespace

Value Activate(std::string_view name, Value x) { return Find(name).function(x); }
void CheckActivation(std::string_view name) { Find(name); }

namespace nn {

Activation::Activation(std::string name) : Layer("Activation"), name_(std::move(name)) {
  CheckActivation(name_);
}

std::vector<Value> Activation::ExportComputationGraph(ComputationGraph&,
                                                      std::span<const Value> inputs) {
  return {Activate(name_, Required(inputs, 0, "x"))};
}

}  // namespace nn
}  // namespace calotype
