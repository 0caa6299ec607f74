#include "jit/lower_program.h"

#include <cstring>

namespace calotype::jit {

namespace {

int Arity(Primitive op) {
  if (op == Primitive::kInput || op == Primitive::kConstant) return 0;
  if (op == Primitive::kSelect) return 3;
  bool binary = (op >= Primitive::kAdd && op <= Primitive::kMin) ||
                (op >= Primitive::kLess && op <= Primitive::kEqual);
  return binary ? 2 : 1;
}

}  // namespace

int ProgramBuilder::Add(const ScalarInstruction& instruction) {
  // Equal instructions of equal operands give equal bits, so one is enough.
  int32_t words[5] = {static_cast<int32_t>(instruction.op), instruction.a, instruction.b,
                      instruction.c, 0};
  std::memcpy(&words[4], &instruction.constant, 4);
  std::string key(reinterpret_cast<const char*>(words), sizeof(words));
  auto [it, inserted] = known_.insert({key, static_cast<int>(code_.size())});
  if (inserted) code_.push_back(instruction);
  return it->second;
}

int ProgramBuilder::Reserved(int index) { return Add({.op = Primitive::kInput, .a = index}); }

int ProgramBuilder::Operand(const LoopOperand& operand) {
  size_t number = 0;
  for (; number < operands_.size(); ++number) {
    const LoopOperand& other = operands_[number];
    if (other.view == operand.view && atoms_.Leaves(other.axes) == atoms_.Leaves(operand.axes))
      break;
  }
  if (number == operands_.size()) operands_.push_back(operand);
  return Reserved(reserved_ + static_cast<int>(number));
}

int ProgramBuilder::Constant(float value) {
  return Add({.op = Primitive::kConstant, .constant = value});
}

std::vector<int32_t> ProgramBuilder::AppendAll(const ScalarProgram& program,
                                               std::span<const int> arguments) {
  std::vector<int> number(program.code.size());
  for (size_t i = 0; i < program.code.size(); ++i) {
    ScalarInstruction code = program.code[i];
    if (code.op == Primitive::kInput) {
      number[i] = arguments[code.a];
      continue;
    }
    int arity = Arity(code.op);
    if (arity > 0) code.a = number[code.a];
    if (arity > 1) code.b = number[code.b];
    if (arity > 2) code.c = number[code.c];
    number[i] = Add(code);
  }
  std::vector<int32_t> results;
  for (int32_t result : program.results) results.push_back(number[result]);
  return results;
}

ScalarProgram ProgramBuilder::Finish(std::vector<int32_t> results) const {
  ScalarProgram program;
  program.inputs = reserved_ + static_cast<int>(operands_.size());
  program.code = code_;
  program.results = std::move(results);
  return program;
}

}  // namespace calotype::jit
