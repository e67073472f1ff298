// __half with bit-exact rounding, by the compiler's own half type.
#pragma once

#include <stdint.h>

#include <bit>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half a) { return std::bit_cast<_Float16>(a); }
inline __half __float2half_rn(float a) { return std::bit_cast<__half>(static_cast<_Float16>(a)); }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half a) { return a.bits; }
