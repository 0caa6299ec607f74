// Naive double-precision execution of kernel specifications on raw memory, and buffers that end at
// an unreadable page: what tests compare generated kernels with.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "jit/kernel.h"

namespace calotype::jit::reference {

// `bytes` of memory that end at a page which cannot be touched; a margin before them holds a
// pattern.
class GuardedBuffer {
 public:
  explicit GuardedBuffer(int64_t bytes) : bytes_(bytes) {
    int64_t page = sysconf(_SC_PAGESIZE);
    room_ = (bytes + kMargin + page - 1) / page * page;
    void* map =
        mmap(nullptr, room_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) throw std::bad_alloc();
    map_ = static_cast<char*>(map);
    mprotect(map_ + room_, page, PROT_NONE);
    std::memset(map_, 0x5a, room_);
  }
  ~GuardedBuffer() { munmap(map_, room_ + sysconf(_SC_PAGESIZE)); }
  GuardedBuffer(const GuardedBuffer&) = delete;

  void* data() { return map_ + room_ - bytes_; }
  int64_t bytes() const { return bytes_; }
  bool MarginIntact() const {
    for (const char* p = map_; p != map_ + room_ - bytes_; ++p) {
      if (*p != 0x5a) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kMargin = 256;
  char* map_ = nullptr;
  int64_t bytes_, room_ = 0;
};

using Index = std::vector<int64_t>;

// Calls f for every index of `extents`, the last running fastest.
inline void ForEach(const std::vector<int64_t>& extents,
                    const std::function<void(const Index&)>& f) {
  Index index(extents.size(), 0);
  for (int64_t e : extents) {
    if (e == 0) return;
  }
  for (;;) {
    f(index);
    size_t d = extents.size();
    while (d > 0 && ++index[d - 1] == extents[d - 1]) index[--d] = 0;
    if (d == 0) return;
  }
}

inline int64_t Position(const Operand& operand, const Index& index) {
  int64_t position = operand.offset;
  for (size_t d = 0; d < operand.strides.size(); ++d) position += index[d] * operand.strides[d];
  return position;
}

inline double Read(const Operand& operand, void* const* pointers, const Index& index) {
  int64_t i = Position(operand, index);
  const void* base = pointers[operand.pointer];
  if (operand.dtype == DType::kI32) return static_cast<const int32_t*>(base)[i];
  if (operand.dtype == DType::kI64)
    return static_cast<double>(static_cast<const int64_t*>(base)[i]);
  return static_cast<const float*>(base)[i];
}

inline float& At(const Operand& operand, void* const* pointers, const Index& index) {
  return static_cast<float*>(pointers[operand.pointer])[Position(operand, index)];
}

inline std::vector<float> Evaluate(const ScalarProgram& program, const std::vector<float>& in) {
  std::vector<float> out(program.results.size());
  program.Evaluate(in.data(), out.data());
  return out;
}

inline Index Join(Index x, const Index& y) {
  x.insert(x.end(), y.begin(), y.end());
  return x;
}

inline void StoreEpilogue(const Epilogue& epilogue, void* const* pointers, const Index& index,
                          double result) {
  std::vector<float> in = {static_cast<float>(result)};
  for (const Operand& o : epilogue.operands)
    in.push_back(static_cast<float>(Read(o, pointers, index)));
  std::vector<float> out = Evaluate(epilogue.program, in);
  for (size_t r = 0; r < out.size(); ++r) At(epilogue.outputs[r], pointers, index) = out[r];
}

inline void Run(const LoopSpec& s, void* const* pointers) {
  ForEach(s.extents, [&](const Index& index) {
    std::vector<float> in;
    for (const Operand& o : s.inputs) in.push_back(static_cast<float>(Read(o, pointers, index)));
    std::vector<float> out = Evaluate(s.program, in);
    for (size_t r = 0; r < out.size(); ++r) At(s.outputs[r], pointers, index) = out[r];
  });
}

inline void Run(const ReduceSpec& s, void* const* pointers) {
  bool sum = s.kind == ReduceSpec::kSum;
  ForEach(s.extents, [&](const Index& index) {
    double result = sum ? 0 : -std::numeric_limits<double>::infinity();
    ForEach(s.reduced, [&](const Index& r) {
      std::vector<float> in;
      for (const Operand& o : s.inputs) {
        in.push_back(static_cast<float>(Read(o, pointers, Join(index, r))));
      }
      double x = Evaluate(s.program, in)[0];
      result = sum ? result + x : std::max(result, x);
    });
    StoreEpilogue(s.epilogue, pointers, index, result);
  });
}

inline void Run(const ContractionSpec& s, void* const* pointers) {
  Index extents = Join(s.m, {s.n});
  ForEach(extents, [&](const Index& index) {
    Index m(index.begin(), index.end() - 1);
    double result = 0;
    ForEach(s.k, [&](const Index& k) {
      Index mk = Join(m, k);
      result += Read(s.a, pointers, mk) * Read(s.b, pointers, Join(mk, {index.back()}));
    });
    StoreEpilogue(s.epilogue, pointers, index, result);
  });
}

}  // namespace calotype::jit::reference
