// A tensor map: what cuTensorMapEncodeTiled is told about a matrix of 16-bit elements.
#pragma once

#include <stdint.h>

struct CUtensorMap {
  const uint8_t* data;
  int64_t rows, columns, row_bytes;
  int box_rows;  // by 64 columns
};

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9,
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

// For matrices in boxes of 64 columns; what the driver's manual refuses is refused.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank,
                                       void* data, const cuuint64_t* sizes,
                                       const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave,
                                       CUtensorMapSwizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  const bool fits = rank == 2 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && sizes[0] >= 1 &&
                    sizes[0] <= uint64_t{1} << 32 && sizes[1] >= 1 &&
                    sizes[1] <= uint64_t{1} << 32 && strides[0] % 16 == 0 &&
                    strides[0] < uint64_t{1} << 40 && box[0] == 64 && box[1] >= 1 &&
                    box[1] <= 256 && steps[0] == 1 && steps[1] == 1;
  if (!fits) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const uint8_t*>(data), static_cast<int64_t>(sizes[1]),
          static_cast<int64_t>(sizes[0]), static_cast<int64_t>(strides[0]),
          static_cast<int>(box[1])};
  return CUDA_SUCCESS;
}
