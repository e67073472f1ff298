// Tensor maps for the kernels of sm_90a, made on the host.
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace milora {

// A row-major matrix of 16-bit elements, copied in boxes of 64 columns (128 bytes) by `box_rows`
// with the 128-byte swizzle. Rows start on 16 bytes. What lies outside of the matrix arrives as
// zeros, and is not written.
cudaError_t make_tensor_map(CUtensorMap* map, CUtensorMapDataType type, const void* data,
                            int64_t rows, int64_t columns, int64_t stride, int64_t box_rows);

template <class T>
cudaError_t make_tensor_map(CUtensorMap* map, const void* data, int64_t rows, int64_t columns,
                            int64_t stride, int64_t box_rows) {
  constexpr auto kType = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                   : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return make_tensor_map(map, kType, data, rows, columns, stride, box_rows);
}

}  // namespace milora
