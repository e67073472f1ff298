// Which thread copies which rows of a tile.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/grouped_lora/sm90/prefill_config.h"

namespace milora::prefill_wgmma {

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
