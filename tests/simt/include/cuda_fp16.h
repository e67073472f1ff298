// float16 of the CPU stand-in for CUDA.
#pragma once

#include <stdint.h>
#include <string.h>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half a) {
  _Float16 value;
  memcpy(&value, &a, sizeof(value));
  return static_cast<float>(value);
}
inline __half __float2half_rn(float a) {
  const _Float16 value = static_cast<_Float16>(a);
  __half half;
  memcpy(&half, &value, sizeof(half));
  return half;
}
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half a) { return a.bits; }
