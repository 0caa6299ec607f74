// The two half-precision formats of model files, to and from float: F16 (IEEE binary16: 5 bits of
// exponent, 10 of fraction) and BF16 (the upper half of a float). Towards float exactly; back to
// the nearest, of two equally near ones to the even one, beyond the largest number to infinity. NaN
// stays NaN and keeps the bits that fit, so that reading and writing gives the same bits back.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace calotype {

// F16.
inline float HalfToFloat(uint16_t bits) {
  uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  uint32_t exponent = (bits >> 10) & 31u, mantissa = bits & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) {
    float value = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal, exact
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
  }
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t FloatToHalf(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7c00u | (magnitude >> 13 & 0x3ffu);
    if (result == 0x7c00u) result |= 0x200u;  // its fraction was in the bits that are gone
  } else if (magnitude >= 0x477ff000u) {      // 65520 = 65504 + half a unit
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, at most 1024 of them
    // Adding 2^23 leaves whole numbers and rounds to the even one, as float addition does.
    float whole = std::bit_cast<float>(magnitude) * 0x1p24f + 0x1p23f;
    result = std::bit_cast<uint32_t>(whole) & 0x7fffffu;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return static_cast<uint16_t>(bits >> 16 & 0x8000u) | static_cast<uint16_t>(result);
}

// BF16.
inline float BrainToFloat(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline uint16_t FloatToBrain(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) {
    uint32_t result = bits >> 16;
    if ((result & 0x7fu) == 0) result |= 0x40u;
    return static_cast<uint16_t>(result);
  }
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace calotype
