#include "jit/target.h"

#include <llvm/ADT/StringMap.h>
#include <llvm/MC/TargetRegistry.h>
#include <llvm/Support/TargetSelect.h>
#include <llvm/Target/TargetMachine.h>
#include <llvm/TargetParser/Host.h>
#include <llvm/TargetParser/Triple.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>

#include "core/error.h"
#include "jit/emit.h"

namespace calotype::jit {

namespace {

// What the levels of the x86-64 psABI add to each other, in LLVM's names.
constexpr std::string_view kV3[] = {"avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"};
constexpr std::string_view kV4[] = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"};

}  // namespace

std::string ToString(const Target& target) {
  return fmt::format("{} {} {} width {} registers {} fma {} rounding {} masks {}", target.triple,
                     target.cpu, target.features, target.vector_width, target.vector_registers,
                     target.fma, target.rounding, target.masks);
}

Target GenericTarget(std::string_view triple) {
  llvm::Triple parsed{llvm::StringRef(triple)};
  Target target;
  target.triple = std::string(triple);
  target.cpu = parsed.getArch() == llvm::Triple::x86_64 ? "x86-64" : "generic";
  if (parsed.isAArch64()) {
    target.vector_registers = 32;
    target.fma = target.rounding = true;
  }
  return target;
}

Target MakeTarget(std::string_view level) {
  int cap = level == "native"      ? 5
            : level == "x86-64-v4" ? 4
            : level == "x86-64-v3" ? 3
            : level == "x86-64-v2" ? 2
            : level == "x86-64"    ? 1
                                   : 0;
  Check(cap > 0,
        "CALOTYPE_CPU is \"{}\"; it must be x86-64, x86-64-v2, x86-64-v3, x86-64-v4 or native",
        level);
  static std::once_flag initialised;
  std::call_once(initialised, [] {
    llvm::InitializeNativeTarget();
    llvm::InitializeNativeTargetAsmPrinter();
    llvm::InitializeNativeTargetAsmParser();
  });

  Target target = GenericTarget(llvm::sys::getProcessTriple());
  std::map<std::string, bool, std::less<>> host;  // sorted, so that the text is canonical
  for (const auto& feature : llvm::sys::getHostCPUFeatures()) {
    host[feature.getKey().str()] = feature.getValue();
  }
  // The host's own name and features, so that a feature which a hypervisor hides stays unused.
  auto use_host = [&] {
    target.cpu = llvm::sys::getHostCPUName().str();
    for (const auto& [name, on] : host) {
      target.features +=
          fmt::format("{}{}{}", target.features.empty() ? "" : ",", on ? '+' : '-', name);
    }
  };
  if (llvm::Triple(target.triple).getArch() != llvm::Triple::x86_64) {
    use_host();
    return target;
  }

  auto has = [&](std::string_view name) {
    auto found = host.find(name);
    return found != host.end() && found->second;
  };
  auto has_all = [&](auto& names) { return std::all_of(std::begin(names), std::end(names), has); };
  int level_of_host = !has("sse4.2") ? 1 : !has_all(kV3) ? 2 : !has_all(kV4) ? 3 : 4;
  if (cap > level_of_host) {
    use_host();
  } else if (cap > 1) {
    target.cpu = fmt::format("x86-64-v{}", cap);
  }
  cap = std::min(cap, level_of_host);
  target.rounding = cap >= 2;
  target.fma = cap >= 3;
  target.vector_width = cap >= 4 ? 16 : cap >= 3 ? 8 : 4;
  target.vector_registers = cap >= 4 ? 32 : 16;
  target.masks = cap >= 3;
  return target;
}

const Target& HostTarget() {
  static const Target target = [] {
    const char* level = std::getenv("CALOTYPE_CPU");
    return MakeTarget(level ? level : "native");
  }();
  return target;
}

std::unique_ptr<llvm::TargetMachine> CreateTargetMachine(const Target& target) {
  std::string error;
  const llvm::Target* found = llvm::TargetRegistry::lookupTarget(target.triple, error);
  Check<InternalError>(found != nullptr, "LLVM has no code generator for {}: {}", target.triple,
                       error);
  llvm::TargetOptions options;
  // Multiply-add is fused where an emitter writes llvm.fma and nowhere else.
  options.AllowFPOpFusion = llvm::FPOpFusion::Strict;
  options.NoTrappingFPMath = true;
  options.EnableFastISel = false;
  std::unique_ptr<llvm::TargetMachine> machine(found->createTargetMachine(
      target.triple, target.cpu, target.features, options, llvm::Reloc::PIC_,
      llvm::CodeModel::Small, llvm::CodeGenOptLevel::Aggressive, /*JIT=*/true));
  Check<InternalError>(machine != nullptr, "LLVM cannot create a code generator for {} {} {}",
                       target.triple, target.cpu, target.features);
  return machine;
}

}  // namespace calotype::jit
