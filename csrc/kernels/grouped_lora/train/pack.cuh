// Packs the adapters of a call as the pool holds them: A with its rows on 16 bytes, B transposed.
//
// Bytes: the weights read and written once, a few hundred KB beside tens of MB of activations. In
// exchange training runs on the kernels of prefill.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/grouped_lora/train/config.h"

namespace milora::train {

constexpr int kPackThreads = 256;

// Block (x, i): a share of adapter i of the table.
template <class T>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(const __grid_constant__ PackTable table, PackedPool pool, int64_t d_in,
                int64_t d_out) {
  constexpr int64_t kRowItems = 16 / static_cast<int64_t>(sizeof(T));
  const int index = blockIdx.y;
  const LoraWeights& weights = table.weights[index];
  const int64_t a_stride = ceil_div(d_in, kRowItems) * kRowItems;
  const int64_t bt_stride = ceil_div(d_out, kRowItems) * kRowItems;
  const T* a = static_cast<const T*>(weights.a);
  const T* b = static_cast<const T*>(weights.b);
  T* to_a = reinterpret_cast<T*>(pool.bytes + table.a_at[index]);
  T* to_bt = reinterpret_cast<T*>(pool.bytes + table.bt_at[index]);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kPackThreads;
  for (int64_t i = thread; i < weights.rank * a_stride; i += threads) {
    const int64_t r = i / a_stride, k = i % a_stride;
    to_a[i] = k < d_in ? a[r * d_in + k] : from_float<T>(0.0f);
  }
  for (int64_t i = thread; i < weights.rank * bt_stride; i += threads) {
    const int64_t r = i / bt_stride, c = i % bt_stride;
    to_bt[i] = c < d_out ? b[c * weights.rank + r] : from_float<T>(0.0f);
  }
  if (thread != 0) return;
  const int64_t adapter = table.first + index;
  pool.ranks[adapter] = weights.rank;
  pool.scales[adapter] = weights.scale;
  int64_t* forward = pool.offsets + kNumParts * adapter;
  int64_t* reverse = pool.reverse + kNumParts * adapter;
  for (int part = 0; part < kNumParts; ++part) forward[part] = reverse[part] = -1;
  forward[kPartA] = reverse[kPartBt] = table.a_at[index];
  forward[kPartBt] = reverse[kPartA] = table.bt_at[index];
}

// out [num_rows, width], contiguous, from rows at any stride (cudaMemcpy2D refuses those of an
// expanded tensor). 16 bytes a thread where both sides allow it. Block (columns, row).
template <class T>
__global__ void __launch_bounds__(kPackThreads)
    copy_rows_kernel(T* out, const T* in, int64_t in_stride, int64_t num_rows, int64_t width) {
  constexpr int64_t kItems = 16 / static_cast<int64_t>(sizeof(T));
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kPackThreads;
  const bool aligned =
      (reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(in)) % 16 == 0 &&
      width % kItems == 0 && in_stride % kItems == 0;
  for (int64_t row = blockIdx.y; row < num_rows; row += gridDim.y) {
    T* to = out + row * width;
    const T* from = in + row * in_stride;
    if (aligned) {
      for (int64_t i = first; i < width / kItems; i += threads) {
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
      }
    } else {
      for (int64_t i = first; i < width; i += threads) to[i] = from[i];
    }
  }
}

}  // namespace milora::train
