// grouped_lora_ for many rows per adapter:  y_s[t] += g (s B (A x_t) + u y_s[t] + v)      [eq. 1]
//
// Three launches on one stream, none of which the host waits for: plan (runs of the batch -> tiles
// and jobs), shrink (A x, for all slices of a tile at once), expand (B of that, into y). Grids are
// persistent and sized by the device; how much work there is, the kernels read from the plan.
//
// Floor, per token with m active slices of rank r, d = d_in = d_out, 16 bits: x once (2 d bytes)
// and y twice (4 d m); 4096 tokens of d 4096 and one slice are 100 MB, 21 us at 4.8 TB/s. FLOPs 4 r
// d m a token: 2.1 G there, 3 us on mma.sync. So the memory decides up to rank 128 and beyond, and
// mma.sync with cp.async is all that A100, Ada and H100 need; wgmma serves the fused product with
// the base weights, which the matrix units do limit (sm90/).
//
// Bits of a row depend on x, the weights and the gate alone: the split of d_in is a constant, sums
// ascend, and no atomics take part.
#include <algorithm>

#include "kernels/grouped_lora/prefill.h"
#include "kernels/grouped_lora/sm80/expand.cuh"
#include "kernels/grouped_lora/sm80/plan.cuh"
#include "kernels/grouped_lora/sm80/shrink.cuh"

namespace milora {
namespace {

using namespace prefill;

template <class T>
cudaError_t launch(const GroupedLoraPoolParams& p, const Workspace& workspace,
                   cudaStream_t stream) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  // More than 48 KB of shared memory has to be asked for.
  constexpr int kExpandBytes = expand_bytes(sizeof(T));
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(shrink_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 kShrinkBytes);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(expand_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 kExpandBytes);
  }
  if (error != cudaSuccess) return error;

  // Every token may be a tile of its own; the device knows better, and blocks without work leave.
  const auto grid = [&](int64_t units, int per_processor) {
    return static_cast<unsigned>(
        std::min<int64_t>(units, static_cast<int64_t>(processors) * per_processor));
  };
  const int64_t widest = *std::max_element(p.d_out, p.d_out + p.num_slices);
  const auto column_units = static_cast<int>(ceil_div(widest, kUnitColumns));
  plan_kernel<T><<<1, kPlanThreads, 0, stream>>>(p, workspace);
  shrink_kernel<T><<<grid(p.num_tokens * num_splits(p.d_in), 3), kThreads, kShrinkBytes, stream>>>(
      p, workspace);
  expand_kernel<T>
      <<<grid(p.num_tokens * p.num_slices * column_units, 2), kThreads, kExpandBytes, stream>>>(
          p, workspace, column_units);
  return cudaGetLastError();
}

}  // namespace

int64_t grouped_lora_prefill_workspace(const GroupedLoraPoolParams& p) {
  Workspace workspace;
  return lay_out(p, nullptr, &workspace);
}

int grouped_lora_prefill_cuda(const GroupedLoraPoolParams& p, void* memory, void* stream_) {
  const int64_t widest = *std::max_element(p.d_out, p.d_out + p.num_slices);
  if (p.num_tokens == 0 || p.num_routes == 0 || widest == 0) return cudaSuccess;
  Workspace workspace;
  lay_out(p, memory, &workspace);
  const auto stream = static_cast<cudaStream_t>(stream_);
  switch (p.dtype) {
    case Dtype::kFloat32:
      return launch<float>(p, workspace, stream);
    case Dtype::kBFloat16:
      return launch<__nv_bfloat16>(p, workspace, stream);
    case Dtype::kFloat16:
      return launch<__half>(p, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace milora
