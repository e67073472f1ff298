// Backward of grouped_lora, sums over tokens. With h = A x, G = B^T dy from two shrinks:
//
//   dA[r] = sum_t (g s G_tr) x_t      dB[:, r] = sum_t (g s h_tr) dy_t      dgate = sum_t s G_t .
//   h_t
//
// finish_kernel adds the splits of both shrinks and rounds the factors to x's dtype for the tensor
// cores; reduce_kernel forms [64 ranks, 128 bytes of columns] of one adapter, a tile of tokens a
// step, in ascending order: the same bits every time. Tokens with gate 0 are in no tile.
//
//   memory --cp.async--> factors [64 tokens, 64 ranks], x or dy [64 tokens, 64 columns], 3 stages
//   --ldmatrix (both transposed), mma--> registers --> dA or dB
//
// Bytes: x and dy once for every 64 ranks, the factors once for every 64 columns (from L2). FLOPs 2
// rank per element. One adapter of d 4096 gives 64 blocks; cutting the tokens too would want
// another pass over partial sums.
#pragma once

#include "kernels/grouped_lora/sm80/expert.cuh"
#include "kernels/grouped_lora/sm80/tile.cuh"
#include "kernels/grouped_lora/train/config.h"

namespace milora::train {

using prefill::kPieceItems;
using prefill::kPieces;
using prefill::kRowItems;
using prefill::kThreads;
using prefill::kTileRows;
using prefill::swizzled;

constexpr int kFinishThreads = 128;

// The sum over splits of one element of partials; `step` from a split to the next.
__device__ __forceinline__ float sum_splits(const float* partial, int64_t step, int splits) {
  float sum = 0;
  for (int s = 0; s < splits; ++s) sum += partial[s * step];
  return sum;
}

// A warp a row. `forward` and `reverse` are the shrinks of x by A and of dy by B^T.
template <class T>
__global__ void __launch_bounds__(kFinishThreads, 8)
    finish_kernel(const __grid_constant__ GroupedLoraPoolParams forward, int64_t d_out,
                  prefill::Workspace work, prefill::Partials reverse_partials, TokenCoefs coefs) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t width = work.partials.width, step = forward.num_tokens * width;
  for (int index = blockIdx.x; index < work.counts->tiles; index += gridDim.x) {
    const prefill::Tile tile = work.tiles[index];
    const int rank = forward.ranks[tile.adapter];
    const float scale = forward.scales[tile.adapter];
    const float factor = forward.gates[tile.route] * scale;
    for (int row = warp; row < tile.rows; row += kFinishThreads / kWarp) {
      const int64_t token = tile.first + row;
      float dot = 0;
      for (int r = lane; r < rank; r += kWarp) {
        const int64_t at = token * width + r;
        const float hidden =
            sum_splits(work.partials.sums + at, step, prefill::num_splits(forward.d_in));
        const float grad_hidden =
            sum_splits(reverse_partials.sums + at, step, prefill::num_splits(d_out));
        dot = fmaf(hidden, grad_hidden, dot);
        static_cast<T*>(coefs.hidden)[at] = from_float<T>(factor * hidden);
        static_cast<T*>(coefs.grad_hidden)[at] = from_float<T>(factor * grad_hidden);
      }
      dot = warp_sum(dot);
      if (lane == 0) coefs.row_dots[token] = scale * dot;
    }
  }
}

// Of a warp: half of the ranks by half of the columns of a block's [kRowItems, kRowItems].
template <class T>
constexpr int kReduceBlocks = kRowItems<T> / 2 / 16;  // of 16 ranks
template <class T>
constexpr int kReduceColumns = kRowItems<T> / 2 / 8;  // of 8 columns
template <class T>
using ReduceSums = float[kReduceBlocks<T>][kReduceColumns<T>][4];

// One tile of tokens. Rows of both tiles are tokens, so both operands are loaded transposed.
template <class T>
__device__ __forceinline__ void reduce_stage(ReduceSums<T>& sums, const uint8_t* factors,
                                             const uint8_t* data, int down, int across) {
  const int lane = threadIdx.x % kWarp;
  __syncwarp();  // after the branches of the loads
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int token = 0; token < kTileRows; token += 16) {
      uint32_t ranks[kReduceBlocks<T>][4];
#pragma unroll
      for (int m = 0; m < kReduceBlocks<T>; ++m) {
        // a's fragment wants ranks 0-7, 8-15 of tokens 0-7, then of tokens 8-15.
        const int piece = (down * kReduceBlocks<T> + m) * 2;
        load_matrices_transposed(ranks[m], prefill::matrix_row(factors, token, piece, false));
      }
#pragma unroll
      for (int n = 0; n < kReduceColumns<T>; n += 2) {
        uint32_t columns[4];
        const int piece = across * kReduceColumns<T> + n;
        load_matrices_transposed(columns, prefill::matrix_row(data, token, piece, true));
#pragma unroll
        for (int m = 0; m < kReduceBlocks<T>; ++m) {
          multiply_16x8x16<T>(sums[m][n], ranks[m], columns[0], columns[1]);
          multiply_16x8x16<T>(sums[m][n + 1], ranks[m], columns[2], columns[3]);
        }
      }
    }
  } else {
    const auto at = [](const uint8_t* tile, int token, int item) {
      return reinterpret_cast<const float*>(tile + swizzled(token, item / 4)) + item % 4;
    };
    for (int token = 0; token < kTileRows; ++token) {
#pragma unroll
      for (int m = 0; m < kReduceBlocks<T>; ++m) {
        const int rank = (down * kReduceBlocks<T> + m) * 16 + lane / 4;
        const float low = *at(factors, token, rank), high = *at(factors, token, rank + 8);
#pragma unroll
        for (int n = 0; n < kReduceColumns<T>; ++n) {
          const int column = (across * kReduceColumns<T> + n) * 8 + lane % 4 * 2;
          const float2 values = *reinterpret_cast<const float2*>(at(data, token, column));
          sums[m][n][0] = fmaf(low, values.x, sums[m][n][0]);
          sums[m][n][1] = fmaf(low, values.y, sums[m][n][1]);
          sums[m][n][2] = fmaf(high, values.x, sums[m][n][2]);
          sums[m][n][3] = fmaf(high, values.y, sums[m][n][3]);
        }
      }
    }
  }
}

// kForB: dB [d_out, rank] from dy and A x; else dA [rank, d_in] from x and B^T dy. `data` is
// [num_tokens, width]. Block (columns, adapter of the table, ranks).
template <class T, bool kForB>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const __grid_constant__ GradTable table, prefill::Workspace work,
                  const void* factors_, int64_t factors_stride, const void* data_,
                  int64_t data_stride, int64_t width) {
  constexpr int kItems = kRowItems<T>;
  uint8_t* stages = shared_memory();
  const int index = blockIdx.y;
  const int rank = table.ranks[index];
  const int adapter = table.first + index;
  const int first_rank = static_cast<int>(blockIdx.z) * kItems;
  if (first_rank >= rank) return;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kItems;
  const T* factors = static_cast<const T*>(factors_);
  const T* data = static_cast<const T*>(data_);
  const bool aligned =
      (reinterpret_cast<uintptr_t>(data) | (data_stride * static_cast<int64_t>(sizeof(T)))) % 16 ==
      0;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int down = warp / 2, across = warp % 2;
  const int piece = static_cast<int>(threadIdx.x) % kPieces;
  const int num_tiles = work.counts->tiles;

  // The tiles of this adapter, in ascending order: one a step.
  int next_tile = 0;
  const auto load = [&](int step) {
    while (next_tile < num_tiles && work.tiles[next_tile].adapter != adapter) ++next_tile;
    if (next_tile < num_tiles) {
      const prefill::Tile tile = work.tiles[next_tile++];
      uint8_t* factor_tile = stages + step % kReduceStages * 2 * kReduceTileBytes;
      uint8_t* data_tile = factor_tile + kReduceTileBytes;
      const int r = first_rank + piece * kPieceItems<T>;
      const int64_t column = first_column + piece * kPieceItems<T>;
      for (int row = threadIdx.x / kPieces; row < kTileRows; row += kThreads / kPieces) {
        const int64_t token = tile.first + row;
        prefill::fill_piece(factor_tile, row, piece, factors + token * factors_stride + r,
                            row < tile.rows ? rank - r : 0, true, factors);
        prefill::fill_piece(data_tile, row, piece, data + token * data_stride + column,
                            row < tile.rows ? width - column : 0, aligned, factors);
      }
    }
    commit_copies();
  };
  int steps = 0;
  for (int i = 0; i < num_tiles; ++i) steps += work.tiles[i].adapter == adapter;

  ReduceSums<T> sums = {};
#pragma unroll
  for (int step = 0; step < kReduceStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    wait_copies<kReduceStages - 2>();
    __syncthreads();  // this stage has arrived, and nobody reads the one that load overwrites
    load(step + kReduceStages - 1);
    const uint8_t* stage = stages + step % kReduceStages * 2 * kReduceTileBytes;
    reduce_stage<T>(sums, stage, stage + kReduceTileBytes, down, across);
  }

  // ---- out ----
  T* out = static_cast<T*>(kForB ? table.grads[index].db : table.grads[index].da);
#pragma unroll
  for (int m = 0; m < kReduceBlocks<T>; ++m) {
#pragma unroll
    for (int n = 0; n < kReduceColumns<T>; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = first_rank + (down * kReduceBlocks<T> + m) * 16 + lane / 4 + i / 2 * 8;
        const int64_t column =
            first_column + (across * kReduceColumns<T> + n) * 8 + lane % 4 * 2 + i % 2;
        if (r >= rank || column >= width) continue;
        out[kForB ? column * rank + r : r * width + column] = from_float<T>(sums[m][n][i]);
      }
    }
  }
}

// dgates[route] = sum of row_dots over the route's tokens, a warp a route. Lanes take every 32nd
// token, and a fixed tree adds them up. A token that is in no tile is skipped as the plan skips it.
__global__ void __launch_bounds__(kWarp)
    gate_kernel(const float* row_dots, const float* gates, const int32_t* route_of,
                const int32_t* adapter_of, int64_t num_tokens, int64_t num_adapters,
                float* dgates) {
  const int route = blockIdx.x;
  const int32_t adapter = adapter_of[route];
  float sum = 0;
  if (gates[route] != 0.0f && adapter >= 0 && adapter < num_adapters) {
    for (int64_t token = threadIdx.x; token < num_tokens; token += kWarp) {
      if (route_of[token] == route) sum += row_dots[token];
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) dgates[route] = sum;
}

}  // namespace milora::train
