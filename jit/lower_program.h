// Puts the scalar program of a fused region together from the programs of its ops. Internal to the
// lowering.
#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

#include "core/program.h"
#include "jit/lower_atoms.h"

namespace calotype::jit {

// An operand of a kernel that is being built: a view and the atoms that run along its axes.
struct LoopOperand {
  View view;
  AtomAxes axes;
};

class ProgramBuilder {
 public:
  // `reserved` program inputs come before the operands (1 for the anchor's result).
  ProgramBuilder(const Atoms& atoms, int reserved) : atoms_(atoms), reserved_(reserved) {}

  // Each returns the number of the instruction with the value.
  int Reserved(int index);
  int Operand(const LoopOperand& operand);
  int Constant(float value);
  int Append(const ScalarProgram& program, std::span<const int> arguments) {
    return AppendAll(program, arguments)[0];
  }
  // For a program of several results.
  std::vector<int32_t> AppendAll(const ScalarProgram& program, std::span<const int> arguments);

  const std::vector<LoopOperand>& operands() const { return operands_; }
  ScalarProgram Finish(std::vector<int32_t> results) const;

 private:
  int Add(const ScalarInstruction& instruction);

  const Atoms& atoms_;
  int reserved_;
  std::vector<LoopOperand> operands_;
  std::vector<ScalarInstruction> code_;
  std::map<std::string, int> known_;  // instruction bytes -> number
};

}  // namespace calotype::jit
