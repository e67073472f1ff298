// CUDA's words for g++: enough to compile the kernels under csrc/kernels for the emulator.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
using std::memcpy;
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline float fmaf(float a, float b, float c) { return std::fma(a, b, c); }
inline int __popc(uint32_t a) { return __builtin_popcount(a); }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return 0; }

#include "emulator.h"

inline void __syncwarp() {}
[[noreturn]] inline void __trap() { milora::emulator::die("trap"); }
inline void __syncthreads() { milora::emulator::meet_block(); }
template <class V>
inline V __shfl_up_sync(unsigned, V value, int step) {
  const int lane = milora::emulator::lane();
  const auto values = milora::emulator::exchange(value);
  return values[lane >= step ? lane - step : lane];
}
template <class V>
inline V __shfl_xor_sync(unsigned, V value, int mask) {
  return milora::emulator::exchange(value)[milora::emulator::lane() ^ mask];
}
inline unsigned __ballot_sync(unsigned, bool value) {
  unsigned bits = 0;
  const auto values = milora::emulator::exchange(value);
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(values[lane]) << lane;
  return bits;
}
