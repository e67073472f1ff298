// __nv_bfloat16 with bit-exact rounding to nearest, ties to even.
#pragma once

#include <stdint.h>

#include <bit>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 a) {
  return std::bit_cast<float>(static_cast<uint32_t>(a.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float a) {
  if (a != a) return {0x7fff};
  const auto bits = std::bit_cast<uint32_t>(a);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
