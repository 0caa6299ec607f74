#include "jit/orc.h"

#include <llvm/Analysis/CGSCCPassManager.h>
#include <llvm/Analysis/LoopAnalysisManager.h>
#include <llvm/Config/llvm-config.h>
#include <llvm/ExecutionEngine/JITLink/JITLinkMemoryManager.h>
#include <llvm/ExecutionEngine/Orc/LLJIT.h>
#include <llvm/ExecutionEngine/Orc/ObjectLinkingLayer.h>
#include <llvm/IR/LegacyPassManager.h>
#include <llvm/IR/Verifier.h>
#include <llvm/Passes/PassBuilder.h>
#include <llvm/Support/SmallVectorMemoryBuffer.h>
#include <llvm/Support/raw_ostream.h>
#include <llvm/Transforms/InstCombine/InstCombine.h>
#include <llvm/Transforms/Scalar/DCE.h>
#include <llvm/Transforms/Scalar/EarlyCSE.h>
#include <llvm/Transforms/Scalar/LICM.h>
#include <llvm/Transforms/Scalar/LoopPassManager.h>
#include <llvm/Transforms/Scalar/SROA.h>
#include <llvm/Transforms/Scalar/SimplifyCFG.h>
#include <llvm/Transforms/Utils/Cloning.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <unordered_map>

#include "core/error.h"
#include "core/parallel.h"
#include "core/sha256.h"
#include "jit/emit.h"
#include "jit/object_check.h"

namespace calotype::jit {

namespace orc = llvm::orc;

struct CompiledKernels::Impl {
  std::string problems;  // what the linker reports beside its error values; outlives it
  std::unique_ptr<orc::LLJIT> jit;
};

CompiledKernels::CompiledKernels() = default;
CompiledKernels::~CompiledKernels() = default;
CompiledKernels::CompiledKernels(CompiledKernels&&) noexcept = default;
CompiledKernels& CompiledKernels::operator=(CompiledKernels&&) noexcept = default;

namespace {

void CheckSuccess(llvm::Error error, const char* step) {
  if (error) Fail<InternalError>("LLVM failed to {}: {}", step, llvm::toString(std::move(error)));
}

template <class T>
T CheckSuccess(llvm::Expected<T> result, const char* step) {
  if (!result) CheckSuccess(result.takeError(), step);
  return std::move(*result);
}

// The emitters write what the machine is to do; these passes only tidy up. The loop and SLP
// vectorizers stay out: they undo register tiles, and recognising loops as memset would add calls.
void Optimize(llvm::Module& module, llvm::TargetMachine& machine) {
  llvm::LoopAnalysisManager loops;
  llvm::FunctionAnalysisManager functions;
  llvm::CGSCCAnalysisManager components;
  llvm::ModuleAnalysisManager modules;
  llvm::PassBuilder builder(&machine);
  builder.registerModuleAnalyses(modules);
  builder.registerCGSCCAnalyses(components);
  builder.registerFunctionAnalyses(functions);
  builder.registerLoopAnalyses(loops);
  builder.crossRegisterProxies(loops, functions, components, modules);
  llvm::FunctionPassManager passes;
  passes.addPass(llvm::SROAPass(llvm::SROAOptions::PreserveCFG));
  passes.addPass(llvm::EarlyCSEPass());
  passes.addPass(llvm::InstCombinePass());
  passes.addPass(llvm::SimplifyCFGPass());
  llvm::LoopPassManager loop_passes;
  loop_passes.addPass(llvm::LICMPass(llvm::LICMOptions()));
  passes.addPass(
      llvm::createFunctionToLoopPassAdaptor(std::move(loop_passes), /*UseMemorySSA=*/true));
  passes.addPass(llvm::EarlyCSEPass(/*UseMemorySSA=*/true));
  passes.addPass(llvm::DCEPass());
  for (llvm::Function& function : module) {
    if (!function.isDeclaration()) passes.run(function, functions);
  }
}

void WriteFile(const std::filesystem::path& path, llvm::StringRef text) {
  std::ofstream file(path, std::ios::binary);
  file.write(text.data(), static_cast<std::streamsize>(text.size()));
  file.close();
  Check<FileError>(file.good(), "CALOTYPE_DUMP: cannot write {}", path.string());
}

// The object file of one kernel, whose symbol is `symbol`.
llvm::SmallVector<char, 0> Compile(const KernelSpec& spec, const std::string& symbol,
                                   const Target& target, const std::string& dump_folder) {
  llvm::LLVMContext context;
  llvm::Module module(symbol, context);
  std::unique_ptr<llvm::TargetMachine> machine = CreateTargetMachine(target);
  module.setTargetTriple(target.triple);
  module.setDataLayout(machine->createDataLayout());
  EmitKernel(target, module, symbol, spec);
  std::string problem;
  llvm::raw_string_ostream problems(problem);
  if (llvm::verifyModule(module, &problems)) {
    Fail<InternalError>("the emitter wrote invalid code for {}: {}", ToString(spec),
                        problems.str());
  }
  Optimize(module, *machine);

  auto generate = [&](llvm::Module& source, llvm::CodeGenFileType type) {
    llvm::SmallVector<char, 0> bytes;
    llvm::raw_svector_ostream stream(bytes);
    llvm::legacy::PassManager passes;
    if (machine->addPassesToEmitFile(passes, stream, nullptr, type)) {
      Fail<InternalError>("LLVM cannot emit code for {}", target.triple);
    }
    passes.run(source);
    return bytes;
  };
  if (!dump_folder.empty()) {
    machine->Options.MCOptions.AsmVerbose = true;
    std::filesystem::path base = std::filesystem::path(dump_folder) / symbol;
    std::string text = "; " + ToString(spec) + "\n";
    llvm::raw_string_ostream stream(text);
    module.print(stream, nullptr);
    WriteFile(base.string() + ".ll", stream.str());
    llvm::SmallVector<char, 0> assembly =
        generate(*llvm::CloneModule(module), llvm::CodeGenFileType::AssemblyFile);
    WriteFile(base.string() + ".s", {assembly.data(), assembly.size()});
  }
  return generate(module, llvm::CodeGenFileType::ObjectFile);
}

std::unique_ptr<orc::LLJIT> CreateJit(const Target& target) {
  orc::JITTargetMachineBuilder machine{llvm::Triple(target.triple)};
  machine.setCPU(target.cpu);
  return CheckSuccess(
      orc::LLJITBuilder()
          .setJITTargetMachineBuilder(std::move(machine))
          .setLinkProcessSymbolsByDefault(false)
          .setPlatformSetUp(orc::setUpInactivePlatform)
          .setObjectLinkingLayerCreator([](orc::ExecutionSession& session, const llvm::Triple&)
                                            -> llvm::Expected<std::unique_ptr<orc::ObjectLayer>> {
            return std::make_unique<orc::ObjectLinkingLayer>(session);
          })
          .create(),
      "start its linker");
}

std::string SymbolOf(const std::string& name, size_t number) {
  std::string symbol;
  for (char c : name.substr(0, 80)) {
    bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    symbol += plain ? c : '_';
  }
  return fmt::format("calotype_{}_{}", symbol, number);
}

}  // namespace

std::string CompileObject(const KernelSpec& spec, const std::string& symbol, const Target& target) {
  llvm::SmallVector<char, 0> bytes = Compile(spec, symbol, target, /*dump_folder=*/"");
  return {bytes.data(), bytes.size()};
}

std::string CacheKey(const KernelSpec& spec, const Target& target) {
  return fmt::format("build {}\nllvm {}\n{}\n{}\n", kBuildId, LLVM_VERSION_STRING, ToString(target),
                     ToString(spec));
}

CompiledKernels CompileKernels(std::span<const NamedSpec> specs, const Target& target) {
  CompiledKernels result;
  if (specs.empty()) return result;
  std::unordered_map<std::string, size_t> known;
  std::vector<size_t> unique_of(specs.size()), first_use;
  for (size_t i = 0; i < specs.size(); ++i) {
    auto [found, added] = known.try_emplace(ToString(specs[i].spec), first_use.size());
    unique_of[i] = found->second;
    if (added) first_use.push_back(i);
    // The text is the key of the cache: it must tell all that differ.
    Check<InternalError>(specs[i].spec == specs[first_use[found->second]].spec,
                         "different kernels have the same text: {}", found->first);
  }
  size_t count = first_use.size();

  const char* dump = std::getenv("CALOTYPE_DUMP");
  std::string dump_folder = dump ? dump : "";
  if (!dump_folder.empty()) {
    std::error_code error;
    std::filesystem::create_directories(dump_folder, error);
    Check<FileError>(!error, "CALOTYPE_DUMP: cannot create {}: {}", dump_folder, error.message());
  }

  std::unique_ptr<CompileCache> cache;
  if (dump_folder.empty()) cache = CompileCache::FromEnvironment();

  std::vector<llvm::SmallVector<char, 0>> objects(count);
  std::vector<std::exception_ptr> errors(count);
  std::vector<std::string> symbols(count);
  static std::atomic<size_t> number = 0;  // files of dumps are unique in the process
  std::atomic<int64_t> compiled = 0;
  auto make = [&](size_t i) {
    const NamedSpec& named = specs[first_use[i]];
    std::string key;
    if (cache) {
      key = CacheKey(named.spec, target);
      symbols[i] = "calotype_" + Sha256Of(key).substr(0, 32);
      if (std::optional<std::string> found = cache->Find(key)) {
        std::string problem = ObjectProblem(*found, symbols[i]);
        if (problem.empty()) {
          objects[i].assign(found->begin(), found->end());
          return;
        }
        cache->Refuse(problem);
      }
    } else {
      symbols[i] = SymbolOf(named.name, number++);
    }
    try {
      objects[i] = Compile(named.spec, symbols[i], target, dump_folder);
    } catch (const UnsupportedError& error) {
      Fail<UnsupportedError>("{}: {}", named.name, error.what());
    }
    ++compiled;
    std::string_view bytes(objects[i].data(), objects[i].size());
    std::string problem = ObjectProblem(bytes, symbols[i]);
    Check<InternalError>(problem.empty(), "the code for {} may not be linked: {}",
                         ToString(named.spec), problem);
    if (cache) cache->Store(key, bytes);
  };
  ParallelFor(static_cast<int64_t>(count), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      try {
        make(static_cast<size_t>(i));
      } catch (...) {
        errors[i] = std::current_exception();
      }
    }
  });
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  if (cache) {
    if (compiled > 0) cache->Trim();
    result.cache_ = cache->Stats();
  }

  result.impl_ = std::make_unique<CompiledKernels::Impl>();
  result.impl_->jit = CreateJit(target);
  orc::LLJIT& jit = *result.impl_->jit;
  jit.getExecutionSession().setErrorReporter([impl = result.impl_.get()](llvm::Error error) {
    impl->problems += llvm::toString(std::move(error));
  });
  for (size_t i = 0; i < count; ++i) {
    result.code_bytes_ += static_cast<int64_t>(objects[i].size());
    CheckSuccess(jit.addObjectFile(std::make_unique<llvm::SmallVectorMemoryBuffer>(
                     std::move(objects[i]), symbols[i], /*RequiresNullTerminator=*/false)),
                 "add a kernel");
  }
  std::vector<KernelFunction> functions(count);
  for (size_t i = 0; i < count; ++i) {
    llvm::Expected<orc::ExecutorAddr> address = jit.lookup(symbols[i]);
    if (!address) {
      Fail<InternalError>("LLVM failed to link a kernel: {}; {}",
                          llvm::toString(address.takeError()), result.impl_->problems);
    }
    functions[i] = address->toPtr<KernelFunction>();
  }
  for (size_t i = 0; i < specs.size(); ++i) result.functions_.push_back(functions[unique_of[i]]);
  result.different_ = static_cast<int64_t>(count);
  result.compiled_ = compiled;
  return result;
}

}  // namespace calotype::jit
