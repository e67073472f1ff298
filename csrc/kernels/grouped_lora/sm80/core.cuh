// The core of an expert in prefill and in the fused product:  S = C h,  h = rg * sum of partials.
//
// Both sums stay in float32; S is rounded after them, as it is without a core. h of 16 rows at a
// time stands in shared memory, ranks down and rows across: a thread adds 4 rows for one row of C,
// so an element of C (from L1 or L2, 16 bytes a load) and 16 bytes of h make 4 FMA. FMA and not
// tensor cores, which would round h first: adapters with a core are those of small ranks (LoRA-XS).
// At rank 64 a tile takes 2,000 cycles of a multiprocessor, by count a sixth of what the memory
// takes for the y of a unit of the expand.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/vectors.cuh"
#include "kernels/grouped_lora/sm80/config.h"
#include "kernels/grouped_lora/sm80/expert.cuh"

namespace milora::prefill {

constexpr int kCoreRows = 16;
constexpr int kCoreRowsAtOnce = 4;
using CoreRows = float[kMaxRank][kCoreRows];
static_assert(sizeof(CoreRows) == kExpandStageBytes, "the expand lends a stage");

// Ranks [r, r + 4) of h of a token: the splits in ascending order, then the gates. What lies past
// the rank is 0.
__device__ __forceinline__ float4 hidden_four(const GroupedLoraPoolParams& p,
                                              const Partials& partials, int64_t token, int slice,
                                              int rank, int r) {
  const int splits = num_splits(p.d_in);
  float sum[4] = {};
  for (int split = 0; split < splits; ++split) {
    // Sums past the rank are there, up to the block of 16, and are dropped below.
    const float4 part = *reinterpret_cast<const float4*>(
        partials.sums + partial_row(p, partials.width, split, slice, token) + r);
    sum[0] += part.x;
    sum[1] += part.y;
    sum[2] += part.z;
    sum[3] += part.w;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (r + j >= rank) {
      sum[j] = 0.0f;
    } else if (p.rank_gates != nullptr) {
      sum[j] *= rank_gates_at(p, token, slice)[r + j];
    }
  }
  return {sum[0], sum[1], sum[2], sum[3]};
}

// put(row, k, S) for each row of the tile and each rank, and 0 up to the next multiple of 16. All
// kBlockThreads threads of the block must call it; `staged` is theirs until it returns, after a
// barrier.
template <class T, int kBlockThreads = kThreads, class Put>
__device__ __forceinline__ void multiply_core(const GroupedLoraPoolParams& p,
                                              const Partials& partials, const Tile& tile, int slice,
                                              int rank, const uint8_t* core, CoreRows& staged,
                                              const Put& put) {
  constexpr int kVec = kVecOf<T>;
  const int64_t row_bytes = pool_row_bytes<T>(rank);
  const int padded = static_cast<int>(ceil_div(rank, kRankBlock)) * kRankBlock;
  for (int first = 0; first < tile.rows; first += kCoreRows) {
    const int left = tile.rows - first;
    const int rows = left < kCoreRows ? left : kCoreRows;
    __syncthreads();  // the rows before may still be read
    for (int i = threadIdx.x; i < kCoreRows * padded / 4; i += kBlockThreads) {
      const int row = i % kCoreRows, r = i / kCoreRows * 4;
      float4 four = {0.0f, 0.0f, 0.0f, 0.0f};
      if (row < rows) four = hidden_four(p, partials, tile.first + first + row, slice, rank, r);
      staged[r][row] = four.x;
      staged[r + 1][row] = four.y;
      staged[r + 2][row] = four.z;
      staged[r + 3][row] = four.w;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < padded * (kCoreRows / kCoreRowsAtOnce); i += kBlockThreads) {
      const int k = i % padded, row = i / padded * kCoreRowsAtOnce;
      if (row >= rows) continue;
      float sums[kCoreRowsAtOnce] = {};
      for (int j = 0; k < rank && j < rank; j += kVec) {
        float c[kVec];
        unpack(__ldg(reinterpret_cast<const uint4*>(core + k * row_bytes + j * sizeof(T))), c,
               static_cast<const T*>(nullptr));
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          if (j + e >= rank) break;  // padding may hold anything
          const float4 h = *reinterpret_cast<const float4*>(&staged[j + e][row]);
          sums[0] = fmaf(c[e], h.x, sums[0]);
          sums[1] = fmaf(c[e], h.y, sums[1]);
          sums[2] = fmaf(c[e], h.z, sums[2]);
          sums[3] = fmaf(c[e], h.w, sums[3]);
        }
      }
#pragma unroll
      for (int m = 0; m < kCoreRowsAtOnce; ++m) {
        if (row + m < rows) put(first + row + m, k, sums[m]);
      }
    }
  }
  __syncthreads();
}

// S of a tile's slice, rounded, where target(row, r) says; there the four from r on are neighbours.
// Ranks up to the next multiple of 16 are zeros; so are rows from the tile's to `rows`, unless
// there is a core: then they stay as they are. All kBlockThreads threads; `staged` is theirs for
// the core.
template <class T, int kBlockThreads = kThreads, class Target>
__device__ __forceinline__ void make_hidden(const GroupedLoraPoolParams& p,
                                            const Partials& partials, const Tile& tile, int slice,
                                            int rank, int rows, const uint8_t* core,
                                            CoreRows& staged, const Target& target) {
  if (core != nullptr) {
    multiply_core<T, kBlockThreads>(
        p, partials, tile, slice, rank, core, staged,
        [&](int row, int k, float sum) { *target(row, k) = from_float<T>(sum); });
    return;
  }
  const int fours = static_cast<int>(ceil_div(rank, kRankBlock)) * (kRankBlock / 4);
  for (int i = threadIdx.x; i < rows * fours; i += kBlockThreads) {
    const int row = i / fours, r = i % fours * 4;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    if (row < tile.rows && r < rank) {
      sum = hidden_four(p, partials, tile.first + row, slice, rank, r);
    }
    T* at = target(row, r);
    at[0] = from_float<T>(sum.x);
    at[1] = from_float<T>(sum.y);
    at[2] = from_float<T>(sum.z);
    at[3] = from_float<T>(sum.w);
  }
}

}  // namespace milora::prefill
