#include "core/isa.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "core/error.h"

namespace calotype {

namespace {

IsaLevel DetectHost() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return IsaLevel::v4;
  if (__builtin_cpu_supports("x86-64-v3")) return IsaLevel::v3;
  Check<UnsupportedError>(__builtin_cpu_supports("x86-64-v2"),
                          "this processor lacks SSE4.2; calotype needs x86-64-v2 or better");
#endif
  return IsaLevel::v2;
}

IsaLevel Cap() {
  const char* text = std::getenv("CALOTYPE_CPU");
  if (!text) return IsaLevel::v4;
  std::string_view name = text;
  if (name == "native" || name == "x86-64-v4") return IsaLevel::v4;
  if (name == "x86-64-v3") return IsaLevel::v3;
  if (name == "x86-64-v2") return IsaLevel::v2;
  Fail("CALOTYPE_CPU is \"{}\"; it must be x86-64-v2, x86-64-v3, x86-64-v4 or native", name);
}

}  // namespace

IsaLevel HostIsa() {
  static const IsaLevel level = std::min(DetectHost(), Cap());
  return level;
}

}  // namespace calotype
