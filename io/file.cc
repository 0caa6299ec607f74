#include "io/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "core/error.h"

namespace calotype {

InputFile::InputFile(const std::filesystem::path& path) : name_(path.string()) {
  // O_NONBLOCK: opening a FIFO must not wait for a writer; it is refused below.
  do {
    descriptor_ = open(name_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  } while (descriptor_ < 0 && errno == EINTR);
  Check<FileError>(descriptor_ >= 0, "{}: cannot open: {}", name_,
                   std::generic_category().message(errno));
  struct stat info;
  if (fstat(descriptor_, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(descriptor_);
    Fail<FileError>("{}: not a regular file", name_);
  }
  size_ = static_cast<uint64_t>(info.st_size);
}

InputFile::~InputFile() { close(descriptor_); }

void InputFile::ReadAt(uint64_t offset, void* data, uint64_t size) const {
  // A single read moves at most 2 GiB on Linux.
  constexpr uint64_t kChunk = uint64_t{1} << 30;
  char* to = static_cast<char*>(data);
  while (size > 0) {
    ssize_t n = pread(descriptor_, to, std::min(size, kChunk), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    Check<FileError>(n >= 0, "{}: cannot read at byte {}: {}", name_, offset,
                     std::generic_category().message(errno));
    Check<FileError>(n > 0, "{}: the file ends at byte {}, {} more bytes were expected", name_,
                     offset, size);
    to += n;
    offset += static_cast<uint64_t>(n);
    size -= static_cast<uint64_t>(n);
  }
}

std::string ReadFile(const std::filesystem::path& path, uint64_t max_bytes) {
  InputFile file(path);
  Check<FileError>(file.size() <= max_bytes, "{}: {} bytes, more than the {} allowed here",
                   file.name(), file.size(), max_bytes);
  std::string text(file.size(), '\0');
  file.ReadAt(0, text.data(), text.size());
  return text;
}

bool IsUtf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    auto byte = [&](size_t k) -> unsigned {
      return k < text.size() ? static_cast<unsigned char>(text[k]) : 0u;
    };
    unsigned lead = byte(i);
    int extra = lead < 0x80              ? 0
                : (lead >> 5) == 0b110   ? 1
                : (lead >> 4) == 0b1110  ? 2
                : (lead >> 3) == 0b11110 ? 3
                                         : -1;
    if (extra < 0) return false;
    uint32_t code = extra == 0 ? lead : lead & (0x3fu >> extra);
    for (int k = 1; k <= extra; ++k) {
      unsigned next = byte(i + k);
      if ((next >> 6) != 0b10) return false;
      code = code << 6 | (next & 0x3f);
    }
    constexpr uint32_t kSmallest[] = {0, 0x80, 0x800, 0x10000};
    if (code < kSmallest[extra] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000))
      return false;
    i += 1 + extra;
  }
  return true;
}

std::string Quoted(std::string_view text) {
  constexpr size_t kMax = 120;
  std::string result = "'";
  for (unsigned char c : text.substr(0, kMax)) {
    if (c >= 0x20 && c < 0x7f) {
      result += static_cast<char>(c);
    } else {
      result += fmt::format("\\x{:02x}", c);
    }
  }
  result += text.size() > kMax ? fmt::format("...' ({} bytes)", text.size()) : "'";
  return result;
}

}  // namespace calotype
