// Launches of fused_lora: plan, shrink, finish, product. One stream, no host synchronisation.
#include "kernels/grouped_lora/sm80/launch.h"
#include "kernels/grouped_lora/sm90/fused.cuh"
#include "kernels/grouped_lora/sm90/tensor_map.h"

namespace milora {
namespace {

template <class T>
cudaError_t launch(const FusedLoraParams& p, const fused::Workspace& workspace,
                   cudaStream_t stream) {
  const GroupedLoraPoolParams& lora = p.lora;
  const int64_t d_out = lora.d_out[0];
  int processors = 0;
  CUtensorMap x_map, w_map;
  cudaError_t error = prefill::count_processors(&processors);
  if (error == cudaSuccess) {
    error =
        make_tensor_map<T>(&x_map, lora.x, lora.num_tokens, lora.d_in, lora.x_stride, fused::kRows);
  }
  if (error == cudaSuccess) {
    error = make_tensor_map<T>(&w_map, p.w, d_out, lora.d_in, p.w_stride, fused::kColumns);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(fused::fused_kernel<T>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, fused::kSharedBytes);
  }
  if (error == cudaSuccess) {
    error = prefill::launch_shrink<T>(lora, workspace.shrink, processors, stream);
  }
  if (error != cudaSuccess) return error;
  const unsigned finish_grid = prefill::persistent_grid(lora.num_tokens, processors, 8);
  fused::finish_kernel<T><<<finish_grid, prefill::kThreads, 0, stream>>>(lora, workspace);
  const int64_t tiles =
      prefill::ceil_div(lora.num_tokens, fused::kRows) * prefill::ceil_div(d_out, fused::kColumns);
  fused::fused_kernel<T><<<prefill::persistent_grid(tiles, processors, 1), fused::kThreads,
                           fused::kSharedBytes, stream>>>(p, workspace, x_map, w_map);
  return cudaGetLastError();
}

}  // namespace

int64_t fused_lora_workspace(const FusedLoraParams& p) {
  fused::Workspace workspace;
  return fused::lay_out(p, nullptr, &workspace);
}

int fused_lora_cuda(const FusedLoraParams& p, void* memory, void* stream_) {
  fused::Workspace workspace;
  fused::lay_out(p, memory, &workspace);
  const auto stream = static_cast<cudaStream_t>(stream_);
  switch (p.lora.dtype) {
    case Dtype::kBFloat16:
      return launch<__nv_bfloat16>(p, workspace, stream);
    case Dtype::kFloat16:
      return launch<__half>(p, workspace, stream);
    case Dtype::kFloat32:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace milora
