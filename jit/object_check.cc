#include "jit/object_check.h"

#include <fmt/format.h>
#include <llvm/Object/ObjectFile.h>

#include <algorithm>
#include <array>

namespace calotype::jit {

namespace {

using llvm::object::SymbolRef;

// Code, constants, unwind tables, and what describes them.
constexpr std::array<std::string_view, 9> kSections = {
    ".text",   ".rodata",   ".eh_frame",  ".note.GNU-stack", ".symtab",
    ".strtab", ".shstrtab", ".rela.text", ".rela.eh_frame"};

bool IsAllowedSection(llvm::StringRef name) {
  std::string_view text(name.data(), name.size());
  if (text.starts_with(".rodata.") || text.starts_with(".rela.rodata")) return true;
  return std::find(kSections.begin(), kSections.end(), text) != kSections.end();
}

std::string Message(llvm::Error error) { return llvm::toString(std::move(error)); }

}  // namespace

std::string ObjectProblem(std::string_view object, std::string_view symbol) {
  llvm::MemoryBufferRef bytes({object.data(), object.size()}, "kernel");
  auto file = llvm::object::ObjectFile::createObjectFile(bytes);
  if (!file) return Message(file.takeError());
  for (const auto& section : (*file)->sections()) {
    llvm::Expected<llvm::StringRef> name = section.getName();
    if (!name) return Message(name.takeError());
    if (section.getSize() > 0 && !IsAllowedSection(*name))
      return fmt::format("it has a section {}", name->str());
  }
  bool defined = false;
  for (const auto& entry : (*file)->symbols()) {
    llvm::Expected<uint32_t> flags = entry.getFlags();
    if (!flags) return Message(flags.takeError());
    llvm::Expected<llvm::StringRef> name = entry.getName();
    if (!name) return Message(name.takeError());
    if (*flags & SymbolRef::SF_FormatSpecific) continue;  // names of sections and files
    if (*flags & SymbolRef::SF_Undefined) return fmt::format("it refers to {}", name->str());
    if (!(*flags & SymbolRef::SF_Global)) continue;
    llvm::Expected<SymbolRef::Type> type = entry.getType();
    if (!type) return Message(type.takeError());
    std::string_view text(name->data(), name->size());
    if (text != symbol || *type != SymbolRef::ST_Function || defined) {
      return fmt::format("it defines {}", text);
    }
    defined = true;
  }
  if (!defined) return fmt::format("it does not define {}", symbol);
  return "";
}

}  // namespace calotype::jit
