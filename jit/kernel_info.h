// What a kernel does, in words and numbers for people: profiles and traces show it.
#pragma once

#include <string>

#include "jit/kernel.h"

namespace calotype::jit {

struct KernelInfo {
  std::string kind;   // "contraction", "attention", "reduction", "loop", ...
  std::string shape;  // its extents
  double flop = 0;    // of its contractions, a multiply-add counts 2; others count 0
};
KernelInfo DescribeKernel(const KernelSpec& spec);

}  // namespace calotype::jit
