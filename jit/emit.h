// What the emitters share: one Emitter builds the LLVM function of one kernel with loops over
// constant extents, strided vector memory accesses and scalar programs on vectors. Internal to
// jit/*.cc: it names LLVM's types.
#pragma once

#include <llvm/ADT/STLFunctionalExtras.h>
#include <llvm/IR/IRBuilder.h>
#include <llvm/IR/LLVMContext.h>
#include <llvm/IR/Module.h>
#include <llvm/Target/TargetMachine.h>

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "jit/contraction_plan.h"
#include "jit/kernel.h"
#include "jit/target.h"

namespace calotype::jit {

std::unique_ptr<llvm::TargetMachine> CreateTargetMachine(const Target& target);

// Adds function `name` for `spec` to `module`. Errors: UnsupportedError naming the operand or
// extent.
void EmitKernel(const Target& target, llvm::Module& module, const std::string& name,
                const KernelSpec& spec);

int64_t Product(std::span<const int64_t> extents);

class Emitter {
 public:
  using Value = llvm::Value;
  using Values = std::vector<llvm::Value*>;

  Emitter(const Target& target, llvm::Module& module, const std::string& name);

  const Target& target;
  llvm::LLVMContext& context;
  llvm::Module& module;
  llvm::IRBuilder<> b;
  llvm::Function* function;
  Value *begin, *end;  // the chunks to compute

  // --- Types and constants. A width of 1 is a scalar.
  llvm::Type* Float(int width);
  llvm::Type* Int(int width);  // i32
  Value* I64(int64_t value) { return b.getInt64(value); }
  Value* Splat(double value, int width);
  Value* Splat(Value* scalar, int width);

  // --- Integer arithmetic that never wraps, so that addresses stay affine for the code generator.
  Value* Add(Value* x, Value* y) { return b.CreateAdd(x, y, "", true, true); }
  Value* Mul(Value* x, int64_t y) { return b.CreateMul(x, I64(y), "", true, true); }
  Value* Min(Value* x, Value* y);

  // --- Control. Loops run while index < end, in steps of `step`; state is carried from turn to
  // turn.
  void For(Value* begin, Value* end, int64_t step, llvm::function_ref<void(Value*)> body);
  void For(int64_t n, llvm::function_ref<void(Value*)> body);
  Values Fold(Value* begin, Value* end, int64_t step, Values state,
              llvm::function_ref<Values(Value*, const Values&)> body);
  Values Fold(int64_t n, Values state, llvm::function_ref<Values(Value*, const Values&)> body);
  void If(Value* condition, llvm::function_ref<void()> body);
  // How many chunks a spec has: Chunks, but 1 inside a chain, whose links are not divided.
  int64_t ChunksOf(const KernelSpec& spec) const { return chain_ ? 1 : Chunks(spec); }
  // Emits `body` as a part of a chain, at this index of the chain's loop.
  void InChain(Value* index, llvm::function_ref<void()> body);
  // The units [first, last) of `units` that belong to the chunks [begin, end) of `chunks`.
  std::pair<Value*, Value*> Units(int64_t units, int64_t chunks);
  // Splits a flat index into one index for each extent, the last running fastest.
  Values Unflatten(Value* index, std::span<const int64_t> extents);

  // --- Memory.
  // The address of element `operand.offset`; loaded once at the start of the kernel.
  Value* Base(const Operand& operand);
  Value* At(Value* pointer, DType dtype, Value* index, int64_t stride);
  Value* At(Value* pointer, DType dtype, int64_t elements);
  // The f32 values of the lanes [0, valid) at pointer + lane * stride; the others are 0. Integers
  // are converted. Stride 0 loads once and repeats.
  Value* Load(Value* pointer, DType dtype, int64_t stride, int width, int valid);
  void Store(Value* value, Value* pointer, DType dtype, int64_t stride, int width, int valid);
  // Asks for the cache line at `pointer`.
  void Prefetch(Value* pointer, bool to_write);
  // A vector whose lane l holds, with x = first + l, the value at (x / group) * outer + (x % group)
  // * inner: what a repeating operand has for two dimensions joined in the lanes.
  Value* Spread(Value* pointer, DType dtype, int64_t outer, int64_t inner, int64_t group,
                int64_t first, int width, int valid);
  // Uninitialised room for `count` floats on the stack, 64-byte aligned.
  Value* Scratch(int64_t count);

  // --- Arithmetic.
  // a * b + c: fused where the target has the instruction, rounded twice elsewhere.
  Value* MultiplyAdd(Value* a, Value* b, Value* c);
  // The results of `program` for the lanes of `inputs` (all of one type).
  Values Program(const ScalarProgram& program, std::span<Value* const> inputs, int width);
  Value* Floor(Value* x);
  Value* Round(Value* x);
  Value* IsNan(Value* x);
  Value* Maximum(Value* x, Value* y);  // Primitive::kMax
  // The lanes combined in a fixed tree: lane i with lane i + width / 2, and so on.
  Value* Horizontal(Value* x, int width, llvm::function_ref<Value*(Value*, Value*)> combine);
  // Row r of the result holds lane r of each of the `width` rows.
  Values Transpose(const Values& rows);

  // Ends the function.
  void Finish();

 private:
  llvm::Value* pointers_;
  std::vector<Value*> bases_;
  Value* chain_ = nullptr;  // the index of the chain's loop
  llvm::BasicBlock* entry_;
};

void EmitLoop(Emitter& e, const LoopSpec& spec);
void EmitReduce(Emitter& e, const ReduceSpec& spec);
void EmitChain(Emitter& e, const ChainSpec& spec);
void EmitContraction(Emitter& e, const ContractionSpec& spec);
void EmitAttention(Emitter& e, const AttentionSpec& spec);
void EmitAttentionGradient(Emitter& e, const AttentionGradientSpec& spec);
void EmitGather(Emitter& e, const GatherSpec& spec);
void EmitScatterAdd(Emitter& e, const ScatterAddSpec& spec);
void EmitPhilox(Emitter& e, const PhiloxSpec& spec);

}  // namespace calotype::jit
