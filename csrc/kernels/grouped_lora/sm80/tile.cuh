// Tiles of 128-byte rows in shared memory: filling them, and what the tensor cores make of them.
//
// Products have one shape for all dtypes. A warp computes 32 rows; lane l owns, of each block of
// 16 x 8 results, rows l / 4 and l / 4 + 8 and columns 2 (l % 4) and the next, as mma deals them.
// 16-bit types use mma; f32, which is for reference, multiplies in plain f32 with the same owners.
#pragma once

#include "kernels/cuda/tensor_core.cuh"
#include "kernels/grouped_lora/sm80/config.h"

namespace milora::prefill {

// Elements of T in a row of a tile, and in a piece.
template <class T>
constexpr int kRowItems = kRowBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kPieceItems = kPieceBytes / static_cast<int>(sizeof(T));

// Fills piece `piece` of row `row` from `source`, of which `items` elements exist (the others
// become 0; none, if not positive). `aligned`: source is a multiple of 16 bytes and may be copied
// asynchronously. `any` is an address on 16 bytes to name where nothing is read.
template <class T>
__device__ __forceinline__ void fill_piece(uint8_t* tile, int row, int piece, const T* source,
                                           int64_t items, bool aligned, const void* any) {
  uint8_t* target = tile + swizzled(row, piece);
  const int count =
      static_cast<int>(items < 0 ? 0 : (items < kPieceItems<T> ? items : kPieceItems<T>));
  if (aligned || count == 0) {
    copy_16_async(target, count > 0 ? source : any, count * static_cast<int>(sizeof(T)));
    return;
  }
#pragma unroll
  for (int i = 0; i < kPieceItems<T>; ++i) {
    reinterpret_cast<T*>(target)[i] = i < count ? source[i] : from_float<T>(0.0f);
  }
}

// Where each lane reads a matrix's row for load_matrices: 16 rows from `row`, pieces `piece` and
// piece + 1. `first` (A operand): matrices go down the rows and then across; otherwise across
// first.
__device__ __forceinline__ const uint8_t* matrix_row(const uint8_t* tile, int row, int piece,
                                                     bool first) {
  const int lane = threadIdx.x % kWarp, matrix = lane / 8;
  const int down = first ? matrix % 2 : matrix / 2, across = first ? matrix / 2 : matrix % 2;
  return tile + swizzled(row + down * 8 + lane % 8, piece + across);
}

__device__ __forceinline__ float4 four_floats(const uint8_t* at) {
  return *reinterpret_cast<const float4*>(at);
}

__device__ __forceinline__ float dot4(float sum, const float4& a, const float4& b) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

}  // namespace milora::prefill
