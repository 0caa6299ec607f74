// Compiles kernel specifications to machine code in memory through LLVM ORC.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "jit/cache.h"
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
  int64_t different() const { return different_; }    // different kernels
  int64_t compiled() const { return compiled_; }      // of them those not found in the cache
  int64_t code_bytes() const { return code_bytes_; }  // of the object files
  const CacheStats& cache() const { return cache_; }

 private:
  friend CompiledKernels CompileKernels(std::span<const NamedSpec>, const Target&);
  struct Impl;
  std::unique_ptr<Impl> impl_;
  std::vector<KernelFunction> functions_;
  int64_t different_ = 0, compiled_ = 0, code_bytes_ = 0;
  CacheStats cache_;
};

// Everything that the machine code of a kernel depends on: the key of its entry in the cache.
std::string CacheKey(const KernelSpec& spec, const Target& target);

// Compiles on Threads() threads what the cache of CompileCache::FromEnvironment() does not hold.
// The code calls nothing outside itself. With CALOTYPE_DUMP=dir each kernel's IR and assembly are
// written to dir/NAME.ll and dir/NAME.s, and the cache is not used.
// Errors: UnsupportedError for a spec that cannot be compiled, InternalError with LLVM's text,
// FileError if the dump cannot be written or the cache folder cannot be used.
CompiledKernels CompileKernels(std::span<const NamedSpec> specs,
                               const Target& target = HostTarget());

// The object file of one kernel, for any machine that LLVM has been initialised for (MakeTarget
// initialises this one), with one global symbol. Errors: as above, the cache's apart.
std::string CompileObject(const KernelSpec& spec, const std::string& symbol, const Target& target);

}  // namespace calotype::jit
