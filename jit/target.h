// The machine that code is generated for: the host's processor as LLVM names it, capped by the
// environment variable CALOTYPE_CPU, with the few facts that the emitters decide by.
#pragma once

#include <string>
#include <string_view>

namespace calotype::jit {

struct Target {
  std::string triple;    // "x86_64-pc-linux-gnu"
  std::string cpu;       // LLVM's name, for example "znver4" or "x86-64-v3"
  std::string features;  // "+avx2,-avx512f,..."
  int vector_width = 4;  // floats in a vector register
  int vector_registers = 16;
  bool fma = false;       // has fused multiply-add
  bool rounding = false;  // has instructions for floor and round
  bool masks = false;     // loads and stores of a part of a vector are cheap
};

// All fields; equal texts give equal code.
std::string ToString(const Target& target);

// The host capped by CALOTYPE_CPU = x86-64 | x86-64-v2 | x86-64-v3 | x86-64-v4 | native. Found
// once. Errors: ValueError for any other text in CALOTYPE_CPU, InternalError if LLVM has no code
// generator for this machine.
const Target& HostTarget();

// The host capped by `level`, one of the texts above; a level above the host's gives the host's.
// Errors: as HostTarget().
Target MakeTarget(std::string_view level);

// What every processor of the architecture of `triple` has, for object files for other machines:
// SSE2 on x86-64, NEON on AArch64; four lanes anywhere else. Whoever compiles for it initialises
// LLVM's code generator of that architecture first.
Target GenericTarget(std::string_view triple);

}  // namespace calotype::jit
