// Small device helpers: 16-bit floats in and out, sums in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace milora {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float a) { return a; }
__device__ __forceinline__ float to_float(__nv_bfloat16 a) { return __bfloat162float(a); }
__device__ __forceinline__ float to_float(__half a) { return __half2float(a); }

template <class T>
__device__ __forceinline__ T from_float(float a);
template <>
__device__ __forceinline__ float from_float<float>(float a) {
  return a;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float a) {
  return __float2bfloat16_rn(a);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float a) {
  return __float2half_rn(a);
}

// The sum over a warp, the same bits in every lane.
__device__ __forceinline__ float warp_sum(float a) {
  for (int step = kWarp / 2; step > 0; step /= 2) a += __shfl_xor_sync(kAllLanes, a, step);
  return a;
}

// A warp's dot product of two rows.
template <class TA, class TB>
__device__ __forceinline__ float warp_dot(const TA* a, const TB* b, int64_t d) {
  float sum = 0;
  for (int64_t i = threadIdx.x % kWarp; i < d; i += kWarp) {
    sum = fmaf(to_float(a[i]), to_float(b[i]), sum);
  }
  return warp_sum(sum);
}

// The sum over a block, the same bits in every thread. `shared` holds one float per warp; all
// threads must call it.
template <int kThreads>
__device__ __forceinline__ float block_sum(float a, float* shared) {
  a = warp_sum(a);
  __syncthreads();  // shared may still be read from the call before
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = a;
  __syncthreads();
  float sum = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) sum += shared[w];
  return sum;
}

// Calls f with a null pointer of the device type of `dtype`.
template <class F>
int dispatch_device_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      f(static_cast<float*>(nullptr));
      break;
    case Dtype::kBFloat16:
      f(static_cast<__nv_bfloat16*>(nullptr));
      break;
    case Dtype::kFloat16:
      f(static_cast<__half*>(nullptr));
      break;
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace milora
