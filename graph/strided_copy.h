// Copies a box of elements between two strided arrays: what the view ops do in eager execution.
#pragma once

#include <cstdint>
#include <span>

namespace calotype {

// For every index of `extents`: out[sum i*out_strides] = x[sum i*x_strides]. Strides in elements of
// `element_size` (4 or 8) bytes; x strides may be 0. The arrays must not overlap. Multi-threaded.
void StridedCopy(int64_t element_size, std::span<const int64_t> extents, const void* x,
                 std::span<const int64_t> x_strides, void* out,
                 std::span<const int64_t> out_strides);

}  // namespace calotype
