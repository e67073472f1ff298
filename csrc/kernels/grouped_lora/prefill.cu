// grouped_lora_ for many rows per adapter:                                                 [eq. 1]
//   y_s[t] += g (s B C (rg * A x_t) + u y_s[t] + v)
//
// Three launches on one stream, none of which the host waits for: plan (runs of the batch -> tiles
// and jobs), shrink (A x, for all slices of a tile at once), expand (B C of that, into y). Grids
// are persistent and sized by the device; how much work there is, the kernels read from the plan.
//
// Floor, per token with m active slices of rank r, d = d_in = d_out, 16 bits: x once (2 d bytes)
// and y twice (4 d m); 4096 tokens of d 4096 and one slice are 100 MB, 21 us at 4.8 TB/s. FLOPs 4 r
// d m a token: 2.1 G there, 3 us on mma.sync. So the memory decides up to rank 128 and beyond, and
// mma.sync with cp.async is what A100 and Ada need. For 9.0 sm90/prefill.cu has the same by wgmma
// and tensor copies, which reads weights from L2 half as often.
//
// Bits of a row depend on x, the weights and the gate alone: the split of d_in is a constant, sums
// ascend, and no atomics take part.
#include <algorithm>

#include "kernels/grouped_lora/prefill.h"
#include "kernels/grouped_lora/sm80/expand.cuh"
#include "kernels/grouped_lora/sm80/launch.h"
#include "kernels/grouped_lora/sm80/plan.cuh"
#include "kernels/grouped_lora/sm80/shrink.cuh"

namespace milora {
namespace prefill {

cudaError_t count_processors(int* processors) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(processors, cudaDevAttrMultiProcessorCount, device);
}

template <class T>
cudaError_t launch_shrink(const GroupedLoraPoolParams& p, const Workspace& workspace,
                          int processors, cudaStream_t stream) {
  // More than 48 KB of shared memory has to be asked for.
  const cudaError_t error = cudaFuncSetAttribute(
      shrink_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShrinkBytes);
  if (error != cudaSuccess) return error;
  if (workspace.block_begin != nullptr) {
    plan_kernel<T, kTileRows, true><<<1, kPlanThreads, 0, stream>>>(p, workspace);
  } else {
    plan_kernel<T, kTileRows, false><<<1, kPlanThreads, 0, stream>>>(p, workspace);
  }
  // Every token may be a tile of its own; the device knows better, and blocks without work leave.
  const int64_t units = p.num_tokens * num_splits(p.d_in);
  shrink_kernel<T>
      <<<persistent_grid(units, processors, 3), kThreads, kShrinkBytes, stream>>>(p, workspace);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_expand(const GroupedLoraPoolParams& p, const Workspace& workspace,
                          int processors, cudaStream_t stream) {
  constexpr int kExpandBytes = expand_bytes(sizeof(T));
  const cudaError_t error = cudaFuncSetAttribute(
      expand_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kExpandBytes);
  if (error != cudaSuccess) return error;
  const int64_t widest = *std::max_element(p.d_out, p.d_out + p.num_slices);
  const auto column_units = static_cast<int>(ceil_div(widest, kUnitColumns));
  const int64_t units = p.num_tokens * p.num_slices * column_units;
  if (units == 0) return cudaSuccess;
  expand_kernel<T><<<persistent_grid(units, processors, 2), kThreads, kExpandBytes, stream>>>(
      p, workspace, column_units);
  return cudaGetLastError();
}

#define MILORA_INSTANTIATE(T)                                                                \
  template cudaError_t launch_shrink<T>(const GroupedLoraPoolParams&, const Workspace&, int, \
                                        cudaStream_t);                                       \
  template cudaError_t launch_expand<T>(const GroupedLoraPoolParams&, const Workspace&, int, \
                                        cudaStream_t);
MILORA_INSTANTIATE(float)
MILORA_INSTANTIATE(__nv_bfloat16)
MILORA_INSTANTIATE(__half)
#undef MILORA_INSTANTIATE

namespace {

template <class T>
cudaError_t launch(const GroupedLoraPoolParams& p, const Workspace& workspace,
                   cudaStream_t stream) {
  int processors = 0;
  cudaError_t error = count_processors(&processors);
  if (error == cudaSuccess) error = launch_shrink<T>(p, workspace, processors, stream);
  if (error == cudaSuccess) error = launch_expand<T>(p, workspace, processors, stream);
  return error;
}

}  // namespace
}  // namespace prefill

int64_t grouped_lora_prefill_workspace(const GroupedLoraPoolParams& p) {
  prefill::Workspace workspace;
  return prefill::lay_out(p, nullptr, false, &workspace);
}

int grouped_lora_prefill_cuda(const GroupedLoraPoolParams& p, void* memory, void* stream_) {
  if (p.num_tokens == 0 || p.num_routes == 0) return cudaSuccess;
  prefill::Workspace workspace;
  prefill::lay_out(p, memory, false, &workspace);
  const auto stream = static_cast<cudaStream_t>(stream_);
  switch (p.dtype) {
    case Dtype::kFloat32:
      return prefill::launch<float>(p, workspace, stream);
    case Dtype::kBFloat16:
      return prefill::launch<__nv_bfloat16>(p, workspace, stream);
    case Dtype::kFloat16:
      return prefill::launch<__half>(p, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace milora
