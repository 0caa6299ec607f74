#include "core/scratch.h"

#include <memory>

#include "core/tensor.h"

namespace calotype {

std::byte* ThreadScratch(int64_t bytes) {
  thread_local std::shared_ptr<void> block;
  thread_local int64_t size = 0;
  if (bytes > size || !block) {
    block.reset();  // before the new one is there: the contents are not kept
    size = 0;
    block = AllocateStorage(bytes);
    size = bytes;
  }
  return static_cast<std::byte*>(block.get());
}

}  // namespace calotype
