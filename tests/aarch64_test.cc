// The emitters know no machine but its register width and a few facts: the same kernels as object
// files for AArch64, linked with a start routine that calls them one after the other, run under
// QEMU's user mode and compared with the naive loops of kernel_reference.h.
#include <gtest/gtest.h>
#include <llvm/AsmParser/Parser.h>
#include <llvm/IR/LegacyPassManager.h>
#include <llvm/IR/Module.h>
#include <llvm/Support/SourceMgr.h>
#include <llvm/Support/TargetSelect.h>
#include <llvm/Support/raw_ostream.h>
#include <llvm/Target/TargetMachine.h>

#include "core/error.h"
#include "jit/emit.h"
#include "jit/orc.h"
#include "tests/kernel_cases.h"
#include "tests/run_program.h"
#include "tests/temp_folder.h"

namespace calotype::jit {
namespace {

Target Arm() {
  static const bool initialised = [] {
    LLVMInitializeAArch64TargetInfo();
    LLVMInitializeAArch64Target();
    LLVMInitializeAArch64TargetMC();
    LLVMInitializeAArch64AsmPrinter();
    LLVMInitializeAArch64AsmParser();  // for the start routine's system calls
    return true;
  }();
  EXPECT_TRUE(initialised);
  return GenericTarget("aarch64-unknown-linux-gnu");
}

// The object file of a program that calls kernel_0, kernel_1, ... on `memory`, whose buffers are at
// `offsets`, writes all of the memory to its standard output and ends.
std::string StartObject(const Target& target, std::span<const Case> cases,
                        const std::vector<std::vector<size_t>>& offsets,
                        const std::string& memory) {
  std::string text = fmt::format("target triple = \"{}\"\n@memory = global [{} x i8] c\"",
                                 target.triple, memory.size());
  for (char c : memory) text += fmt::format("\\{:02X}", static_cast<unsigned char>(c));
  text += "\", align 64\n";
  std::string calls;
  for (size_t i = 0; i < cases.size(); ++i) {
    std::vector<std::string> pointers;
    for (size_t offset : offsets[i]) {
      pointers.push_back(fmt::format("ptr getelementptr (i8, ptr @memory, i64 {})", offset));
    }
    text += fmt::format(
        "@pointers_{0} = constant [{1} x ptr] [{2}]\n"
        "declare void @kernel_{0}(ptr, i64, i64)\n",
        i, pointers.size(), fmt::join(pointers, ", "));
    // In two calls, as two threads would.
    int64_t chunks = Chunks(cases[i].spec);
    calls += fmt::format(
        "  call void @kernel_{0}(ptr @pointers_{0}, i64 0, i64 {1})\n"
        "  call void @kernel_{0}(ptr @pointers_{0}, i64 {1}, i64 {2})\n",
        i, chunks / 2, chunks);
  }
  constexpr std::string_view kCall =
      "call i64 asm sideeffect \"svc #0\", \"={x0},{x8},{x0},{x1},{x2},"
      "~{memory}\"";
  text += fmt::format(
      "define void @_start() noreturn {{\n{0}"
      "  %written = {1}(i64 64, i64 1, ptr @memory, i64 {2})\n"
      "  %code = icmp ne i64 %written, {2}\n  %wide = zext i1 %code to i64\n"
      "  %end = {1}(i64 94, i64 %wide, ptr null, i64 0)\n  unreachable\n}}\n",
      calls, kCall, memory.size());
  llvm::LLVMContext context;
  llvm::SMDiagnostic problem;
  std::unique_ptr<llvm::Module> module = llvm::parseAssemblyString(text, problem, context);
  Check<InternalError>(module != nullptr, "start routine, line {}: {}", problem.getLineNo(),
                       problem.getMessage().str());
  std::unique_ptr<llvm::TargetMachine> machine = CreateTargetMachine(target);
  module->setDataLayout(machine->createDataLayout());
  llvm::SmallVector<char, 0> bytes;
  llvm::raw_svector_ostream stream(bytes);
  llvm::legacy::PassManager passes;
  Check<InternalError>(
      !machine->addPassesToEmitFile(passes, stream, nullptr, llvm::CodeGenFileType::ObjectFile),
      "no code for {}", target.triple);
  passes.run(*module);
  return {bytes.data(), bytes.size()};
}

// Compiles, links and runs the cases; `tolerance` as for kernel_test.
void RunOnArm(const std::vector<Case>& cases, uint32_t seed, double tolerance = 0) {
  Target target = Arm();
  test::TempFolder folder;
  Rng rng(seed);
  std::deque<CaseMemory> memories;
  std::vector<std::vector<size_t>> offsets(cases.size());
  std::string memory, program = folder / "program";
  std::vector<std::string> link = {CALOTYPE_AARCH64_LINKER, "-static", "-m",
                                   "aarch64linux",          "-o",      program};
  for (size_t i = 0; i < cases.size(); ++i) {
    link.push_back(folder / fmt::format("kernel_{}.o", i));
    test::WriteText(link.back(), CompileObject(cases[i].spec, fmt::format("kernel_{}", i), target));
    CaseMemory& own = memories.emplace_back(rng, cases[i]);
    for (size_t b = 0; b < own.ours.size(); ++b) {
      memory.resize((memory.size() + 63) / 64 * 64 + 64, '\x5a');  // a margin before each buffer
      offsets[i].push_back(memory.size());
      memory.append(static_cast<const char*>(own.our_pointers[b]), own.ours[b].bytes());
    }
  }
  link.push_back(folder / "start.o");
  test::WriteText(link.back(), StartObject(target, cases, offsets, memory));
  test::ProgramResult linked = test::RunProgram(link);
  ASSERT_EQ(linked.code, 0) << linked.err;
  test::ProgramResult result = test::RunProgram({CALOTYPE_AARCH64_EMULATOR, program});
  ASSERT_EQ(result.code, 0) << result.err;
  const std::string& after = result.out;
  ASSERT_EQ(after.size(), memory.size());
  double worst = 0;
  size_t end = 0;  // of the buffer before: what lies between two must be as it was
  for (size_t i = 0; i < cases.size(); ++i) {
    CaseMemory& own = memories[i];
    for (size_t b = 0; b < own.ours.size(); ++b) {
      size_t at = offsets[i][b], bytes = own.ours[b].bytes();
      ASSERT_EQ(after.substr(end, at - end), memory.substr(end, at - end)) << "case " << i;
      std::memcpy(own.our_pointers[b], after.data() + at, bytes);
      end = at + bytes;
    }
    own.RunReference(cases[i].spec);
    ASSERT_TRUE(own.Equal(cases[i].spec, tolerance, worst)) << "case " << i;
  }
  ::testing::Test::RecordProperty("worst", std::to_string(worst));
}

TEST(AArch64, LoopsReductionsAndIndices) {
  Rng rng(1);
  std::vector<Case> cases;
  for (int i = 0; i < 40; ++i) cases.push_back(RandomLoop(rng, 1500));
  for (int i = 0; i < 30; ++i) cases.push_back(RandomReduce(rng, 3000));
  for (int i = 0; i < 8; ++i) {
    auto [gather, scatter] = RandomGatherAndScatter(rng);
    cases.push_back(gather);
    cases.push_back(scatter);
  }
  for (int64_t elements : {1, 7, 1000}) cases.push_back(PhiloxNumbers(elements));
  RunOnArm(cases, 2);
}

TEST(AArch64, ContractionsAreExactOnIntegers) {
  Rng rng(3);
  std::vector<Case> cases;
  for (int i = 0; i < 20; ++i) cases.push_back(RandomContraction(rng, 10'000));
  for (int64_t m : {1, 5, 8, 13}) {
    for (int64_t n : {1, 4, 15, 16, 33}) {
      cases.push_back(MatrixProduct(rng, m, n, rng.Between(1, 20), rng.Chance(0.5)));
    }
  }
  cases.push_back(Convolution(rng, 2, 8, 8, 4, 1, 16, 3, 1));
  cases.push_back(Convolution(rng, 1, 5, 7, 3, 2, 8, 3, 2));
  cases.push_back(WeightGradient(4, 8, 5, 33, false));
  cases.push_back(WeightGradient(8, 8, 6, 12, true));
  RunOnArm(cases, 4);
}

TEST(AArch64, Attention) {
  const AttentionCase kinds[] = {{2, 2, 5, 7, 3, 4},
                                 {1, 2, 70, 77, 40, 40},
                                 {2, 2, 16, 16, 5, 17},
                                 {2, 3, 17, 13, 16, 16, false, 0, true},
                                 {2, 2, 40, 40, 8, 8, true},
                                 {2, 2, 21, 30, 8, 12, false, 1},
                                 {1, 2, 35, 11, 8, 8, false, 3}};
  std::vector<Case> cases, gradients;
  for (const AttentionCase& c : kinds) {
    cases.push_back(Attention(c));
    gradients.push_back(AttentionGradient(c));
  }
  RunOnArm(cases, 5, 2e-6);
  RunOnArm(gradients, 6, 4e-6);
}

}  // namespace
}  // namespace calotype::jit
