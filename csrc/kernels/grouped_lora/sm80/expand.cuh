// Prefill, second product:  y_s[t] += g (scale Bt_s^T S_t + u y_s[t] + v),
// S_t = C (rg * sum of partials).
//
// A unit of work is a job (an active slice of a tile) and 1024 columns of y. S [64, rank] is summed
// over the splits of d_in in ascending order, multiplied by the expert's core if there is one, and
// rounded to x's dtype, as the tensor cores take it; it stays in shared memory. Then 128 bytes of
// columns a step:
//
//   memory --cp.async--> y [64, 128 bytes], Bt [<= 64 ranks, 128 bytes] in 3 stages
//   --ldmatrix, mma--> registers --> y's tile in shared memory, updated in f32 and rounded once
//   --> memory, 16 bytes a thread
//
// Ranks above 64 take several stages for one step of columns. Rows of Bt past the rank and columns
// past d_out arrive as zeros, so NaN in the pool's padding stays out.
//
// Bytes: y read and written once; Bt once a tile and splits * rank * 4 bytes of partials a row for
// every 1024 columns, both from L2. FLOPs: 2 rank per element of y, half the shrink's intensity:
// the memory is the limit up to rank 256.
#pragma once

#include "kernels/grouped_lora/sm80/core.cuh"
#include "kernels/grouped_lora/sm80/tile.cuh"

namespace milora::prefill {

template <class T>
constexpr int kColumnBlocks = kRowItems<T> / kWarpsAcross / 8;  // of a warp, 8 columns each
// sums[m][n]: rows 16 m, columns 8 n of the warp's 32 x (half of a tile's columns).
template <class T>
using ExpandSums = float[2][kColumnBlocks<T>][4];

// S in shared memory: rows of kMaxRank elements, swizzled as the tiles are.
template <class T>
__device__ __forceinline__ int hidden_at(int row, int piece) {
  return row * kMaxRank * static_cast<int>(sizeof(T)) + ((piece ^ (row & 7)) * kPieceBytes);
}

// One stage: up to 64 ranks from `first_rank`, in blocks of 16.
template <class T>
__device__ __forceinline__ void expand_stage(ExpandSums<T>& sums, const uint8_t* hidden,
                                             const uint8_t* bt, int down, int across,
                                             int first_rank, int blocks) {
  const int lane = threadIdx.x % kWarp;
  __syncwarp();  // after the branches of the loads
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < kRanksPerStage / kRankBlock; ++k) {
      if (k >= blocks) break;
      uint32_t rows[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int row = down * 32 + m * 16 + lane % 16;
        load_matrices(rows[m], hidden + hidden_at<T>(row, first_rank / 8 + k * 2 + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < kColumnBlocks<T>; n += 2) {
        // Rows of Bt are ranks: down the ranks first, then across, each matrix transposed.
        uint32_t columns[4];
        const int piece = across * kColumnBlocks<T> + n;
        load_matrices_transposed(columns, matrix_row(bt, k * kRankBlock, piece, true));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_16x8x16<T>(sums[m][n], rows[m], columns[0], columns[1]);
          multiply_16x8x16<T>(sums[m][n + 1], rows[m], columns[2], columns[3]);
        }
      }
    }
  } else {
    for (int k = 0; k < blocks * kRankBlock; k += 4) {
      float4 rows[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        rows[m] =
            four_floats(hidden + hidden_at<T>(down * 32 + m * 8 + lane / 4, (first_rank + k) / 4));
      }
#pragma unroll
      for (int n = 0; n < kColumnBlocks<T>; ++n) {
        const int column = (across * kColumnBlocks<T> + n) * 8 + lane % 4 * 2;
        float2 ranks[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          ranks[j] = *reinterpret_cast<const float2*>(bt + swizzled(k + j, column / 4) +
                                                      column % 4 * sizeof(float));
        }
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          float* sum = &sums[m / 2][n][m % 2 * 2];
          sum[0] = dot4(sum[0], rows[m], {ranks[0].x, ranks[1].x, ranks[2].x, ranks[3].x});
          sum[1] = dot4(sum[1], rows[m], {ranks[0].y, ranks[1].y, ranks[2].y, ranks[3].y});
        }
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    expand_kernel(const __grid_constant__ GroupedLoraPoolParams p, Workspace workspace,
                  int column_units) {
  constexpr int kStages = expand_stages(sizeof(T));
  uint8_t* stages = shared_memory();
  uint8_t* hidden = stages + kStages * kExpandStageBytes;
  const int down = threadIdx.x / kWarp / kWarpsAcross;
  const int across = threadIdx.x / kWarp % kWarpsAcross;
  const int lane = threadIdx.x % kWarp;
  const int64_t units = static_cast<int64_t>(workspace.counts->jobs) * column_units;

  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    // ---- whose rows, whose weights ----
    const Job job = workspace.jobs[unit / column_units];
    const Tile tile = workspace.tiles[job / kMaxSlices];
    const int slice = job % kMaxSlices;
    const int64_t d_out = p.d_out[slice];
    const int64_t column_begin = unit % column_units * kUnitColumns;
    if (column_begin >= d_out) continue;  // a narrower slice than the widest
    const int64_t column_end =
        column_begin + kUnitColumns < d_out ? column_begin + kUnitColumns : d_out;
    const int64_t entry = tile.adapter * p.num_experts + p.expert[slice];
    const int rank = p.ranks[entry];
    const int64_t* offset = offsets_at(p, entry);
    const uint8_t* bt = p.pool + offset[kPartBt];
    const uint8_t* core = offset[kPartCore] >= 0 ? p.pool + offset[kPartCore] : nullptr;
    const int64_t bt_row = pool_row_bytes<T>(d_out);
    const float* u = output_vector(p, offset[kPartU], d_out);
    const float* v = output_vector(p, offset[kPartV], d_out);
    const float gate = p.gates[tile.route * p.num_experts + p.expert[slice]];
    const float scale = p.scales[entry];
    T* y = static_cast<T*>(p.y[slice]) + tile.first * p.y_stride[slice];
    const bool y_aligned = (reinterpret_cast<uintptr_t>(p.y[slice]) |
                            (p.y_stride[slice] * static_cast<int64_t>(sizeof(T)))) %
                               16 ==
                           0;

    // Steps go through the ranks of one group of columns, then to the next group.
    const int rank_steps = static_cast<int>(ceil_div(rank, kRanksPerStage));
    const int steps =
        rank_steps * static_cast<int>(ceil_div(column_end - column_begin, kRowItems<T>));
    const int piece = static_cast<int>(threadIdx.x) % kPieces;
    const auto load = [&](int step) {
      if (step < steps) {
        uint8_t* y_tile = stages + step % kStages * kExpandStageBytes;
        uint8_t* bt_tile = y_tile + kExpandYBytes;
        const int first_rank = step % rank_steps * kRanksPerStage;
        const int64_t column =
            column_begin + step / rank_steps * kRowItems<T> + piece * kPieceItems<T>;
        const int wanted = static_cast<int>(ceil_div(rank - first_rank, kRankBlock)) * kRankBlock;
        for (int row = threadIdx.x / kPieces;
             row < (wanted < kRanksPerStage ? wanted : kRanksPerStage); row += kThreads / kPieces) {
          const int r = first_rank + row;
          fill_piece(bt_tile, row, piece, reinterpret_cast<const T*>(bt + r * bt_row) + column,
                     r < rank ? d_out - column : 0, true, p.pool);
        }
        if (step % rank_steps == rank_steps - 1) {  // y is wanted with the last ranks
          for (int row = threadIdx.x / kPieces; row < kTileRows; row += kThreads / kPieces) {
            fill_piece(y_tile, row, piece, y + row * p.y_stride[slice] + column,
                       row < tile.rows ? d_out - column : 0, y_aligned, p.pool);
          }
        }
      }
      commit_copies();
    };
    __syncthreads();  // the unit before may still read stages and S
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) load(step);
    // The last stage is nobody's until the loop below fills it, after a barrier.
    auto& staged = *reinterpret_cast<CoreRows*>(stages + (kStages - 1) * kExpandStageBytes);
    make_hidden<T>(p, workspace.partials, tile, slice, rank, kTileRows, core, staged,
                   [&](int row, int r) {
                     return reinterpret_cast<T*>(hidden + hidden_at<T>(row, r / kPieceItems<T>)) +
                            r % kPieceItems<T>;
                   });

    ExpandSums<T> sums = {};
    for (int step = 0; step < steps; ++step) {
      wait_copies<kStages - 2>();
      __syncthreads();  // this stage and S are there, and nobody uses the stage that load
                        // overwrites
      load(step + kStages - 1);
      uint8_t* y_tile = stages + step % kStages * kExpandStageBytes;
      const int first_rank = step % rank_steps * kRanksPerStage;
      const int left = static_cast<int>(ceil_div(rank - first_rank, kRankBlock));
      constexpr int kBlocks = kRanksPerStage / kRankBlock;
      expand_stage<T>(sums, hidden, y_tile + kExpandYBytes, down, across, first_rank,
                      left < kBlocks ? left : kBlocks);
      if (step % rank_steps != rank_steps - 1) continue;

      // ---- update y's tile: every element by the thread that owns its sum ----
      const int64_t column = column_begin + step / rank_steps * kRowItems<T>;
#pragma unroll
      for (int n = 0; n < kColumnBlocks<T>; ++n) {
        const int c = (across * kColumnBlocks<T> + n) * 8 + lane % 4 * 2;
        float us[2] = {}, vs[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (column + c + i >= d_out) continue;
          if (u != nullptr) us[i] = u[column + c + i];
          if (v != nullptr) vs[i] = v[column + c + i];
        }
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const int row = down * 32 + m * 8 + lane / 4;
          T* at =
              reinterpret_cast<T*>(y_tile + swizzled(row, c / kPieceItems<T>)) + c % kPieceItems<T>;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float base = to_float(at[i]);
            float delta = scale * sums[m / 2][n][m % 2 * 2 + i];
            if (u != nullptr) delta = fmaf(us[i], base, delta);
            if (v != nullptr) delta += vs[i];
            at[i] = from_float<T>(fmaf(gate, delta, base));
            sums[m / 2][n][m % 2 * 2 + i] = 0.0f;
          }
        }
      }
      __syncthreads();

      // ---- and out ----
      const int64_t left_columns = d_out - column - piece * kPieceItems<T>;
      for (int row = threadIdx.x / kPieces; row < tile.rows; row += kThreads / kPieces) {
        T* target = y + row * p.y_stride[slice] + column + piece * kPieceItems<T>;
        const uint8_t* source = y_tile + swizzled(row, piece);
        if (y_aligned && left_columns >= kPieceItems<T>) {
          *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
        } else {
#pragma unroll
          for (int i = 0; i < kPieceItems<T>; ++i) {
            if (i < left_columns) target[i] = reinterpret_cast<const T*>(source)[i];
          }
        }
      }
    }
    wait_copies<0>();
  }
}

}  // namespace milora::prefill
