// bfloat16 of the CPU stand-in for CUDA.
#pragma once

#include <stdint.h>
#include <string.h>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float a) {
  uint32_t bits;
  memcpy(&bits, &a, sizeof(bits));
  if (a != a) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
