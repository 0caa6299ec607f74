// Compiles kernel specifications to machine code in memory through LLVM ORC.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "jit/kernel.h"
#include "jit/target.h"

namespace calotype::jit {

struct NamedSpec {
  KernelSpec spec;
  std::string name;  // for symbols and dumps, any text
};

// Owns machine code; the functions are valid while it lives.
class CompiledKernels {
 public:
  CompiledKernels();
  ~CompiledKernels();
  CompiledKernels(CompiledKernels&&) noexcept;
  CompiledKernels& operator=(CompiledKernels&&) noexcept;

  // One for each spec, in their order; equal specs share one.
  const std::vector<KernelFunction>& functions() const { return functions_; }
  int64_t compiled() const { return compiled_; }      // different kernels
  int64_t code_bytes() const { return code_bytes_; }  // of the object files

 private:
  friend CompiledKernels CompileKernels(std::span<const NamedSpec>, const Target&);
  struct Impl;
  std::unique_ptr<Impl> impl_;
  std::vector<KernelFunction> functions_;
  int64_t compiled_ = 0, code_bytes_ = 0;
};

// Compiles on Threads() threads. The code calls nothing outside itself. With CALOTYPE_DUMP=dir each
// kernel's IR and assembly are written to dir/NAME.ll and dir/NAME.s.
// Errors: UnsupportedError for a spec that cannot be compiled, InternalError with LLVM's text,
// FileError if the dump cannot be written.
CompiledKernels CompileKernels(std::span<const NamedSpec> specs,
                               const Target& target = HostTarget());

}  // namespace calotype::jit
