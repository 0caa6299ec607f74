// Memory between pages that cannot be touched, so that a kernel that reads or writes outside it
// crashes instead of passing.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

namespace calotype::jit::reference {

// `bytes` of memory between two pages that cannot be touched: they end at the upper one, or begin
// at the lower one; a pattern fills the rest of the room.
class GuardedBuffer {
 public:
  explicit GuardedBuffer(int64_t bytes, bool at_start = false) : bytes_(bytes) {
    page_ = sysconf(_SC_PAGESIZE);
    room_ = (bytes + kMargin + page_ - 1) / page_ * page_;
    void* map = mmap(nullptr, room_ + 2 * page_, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) throw std::bad_alloc();
    first_ = static_cast<char*>(map) + page_;
    mprotect(first_ - page_, page_, PROT_NONE);
    mprotect(first_ + room_, page_, PROT_NONE);
    std::memset(first_, kPattern, room_);
    data_ = at_start ? first_ : first_ + room_ - bytes;
  }
  ~GuardedBuffer() { munmap(first_ - page_, room_ + 2 * page_); }
  GuardedBuffer(const GuardedBuffer&) = delete;

  void* data() { return data_; }
  int64_t bytes() const { return bytes_; }
  bool MarginIntact() const {
    for (const char* p = first_; p != first_ + room_; ++p) {
      if (p == data_) p += bytes_;
      if (p == first_ + room_) break;
      if (*p != kPattern) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kMargin = 256;
  static constexpr char kPattern = 0x5a;
  char *first_ = nullptr, *data_ = nullptr;
  int64_t bytes_, room_ = 0, page_ = 0;
};

}  // namespace calotype::jit::reference
