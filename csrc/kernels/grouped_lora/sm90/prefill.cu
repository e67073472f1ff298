// grouped_lora_ for many rows per adapter, sm_90a, by name (path 2):                       [eq. 1]
//   y_s[t] += g (s B C (rg * A x_t) + u y_s[t] + v)
//
// The launches of prefill.cu with other kernels: plan (tiles of 128 rows), shrink, expand. Floor
// and partial sums are the same; what differs is how often weights are read from L2, who moves x
// and y (the copy engine), and the rate of the matrix units.
#include <algorithm>

#include "kernels/grouped_lora/prefill.h"
#include "kernels/grouped_lora/sm80/launch.h"
#include "kernels/grouped_lora/sm80/plan.cuh"
#include "kernels/grouped_lora/sm90/prefill_expand.cuh"
#include "kernels/grouped_lora/sm90/prefill_shrink.cuh"
#include "kernels/grouped_lora/sm90/tensor_map.h"

namespace milora {
namespace prefill_wgmma {
namespace {

template <class T>
cudaError_t shrink(const GroupedLoraPoolParams& p, const Workspace& workspace, int processors,
                   cudaStream_t stream) {
  CUtensorMap x_map;
  cudaError_t error = make_tensor_map<T>(&x_map, p.x, p.num_tokens, p.d_in, p.x_stride, kBoxRows);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(shrink_wgmma_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               sizeof(ShrinkShared));
  if (error != cudaSuccess) return error;
  prefill::plan_kernel<T, kRows, false><<<1, prefill::kPlanThreads, 0, stream>>>(p, workspace);
  // Every token may be a tile of its own; the device knows better, and blocks without work leave.
  const int64_t units = p.num_tokens * prefill::num_splits(p.d_in);
  shrink_wgmma_kernel<T>
      <<<prefill::persistent_grid(units, processors, 2), kThreads, sizeof(ShrinkShared), stream>>>(
          p, workspace, x_map);
  return cudaGetLastError();
}

template <class T>
cudaError_t expand(const GroupedLoraPoolParams& p, const Workspace& workspace, int processors,
                   cudaStream_t stream) {
  const int64_t widest = *std::max_element(p.d_out, p.d_out + p.num_slices);
  const auto column_units = static_cast<int>(ceil_div(widest, kUnitColumns));
  const int64_t units = p.num_tokens * p.num_slices * column_units;
  if (units == 0) return cudaSuccess;
  YMaps maps{};
  for (int s = 0; s < p.num_slices; ++s) {
    if (p.d_out[s] == 0) continue;
    const cudaError_t error = make_tensor_map<T>(&maps.slice[s], p.y[s], p.num_tokens, p.d_out[s],
                                                 p.y_stride[s], kBoxRows);
    if (error != cudaSuccess) return error;
  }
  const cudaError_t error = cudaFuncSetAttribute(
      expand_wgmma_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(ExpandShared));
  if (error != cudaSuccess) return error;
  expand_wgmma_kernel<T>
      <<<prefill::persistent_grid(units, processors, 1), kThreads, sizeof(ExpandShared), stream>>>(
          p, workspace, column_units, maps);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const GroupedLoraPoolParams& p, const Workspace& workspace,
                   cudaStream_t stream) {
  int processors = 0;
  cudaError_t error = prefill::count_processors(&processors);
  if (error == cudaSuccess) error = shrink<T>(p, workspace, processors, stream);
  if (error == cudaSuccess) error = expand<T>(p, workspace, processors, stream);
  return error;
}

}  // namespace
}  // namespace prefill_wgmma

int grouped_lora_prefill_wgmma_cuda(const GroupedLoraPoolParams& p, void* memory, void* stream_) {
  if (p.num_tokens == 0 || p.num_routes == 0) return cudaSuccess;
  prefill::Workspace workspace;
  prefill::lay_out(p, memory, false, &workspace);
  const auto stream = static_cast<cudaStream_t>(stream_);
  switch (p.dtype) {
    case Dtype::kBFloat16:
      return prefill_wgmma::launch<__nv_bfloat16>(p, workspace, stream);
    case Dtype::kFloat16:
      return prefill_wgmma::launch<__half>(p, workspace, stream);
    case Dtype::kFloat32:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace milora
