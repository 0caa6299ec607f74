// Tensor: a dense row-major array with a shape and a dtype. Copying a Tensor shares its storage
// (like a handle); Clone() copies the data. Data is float32, indices are int32 or int64; float64
// exists for the reference interpreter and for files. Storage is 64-byte aligned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "core/error.h"
#include "core/shape.h"

namespace calotype {

enum class DType : uint8_t { kF32, kF64, kI32, kI64 };  // float and double, int32_t, int64_t

std::string_view DTypeName(DType dtype);  // "f32", "f64", "i32", "i64"
int64_t DTypeSize(DType dtype);           // bytes of one element

template <class T>
constexpr DType DTypeOf();
template <>
constexpr DType DTypeOf<float>() {
  return DType::kF32;
}
template <>
constexpr DType DTypeOf<double>() {
  return DType::kF64;
}
template <>
constexpr DType DTypeOf<int32_t>() {
  return DType::kI32;
}
template <>
constexpr DType DTypeOf<int64_t>() {
  return DType::kI64;
}

struct TensorType {
  DType dtype = DType::kF32;
  Shape shape;
  bool operator==(const TensorType&) const = default;
};
std::string ToString(const TensorType& type);  // "f32[2, 3]"

class Tensor {
 public:
  Tensor() = default;  // undefined
  // Uninitialised memory. Errors: ShapeError on overflow, OutOfMemoryError.
  explicit Tensor(const Shape& shape, DType dtype = DType::kF32);
  explicit Tensor(const TensorType& type) : Tensor(type.shape, type.dtype) {}

  static Tensor Zeros(const Shape& shape, DType dtype = DType::kF32);
  static Tensor Full(const Shape& shape, float value);
  static Tensor Scalar(float value) { return Full({}, value); }
  // Errors: ShapeError if the number of values is not that of the shape.
  template <class T>
  static Tensor From(const Shape& shape, std::span<const T> values);
  template <class T>
  static Tensor From(const Shape& shape, const std::vector<T>& values) {
    return From(shape, std::span<const T>(values));
  }
  // A view of memory that the caller keeps alive. `data` must be aligned for the dtype.
  static Tensor Borrow(const Shape& shape, DType dtype, void* data);

  bool defined() const { return data_ != nullptr; }
  const Shape& shape() const { return type_.shape; }
  DType dtype() const { return type_.dtype; }
  const TensorType& type() const { return type_; }
  int64_t elements() const { return type_.shape.elements(); }
  int64_t bytes() const { return elements() * DTypeSize(type_.dtype); }

  // The elements; T must be the dtype's type. Errors: ShapeError otherwise.
  template <class T = float>
  T* data() {
    CheckDType(DTypeOf<T>());
    return static_cast<T*>(data_);
  }
  template <class T = float>
  const T* data() const {
    CheckDType(DTypeOf<T>());
    return static_cast<const T*>(data_);
  }
  template <class T = float>
  std::span<T> values() {
    return {data<T>(), static_cast<size_t>(elements())};
  }
  template <class T = float>
  std::span<const T> values() const {
    return {data<T>(), static_cast<size_t>(elements())};
  }
  void* raw() { return data_; }
  const void* raw() const { return data_; }

  // Errors of the following: ShapeError for a tensor that is undefined or of a wrong shape.
  // The same storage under another shape with as many elements.
  Tensor Reshape(const Shape& shape) const;
  Tensor Clone() const;
  // Copies the elements of `source` (same shape and dtype) into this storage.
  void CopyFrom(const Tensor& source);
  // A converted copy (f32 <-> f64, integers <-> floats).
  Tensor To(DType dtype) const;
  // The only element as a double.
  double Item() const;
  // True if both handles share one storage.
  bool SharesStorage(const Tensor& other) const { return data_ == other.data_; }
  // True if no other handle shares the storage (it may be overwritten in place).
  bool Unique() const { return storage_ && storage_.use_count() == 1; }

 private:
  void CheckDefined() const;
  void CheckDType(DType wanted) const;

  TensorType type_;
  std::shared_ptr<void> storage_;
  void* data_ = nullptr;
};

// Counters of tensor storage, for tests: bytes now alive, the peak since the
// last ResetPeak(), and the number of allocations so far. Process-wide, thread-safe.
struct MemoryStats {
  static int64_t LiveBytes();
  static int64_t PeakBytes();
  static int64_t Allocations();
  static void ResetPeak();
};

// Aligned storage that counts in MemoryStats. Errors: OutOfMemoryError.
std::shared_ptr<void> AllocateStorage(int64_t bytes);

// For tests: from now on new storage lies between two pages that cannot be touched and starts as
// NaN. Its end, rounded up to 64 bytes, is at the page above, or its begin at the page below.
enum class StorageGuard : uint8_t { kOff, kAbove, kBelow };
void SetStorageGuard(StorageGuard guard);

}  // namespace calotype

template <>
struct fmt::formatter<calotype::DType> : fmt::formatter<std::string_view> {
  auto format(calotype::DType dtype, fmt::format_context& context) const {
    return fmt::formatter<std::string_view>::format(calotype::DTypeName(dtype), context);
  }
};
template <>
struct fmt::formatter<calotype::TensorType> : fmt::formatter<std::string> {
  auto format(const calotype::TensorType& type, fmt::format_context& context) const {
    return fmt::formatter<std::string>::format(calotype::ToString(type), context);
  }
};
