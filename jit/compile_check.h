// Check mode: interprets the lowered graph and compares the result of every step.
#pragma once

#include <functional>
#include <memory>
#include <span>

#include "jit/lower.h"
#include "jit/runtime/executable.h"

namespace calotype::jit {

std::function<std::unique_ptr<StepChecker>(std::span<const Tensor>)> MakeChecker(
    std::shared_ptr<const LoweredProgram> program);

}  // namespace calotype::jit
