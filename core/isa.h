// The instruction-set level that the eager kernels use. Files named *_isa.cc are compiled once per
// level, each copy in a namespace named after CALOTYPE_ISA (v2, v3, v4; `base` on other machines);
// callers pick one of the copies at run time with CALOTYPE_SELECT_ISA.
#pragma once

namespace calotype {

// The levels of the x86-64 psABI: v2 has SSE4.2, v3 AVX2 and FMA, v4 AVX-512 (F, BW, CD, DQ, VL).
enum class IsaLevel { v2, v3, v4 };

// The highest level that this processor has, capped by the environment variable CALOTYPE_CPU =
// x86-64 | x86-64-v2 | x86-64-v3 | x86-64-v4 | native (no cap). Found once per process; v2, the
// least, for x86-64 (which caps generated code at SSE2) and on machines that are not x86-64.
// Errors: ValueError for any other text in CALOTYPE_CPU.
IsaLevel HostIsa();

// CALOTYPE_DECLARE_ISA(extern const Table kTable) declares kTable in the namespace of every level;
// CALOTYPE_SELECT_ISA(kTable) is the copy for this machine. In the *_isa.cc file the definition is
// namespace calotype::CALOTYPE_ISA { extern const Table kTable = {...}; }
#if defined(__x86_64__)
#define CALOTYPE_DECLARE_ISA(...) \
  namespace v2 {                  \
  __VA_ARGS__;                    \
  }                               \
  namespace v3 {                  \
  __VA_ARGS__;                    \
  }                               \
  namespace v4 {                  \
  __VA_ARGS__;                    \
  }
#define CALOTYPE_SELECT_ISA(symbol)                                 \
  (::calotype::HostIsa() == ::calotype::IsaLevel::v4   ? v4::symbol \
   : ::calotype::HostIsa() == ::calotype::IsaLevel::v3 ? v3::symbol \
                                                       : v2::symbol)
#else
#define CALOTYPE_DECLARE_ISA(...) \
  namespace base {                \
  __VA_ARGS__;                    \
  }
#define CALOTYPE_SELECT_ISA(symbol) (base::symbol)
#endif

}  // namespace calotype
