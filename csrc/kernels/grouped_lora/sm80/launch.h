// Launches that prefill, the fused product and training share. Defined in prefill.cu, for the three
// dtypes.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/grouped_lora/sm80/config.h"

namespace milora::prefill {

// The multiprocessors of the current device.
cudaError_t count_processors(int* processors);

// A persistent grid: no more blocks than fit at once, nor than there can be units of work.
inline unsigned persistent_grid(int64_t units, int processors, int blocks_per_processor) {
  return static_cast<unsigned>(
      std::min<int64_t>(units, static_cast<int64_t>(processors) * blocks_per_processor));
}

// The plan (aligned where workspace.block_begin is given), then the partial sums of A x.
template <class T>
cudaError_t launch_shrink(const GroupedLoraPoolParams& params, const Workspace& workspace,
                          int processors, cudaStream_t stream);

// The second product, after launch_shrink with the same arguments.
template <class T>
cudaError_t launch_expand(const GroupedLoraPoolParams& params, const Workspace& workspace,
                          int processors, cudaStream_t stream);

}  // namespace milora::prefill
