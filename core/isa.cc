#include "core/isa.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "core/error.h"

namespace calotype {

namespace {

IsaLevel DetectHost() {
#if defined(__x86_64__)
  // By feature, since clang before 18 does not know the names of the levels. Every processor with
  // these of v3 has LZCNT, F16C and MOVBE, too.
  __builtin_cpu_init();
  const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("ssse3") &&
                  __builtin_cpu_supports("popcnt");
  const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  Check<UnsupportedError>(v2, "this processor lacks SSE4.2; calotype needs x86-64-v2 or better");
  if (v4) return IsaLevel::v4;
  if (v3) return IsaLevel::v3;
#endif
  return IsaLevel::v2;
}

IsaLevel Cap() {
  const char* text = std::getenv("CALOTYPE_CPU");
  if (!text) return IsaLevel::v4;
  std::string_view name = text;
  if (name == "native" || name == "x86-64-v4") return IsaLevel::v4;
  if (name == "x86-64-v3") return IsaLevel::v3;
  if (name == "x86-64-v2" || name == "x86-64") return IsaLevel::v2;
  Fail("CALOTYPE_CPU is \"{}\"; it must be x86-64, x86-64-v2, x86-64-v3, x86-64-v4 or native",
       name);
}

}  // namespace

IsaLevel HostIsa() {
  static const IsaLevel level = std::min(DetectHost(), Cap());
  return level;
}

}  // namespace calotype
