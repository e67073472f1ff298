// __half with bit-exact rounding, by the compiler's own half type.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half a) { return _cvtsh_ss(a.bits); }
inline __half __float2half_rn(float a) {
  return {static_cast<uint16_t>(_cvtss_sh(a, _MM_FROUND_TO_NEAREST_INT))};
}
