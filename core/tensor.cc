#include "core/tensor.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace calotype {

namespace {

std::atomic<int64_t> live_bytes{0};
std::atomic<int64_t> peak_bytes{0};
std::atomic<int64_t> allocations{0};
std::atomic<StorageGuard> storage_guard{StorageGuard::kOff};

// Storage between two pages that cannot be touched.
std::shared_ptr<void> AllocateGuarded(int64_t bytes, StorageGuard guard) {
  int64_t page = sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
  void* map =
      mmap(nullptr, room + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  Check<OutOfMemoryError>(map != MAP_FAILED, "allocation of {} guarded bytes failed", bytes);
  char* first = static_cast<char*>(map) + page;
  mprotect(map, page, PROT_NONE);
  mprotect(first + room, page, PROT_NONE);
  std::memset(first, 0xff, room);
  char* data = guard == StorageGuard::kBelow ? first : first + room - bytes;
  return {data, [map, length = room + 2 * page](void*) { munmap(map, length); }};
}

template <class From, class To>
void Convert(const From* from, To* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

// Calls f with a value of the C++ type of `dtype`.
template <class F>
void Dispatch(DType dtype, F f) {
  switch (dtype) {
    case DType::kF32:
      return f(float{});
    case DType::kF64:
      return f(double{});
    case DType::kI32:
      return f(int32_t{});
    case DType::kI64:
      return f(int64_t{});
  }
}

}  // namespace

std::string_view DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kF64:
      return "f64";
    case DType::kI32:
      return "i32";
    case DType::kI64:
      return "i64";
  }
  return "?";
}

int64_t DTypeSize(DType dtype) { return dtype == DType::kF32 || dtype == DType::kI32 ? 4 : 8; }

std::string ToString(const TensorType& type) {
  return fmt::format("{}{}", DTypeName(type.dtype), type.shape);
}

int64_t MemoryStats::LiveBytes() { return live_bytes; }
int64_t MemoryStats::PeakBytes() { return peak_bytes; }
int64_t MemoryStats::Allocations() { return allocations; }
void MemoryStats::ResetPeak() { peak_bytes = live_bytes.load(); }

std::shared_ptr<void> AllocateStorage(int64_t bytes) {
  constexpr int64_t kAlign = 64;
  int64_t rounded =
      CheckedMul(CheckedAdd(bytes, kAlign - 1, "allocation") / kAlign, kAlign, "allocation");
  if (rounded == 0) rounded = kAlign;
  if (StorageGuard guard = storage_guard; guard != StorageGuard::kOff) {
    return AllocateGuarded(rounded, guard);
  }
  // Large blocks lie on huge pages, as far as the system has them: with page faults of 4 KiB eager
  // calls at batch 64 took up to twice as long.
  constexpr int64_t kHugePage = int64_t{2} << 20;
  const bool huge = rounded >= 2 * kHugePage;
  void* data = nullptr;
  Check<OutOfMemoryError>(posix_memalign(&data, huge ? kHugePage : kAlign, rounded) == 0,
                          "allocation of {} bytes failed", bytes);
  if (huge) madvise(data, rounded, MADV_HUGEPAGE);
  int64_t live = live_bytes += rounded;
  ++allocations;
  int64_t peak = peak_bytes;
  while (live > peak && !peak_bytes.compare_exchange_weak(peak, live)) {
  }
  return {data, [rounded](void* p) {
            std::free(p);
            live_bytes -= rounded;
          }};
}

void SetStorageGuard(StorageGuard guard) { storage_guard = guard; }

Tensor::Tensor(const Shape& shape, DType dtype) : type_{dtype, shape} {
  storage_ = AllocateStorage(CheckedMul(shape.elements(), DTypeSize(dtype), "tensor"));
  data_ = storage_.get();
}

Tensor Tensor::Zeros(const Shape& shape, DType dtype) {
  Tensor result(shape, dtype);
  std::memset(result.data_, 0, result.bytes());
  return result;
}

Tensor Tensor::Full(const Shape& shape, float value) {
  Tensor result(shape);
  for (float& x : result.values()) x = value;
  return result;
}

template <class T>
Tensor Tensor::From(const Shape& shape, std::span<const T> values) {
  Check<ShapeError>(static_cast<int64_t>(values.size()) == shape.elements(),
                    "tensor: {} values do not fill shape {}", values.size(), shape);
  Tensor result(shape, DTypeOf<T>());
  if (!values.empty()) std::memcpy(result.data_, values.data(), result.bytes());
  return result;
}
template Tensor Tensor::From(const Shape&, std::span<const float>);
template Tensor Tensor::From(const Shape&, std::span<const double>);
template Tensor Tensor::From(const Shape&, std::span<const int32_t>);
template Tensor Tensor::From(const Shape&, std::span<const int64_t>);

Tensor Tensor::Borrow(const Shape& shape, DType dtype, void* data) {
  Tensor result;
  result.type_ = {dtype, shape};
  result.data_ = data;
  return result;
}

Tensor Tensor::Reshape(const Shape& shape) const {
  CheckDefined();
  Check<ShapeError>(shape.elements() == elements(), "reshape: {} cannot become {}", this->shape(),
                    shape);
  Tensor result = *this;
  result.type_.shape = shape;
  return result;
}

Tensor Tensor::Clone() const {
  CheckDefined();
  Tensor result(type_);
  std::memcpy(result.data_, data_, bytes());
  return result;
}

void Tensor::CopyFrom(const Tensor& source) {
  CheckDefined();
  source.CheckDefined();
  Check<ShapeError>(source.type_ == type_, "copy: {} does not fit into {}", source.type_, type_);
  std::memcpy(data_, source.data_, bytes());
}

Tensor Tensor::To(DType dtype) const {
  CheckDefined();
  Tensor result(shape(), dtype);
  Dispatch(this->dtype(), [&](auto from) {
    Dispatch(dtype, [&](auto to) {
      Convert(static_cast<const decltype(from)*>(data_), static_cast<decltype(to)*>(result.data_),
              elements());
    });
  });
  return result;
}

double Tensor::Item() const {
  CheckDefined();
  Check<ShapeError>(elements() == 1, "item: tensor {} does not have one element", shape());
  double value = 0;
  Dispatch(dtype(),
           [&](auto t) { value = static_cast<double>(*static_cast<const decltype(t)*>(data_)); });
  return value;
}

void Tensor::CheckDefined() const {
  Check<ShapeError>(defined(), "tensor: access to an undefined tensor");
}

void Tensor::CheckDType(DType wanted) const {
  CheckDefined();
  Check<ShapeError>(dtype() == wanted, "tensor: dtype is {}, access as {}", dtype(), wanted);
}

}  // namespace calotype
