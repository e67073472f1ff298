// Launches of fused_lora: plan, shrink, finish, product. One stream, no host synchronisation.
#include "kernels/grouped_lora/sm80/launch.h"
#include "kernels/grouped_lora/sm90/fused.cuh"

namespace milora {
namespace {

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// The driver's function, through the runtime: the library does not link to libcuda.
EncodeTensorMap find_encode_tensor_map() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &result);
  const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
  return found ? reinterpret_cast<EncodeTensorMap>(function) : nullptr;
}

// A row-major matrix, read in boxes of 64 columns (128 bytes) by `box_rows`. What lies outside of
// the matrix arrives as zeros.
template <class T>
cudaError_t make_map(CUtensorMap* map, const void* data, int64_t rows, int64_t columns,
                     int64_t stride, uint32_t box_rows) {
  static const EncodeTensorMap encode = find_encode_tensor_map();
  if (encode == nullptr) return cudaErrorNotSupported;
  constexpr auto kType = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                   : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * sizeof(T)};
  const cuuint32_t box[2] = {fused::kDepth, box_rows};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(map, kType, 2, const_cast<void*>(data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class T>
cudaError_t launch(const FusedLoraParams& p, const fused::Workspace& workspace,
                   cudaStream_t stream) {
  const GroupedLoraPoolParams& lora = p.lora;
  const int64_t d_out = lora.d_out[0];
  int processors = 0;
  CUtensorMap x_map, w_map;
  cudaError_t error = prefill::count_processors(&processors);
  if (error == cudaSuccess) {
    error = make_map<T>(&x_map, lora.x, lora.num_tokens, lora.d_in, lora.x_stride, fused::kRows);
  }
  if (error == cudaSuccess) {
    error = make_map<T>(&w_map, p.w, d_out, lora.d_in, p.w_stride, fused::kColumns);
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

bool fused_lora_cuda_supported(int device) {
  int major = 0, minor = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
}

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
