// Parameter: a named tensor that training changes. Compiled code and packed copies belong to a
// version; every writer goes through Write(), which bumps it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "core/tensor.h"

namespace calotype {

class Parameter {
 public:
  // `trainable` is false for state that only updates write (moments, averages, step counters).
  Parameter(std::string name, Tensor value, bool trainable = true)
      : name_(std::move(name)), value_(std::move(value)), trainable_(trainable) {}
  Parameter(const Parameter&) = delete;
  Parameter& operator=(const Parameter&) = delete;

  // Path name, e.g. "down_blocks.0.attentions.0.proj_in.weight".
  const std::string& name() const { return name_; }
  void set_name(std::string name) { name_ = std::move(name); }
  const Tensor& value() const { return value_; }
  bool trainable() const { return trainable_; }
  void set_trainable(bool trainable) { trainable_ = trainable; }
  // Grows by one with each Write(); compiled code re-packs when it sees a new version.
  uint64_t version() const { return version_; }
  // The storage for writing; bumps the version. The storage never moves.
  Tensor& Write() {
    ++version_;
    return value_;
  }
  // The gradient of the last Backward (undefined before).
  Tensor gradient;

 private:
  std::string name_;
  Tensor value_;
  bool trainable_;
  uint64_t version_ = 0;
};

using ParameterPtr = std::shared_ptr<Parameter>;

}  // namespace calotype
