// CUDA's words for a C++ compiler: enough to compile the kernels under csrc/ as they are, for the
// emulator. This folder comes first in the include path, so this file, its neighbours and those of
// kernels/cuda/ are found before the real ones.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "emulator.h"

#define __CUDA_ARCH_FEAT_SM90_ALL  // what sm_90a alone has is emulated, too
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// Blocks run one after the other. Those of a cluster do not, and must use dynamic shared memory.
#define __shared__ static

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorNotSupported = 801,
};
namespace milora::emulator {
inline cudaError_t last_error = cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return std::exchange(milora::emulator::last_error, cudaSuccess);
}

// ---- one thread ----

using std::max;
using std::min;

inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
[[noreturn]] inline void __trap() { milora::emulator::die("trap"); }

inline uint4 __ldg(const uint4* from) {
  milora::emulator::check_readable(from, sizeof(uint4));
  return *from;
}
template <class V>
void __stwb(V* to, V value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(V) != 0) {
    milora::emulator::die("a vector store that is not on its own size");
  }
  *to = value;
}

// No other thread runs meanwhile.
template <class V>
V atomicAdd(V* to, V value) {
  const V before = *to;
  *to += value;
  return before;
}
template <class V>
V atomicMin(V* to, V value) {
  const V before = *to;
  *to = min(before, value);
  return before;
}
inline void __threadfence() {}

// ---- a block, a warp ----

inline void __syncthreads() { milora::emulator::meet(milora::emulator::own_block().barrier); }
inline void __syncwarp() { milora::emulator::meet(milora::emulator::own_warp().barrier); }

template <class V>
V __shfl_up_sync(unsigned, V value, int step) {
  const int lane = milora::emulator::lane();
  return milora::emulator::exchange(value)[lane >= step ? lane - step : lane];
}
template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  return milora::emulator::exchange(value)[milora::emulator::lane() ^ mask];
}
inline uint32_t __ballot_sync(unsigned, bool value) {
  const auto values = milora::emulator::exchange(value);
  uint32_t bits = 0;
  for (int lane = 0; lane < milora::emulator::kWarpSize; ++lane) {
    bits |= static_cast<uint32_t>(values[lane]) << lane;
  }
  return bits;
}
