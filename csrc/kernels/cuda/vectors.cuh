// 16-byte vectors of any element type, and sums over the lanes of a warp for several values at
// once.
#pragma once

#include "kernels/cuda/device.cuh"

namespace milora {

constexpr int kVectorBytes = 16;  // the widest load of a thread

template <class T>
constexpr int kVecOf = kVectorBytes / sizeof(T);  // elements of a vector

// The elements of a 16-byte vector; the last argument only names their type.
__device__ __forceinline__ void unpack(const uint4& v, float (&f)[4], const float*) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) f[i] = __uint_as_float(words[i]);
}
__device__ __forceinline__ void unpack(const uint4& v, float (&f)[8], const __nv_bfloat16*) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // a bfloat16 is the upper half of a float
    f[2 * i] = __uint_as_float(words[i] << 16);
    f[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void unpack(const uint4& v, float (&f)[8], const __half*) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    f[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] & 0xffffu)));
    f[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
  }
}

__device__ __forceinline__ uint16_t raw_bits(__nv_bfloat16 a) { return __bfloat16_as_ushort(a); }
__device__ __forceinline__ uint16_t raw_bits(__half a) { return __half_as_ushort(a); }

// The other way, rounded to nearest.
template <class T, int N>
__device__ __forceinline__ uint4 pack(const float (&f)[N]) {
  static_assert(N == kVecOf<T>, "a whole vector");
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (N == 4) {
      words[i] = __float_as_uint(f[i]);
    } else {
      const T pair[2] = {from_float<T>(f[2 * i]), from_float<T>(f[2 * i + 1])};
      words[i] = raw_bits(pair[0]) | static_cast<uint32_t>(raw_bits(pair[1])) << 16;
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Sums v[i] over the lanes that differ in the bits kFirst, kFirst / 2, ..., kLast of their number.
// Each step halves the values that a lane still holds; its total is left in v[0] (and following).
// The order of additions is the same for any N.
template <int kFirst, int kLast, int N>
__device__ __forceinline__ void reduce_lanes(float (&v)[N]) {
  int held = N;
#pragma unroll
  for (int bit = kFirst; bit >= kLast; bit /= 2) {
    if (held > 1) {
      held /= 2;
      const bool upper = threadIdx.x & bit;
#pragma unroll
      for (int i = 0; i < held; ++i) {
        const float sent = upper ? v[i] : v[i + held];
        const float kept = upper ? v[i + held] : v[i];
        v[i] = kept + __shfl_xor_sync(kAllLanes, sent, bit);
      }
    } else {
      v[0] += __shfl_xor_sync(kAllLanes, v[0], bit);
    }
  }
}

}  // namespace milora
