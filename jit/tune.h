// Tuner: measures on this machine what the cost models of contraction_plan.h and lower_winograd.h
// estimate: which algorithm computes a 3x3 convolution fastest, and in which order a contraction
// should compute its tiles. A measurement takes some milliseconds on random numbers; what it chose
// is kept in the compile cache, under a key of all that it depends on, so that the next compilation
// need not measure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/shape.h"
#include "jit/cache.h"
#include "jit/kernel.h"

namespace calotype::jit {

class Tuner {
 public:
  // Errors: FileError if the folder of the compile cache cannot be used.
  Tuner();
  ~Tuner();

  // Milliseconds of a call that convolves x [B, I, H, W] by w [O, I, 3, 3] with a border of zeros:
  // the direct sum, by Winograd's F(2x2, 3x3) and by F(4x4, 3x3). H and W must be divisible by 4.
  struct Times {
    double direct = 0, two = 0, four = 0;
  };
  Times TimesOf(const Shape& x, const Shape& w);
  // The fastest value of spec.schedule.
  int ScheduleOf(const ContractionSpec& spec);

  int choices() const { return choices_; }    // made so far
  int measured() const { return measured_; }  // of them those that the cache did not hold

 private:
  std::string Key(const std::string& what) const;
  // What was measured under the key: `count` whole numbers from `least` to `most`. An entry of the
  // cache that is something else is refused as "not {what}".
  using Numbers = std::vector<int64_t>;
  std::optional<Numbers> Find(const std::string& key, std::string_view what, size_t count,
                              int64_t least, int64_t most);
  void Store(const std::string& key, const Numbers& numbers);

  std::unique_ptr<CompileCache> cache_;    // null without one
  std::map<std::string, Numbers> stored_;  // of this compilation: models repeat their shapes
  int choices_ = 0, measured_ = 0;
};

}  // namespace calotype::jit
