// The stages that tensor copies fill, and which thread copies which rows of a tile.
#pragma once

#include "kernels/cuda/wgmma.cuh"
#include "kernels/grouped_lora/sm90/prefill_config.h"

namespace milora::prefill_wgmma {

// Before the first copy, by all threads: a barrier for each stage of the block's shared memory.
template <int kCount>
__device__ __forceinline__ void init_stages(const void* shared, uint64_t (&filled)[kCount]) {
  if (threadIdx.x == 0) {
    if (shared_address(shared) % 1024 != 0) __trap();  // the swizzle follows the address
    for (int i = 0; i < kCount; ++i) barrier_init(&filled[i]);
    barrier_init_fence();
  }
  __syncthreads();
}

// The box that this thread copies; past the last one, if none.
__device__ __forceinline__ int own_box() {
  const int thread = static_cast<int>(threadIdx.x);
  return thread % kThreadsPerBox == 0 ? thread / kThreadsPerBox : kBoxes;
}

// The same where a warpgroup copies alone, four threads of each warp. For its threads.
__device__ __forceinline__ int box_of_group() {
  const int thread = static_cast<int>(threadIdx.x);
  return thread % kGroupThreadsPerBox == 0 ? thread / kGroupThreadsPerBox : kBoxes;
}

}  // namespace milora::prefill_wgmma
