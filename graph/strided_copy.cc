#include "graph/strided_copy.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "core/parallel.h"
#include "core/shape.h"

namespace calotype {

namespace {

struct Axis {
  int64_t size, x, out;
};

template <class T>
void CopyPlane(const Axis& rows, const Axis& columns, const T* x, T* out) {
  if (columns.out == 1 && columns.x == 1) {
    for (int64_t i = 0; i < rows.size; ++i) {
      std::memcpy(out + i * rows.out, x + i * rows.x, columns.size * sizeof(T));
    }
  } else if (columns.out == 1 && columns.x == 0) {
    for (int64_t i = 0; i < rows.size; ++i) {
      std::fill_n(out + i * rows.out, columns.size, x[i * rows.x]);
    }
  } else {
    // Square blocks: one side is contiguous in each array, so every cache line is used while there.
    constexpr int64_t kBlock = 16;
    for (int64_t i0 = 0; i0 < rows.size; i0 += kBlock) {
      int64_t i1 = std::min(rows.size, i0 + kBlock);
      for (int64_t j0 = 0; j0 < columns.size; j0 += kBlock) {
        int64_t j1 = std::min(columns.size, j0 + kBlock);
        for (int64_t i = i0; i < i1; ++i) {
          for (int64_t j = j0; j < j1; ++j) {
            out[i * rows.out + j * columns.out] = x[i * rows.x + j * columns.x];
          }
        }
      }
    }
  }
}

template <class T>
void Copy(std::vector<Axis> axes, const T* x, T* out) {
  // Innermost: the axis with the smallest output stride. Second: the smallest x stride of the rest.
  std::stable_sort(axes.begin(), axes.end(),
                   [](const Axis& a, const Axis& b) { return a.out > b.out; });
  std::vector<Axis> merged;
  for (const Axis& axis : axes) {
    if (axis.size == 1) continue;
    if (!merged.empty() && merged.back().x == axis.x * axis.size &&
        merged.back().out == axis.out * axis.size) {
      merged.back() = {merged.back().size * axis.size, axis.x, axis.out};
    } else {
      merged.push_back(axis);
    }
  }
  if (merged.empty()) merged.push_back({1, 1, 1});
  Axis columns = merged.back();
  merged.pop_back();
  Axis rows{1, 0, 0};
  if (!merged.empty()) {
    auto best = merged.end() - 1;
    if (columns.x > 1) {
      best = std::min_element(merged.begin(), merged.end(), [](const Axis& a, const Axis& b) {
        return (a.x == 0 ? INT64_MAX : a.x) < (b.x == 0 ? INT64_MAX : b.x);
      });
    }
    rows = *best;
    merged.erase(best);
  }
  if (merged.empty() && rows.size > 1) {
    // Only one plane: cut its rows into strips for the threads.
    int64_t strip = std::max<int64_t>(16, 32768 / std::max<int64_t>(1, columns.size));
    ParallelFor(rows.size, strip, [&](int64_t begin, int64_t end) {
      CopyPlane(Axis{end - begin, rows.x, rows.out}, columns, x + begin * rows.x,
                out + begin * rows.out);
    });
    return;
  }
  int64_t planes = 1;
  for (const Axis& axis : merged) planes *= axis.size;
  int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, rows.size * columns.size));
  ParallelFor(planes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      int64_t rest = p, x_offset = 0, out_offset = 0;
      for (size_t a = merged.size(); a-- > 0;) {
        int64_t i = rest % merged[a].size;
        rest /= merged[a].size;
        x_offset += i * merged[a].x;
        out_offset += i * merged[a].out;
      }
      CopyPlane(rows, columns, x + x_offset, out + out_offset);
    }
  });
}

}  // namespace

void StridedCopy(int64_t element_size, std::span<const int64_t> extents, const void* x,
                 std::span<const int64_t> x_strides, void* out,
                 std::span<const int64_t> out_strides) {
  std::vector<Axis> axes;
  for (size_t i = 0; i < extents.size(); ++i) {
    if (extents[i] == 0) return;
    axes.push_back({extents[i], x_strides[i], out_strides[i]});
  }
  if (element_size == 4) {
    Copy(std::move(axes), static_cast<const uint32_t*>(x), static_cast<uint32_t*>(out));
  } else {
    Copy(std::move(axes), static_cast<const uint64_t*>(x), static_cast<uint64_t*>(out));
  }
}

}  // namespace calotype
