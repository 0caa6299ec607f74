// Scratch memory of the kernels: one block per calling thread that grows to the largest request and
// is reused from call to call, so a kernel that runs again allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace calotype {

// At least `bytes` bytes, 64-byte aligned, uninitialised, counted in MemoryStats; valid until the
// next call on the same thread. Only for kernels that call no other kernel meanwhile.
// Errors: OutOfMemoryError.
std::byte* ThreadScratch(int64_t bytes);

// Hands out consecutive 64-byte aligned parts of a block: first with a null base to learn the size.
class ScratchLayout {
 public:
  explicit ScratchLayout(std::byte* base = nullptr) : base_(base) {}
  template <class T>
  T* Take(int64_t count) {
    T* part = base_ ? reinterpret_cast<T*>(base_ + size_) : nullptr;
    size_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return part;
  }
  int64_t size() const { return size_; }

 private:
  std::byte* base_;
  int64_t size_ = 0;
};

}  // namespace calotype
