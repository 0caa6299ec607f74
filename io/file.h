// Reading files: regular files only, sizes checked before memory is taken, every failure a
// FileError that names the file and the reason of the operating system.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

#include "core/error.h"

namespace calotype {

// What a file asks for is not supported (exit code 3 of the app, as for other bad files).
class UnsupportedFileError : public UnsupportedError {
  using UnsupportedError::UnsupportedError;
};

// A regular file open for reading. Positioned reads, so a file that shrinks meanwhile is an error
// and never a signal (as it would be with a memory map).
class InputFile {
 public:
  // Errors: FileError if the file is missing, not a regular file, or unreadable.
  explicit InputFile(const std::filesystem::path& path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  const std::string& name() const { return name_; }
  uint64_t size() const { return size_; }
  // Fills data[0, size) from byte `offset`. Errors: FileError if the file ends before.
  void ReadAt(uint64_t offset, void* data, uint64_t size) const;

 private:
  std::string name_;
  int descriptor_ = -1;
  uint64_t size_ = 0;
};

// The whole content. Errors: FileError also if the file is larger than `max_bytes`.
std::string ReadFile(const std::filesystem::path& path, uint64_t max_bytes = uint64_t{1} << 30);

// What `use` returns, which reads the content of a file. What is wrong with the content
// (ValueError) becomes a FileError with the path in front; an UnsupportedError becomes an
// UnsupportedFileError with it.
template <class F>
auto InFile(const std::filesystem::path& path, F&& use) {
  try {
    return use();
  } catch (const UnsupportedError& e) {
    Fail<UnsupportedFileError>("{}: {}", path.string(), e.what());
  } catch (const ValueError& e) {
    Fail<FileError>("{}: {}", path.string(), e.what());
  } catch (const FileError& e) {
    std::string_view text = e.what();
    if (text.find(path.string()) != text.npos) throw;
    Fail<FileError>("{}: {}", path.string(), text);
  }
}

// True for well-formed UTF-8 (no overlong forms, no surrogates).
bool IsUtf8(std::string_view text);

// A name from a file as it may appear in a message: in single quotes, control characters and bytes
// that are not ASCII as \xHH, at most 120 bytes.
std::string Quoted(std::string_view text);

}  // namespace calotype
