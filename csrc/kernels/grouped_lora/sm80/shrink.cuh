// Prefill, first product:  partials[split, s, t, :] = A_s x_t  over one split of d_in.
//
// A unit of work is a tile (rows of one route) and a split (1024 elements of d_in). The active
// slices of the tile share x: their A's stand below one another, each rounded up to 16 ranks, and
// up to 128 of these columns are summed in one pass, so q, k and v (rank 32) read x once. Higher
// ranks take more passes, whose x comes from L2.
//
//   memory --cp.async--> x [64, 128 bytes], A [<= 128, 128 bytes] in 3 stages --ldmatrix, mma-->
//   registers [64, <= 128] f32 --> partials
//
// Bytes: x once, A once a tile (from L2), 4 rank / 1024 bytes of partials per element of x. FLOPs:
// 2 rank per element of x: at rank 32 a sixth of what an H100's memory leaves time for on mma.sync,
// at rank 128 two thirds. So wgmma would not make it faster below ranks of about 190 (130 on an
// H200, whose memory is faster).
//
// A sum runs over its split in ascending steps of 16, whatever the tile: a row's bits depend on its
// x and A alone. Blocks are persistent and take units in a fixed stride; nothing is atomic.
#pragma once

#include "kernels/grouped_lora/sm80/columns.cuh"
#include "kernels/grouped_lora/sm80/tile.cuh"

namespace milora::prefill {

constexpr int kRankBlocks = kTileRanks / kRankBlock;         // in a pass
constexpr int kWarpRankBlocks = kRankBlocks / kWarpsAcross;  // of a warp: every second one
static_assert(kThreads == kTileRanks, "a thread looks up one column");

// sums[b][m][n]: the warp's rank block b, rows 16 m, columns 8 n.
using ShrinkSums = float[kWarpRankBlocks][2][2][4];

// One stage: 128 bytes of d_in. Warp (down, across) of the block; `blocks` rank blocks are in use.
template <class T>
__device__ __forceinline__ void shrink_stage(ShrinkSums& sums, const uint8_t* x, const uint8_t* a,
                                             int down, int across, int blocks) {
  __syncwarp();  // after the branches of the loads
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int piece = 0; piece < kPieces; piece += 2) {  // 16 elements of d_in
      uint32_t rows[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_matrices(rows[m], matrix_row(x, down * 32 + m * 16, piece, true));
      }
#pragma unroll
      for (int b = 0; b < kWarpRankBlocks; ++b) {
        const int block = b * kWarpsAcross + across;
        if (block >= blocks) break;
        uint32_t ranks[4];
        load_matrices(ranks, matrix_row(a, block * kRankBlock, piece, false));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_16x8x16<T>(sums[b][m][0], rows[m], ranks[0], ranks[1]);
          multiply_16x8x16<T>(sums[b][m][1], rows[m], ranks[2], ranks[3]);
        }
      }
    }
  } else {
    const int lane = threadIdx.x % kWarp;
    for (int piece = 0; piece < kPieces; ++piece) {  // 4 elements of d_in
      float4 rows[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        rows[m] = four_floats(x + swizzled(down * 32 + m * 8 + lane / 4, piece));
      }
#pragma unroll
      for (int b = 0; b < kWarpRankBlocks; ++b) {
        const int block = b * kWarpsAcross + across;
        if (block >= blocks) break;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int rank = block * kRankBlock + c / 2 * 8 + lane % 4 * 2 + c % 2;
          const float4 weights = four_floats(a + swizzled(rank, piece));
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            float& sum = sums[b][m / 2][c / 2][m % 2 * 2 + c % 2];
            sum = dot4(sum, rows[m], weights);
          }
        }
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3)  // what their shared memory allows as well
    shrink_kernel(const __grid_constant__ GroupedLoraPoolParams p, Workspace workspace) {
  uint8_t* stages = shared_memory();
  auto* columns = reinterpret_cast<Column*>(stages + kShrinkStages * kShrinkStageBytes);
  const int down = threadIdx.x / kWarp / kWarpsAcross;
  const int across = threadIdx.x / kWarp % kWarpsAcross;
  const int lane = threadIdx.x % kWarp;
  const int splits = num_splits(p.d_in);
  const int64_t units = static_cast<int64_t>(workspace.counts->tiles) * splits;
  const bool x_aligned =
      (reinterpret_cast<uintptr_t>(p.x) | (p.x_stride * static_cast<int64_t>(sizeof(T)))) % 16 == 0;

  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const Tile tile = workspace.tiles[unit / splits];
    const int split = static_cast<int>(unit % splits);
    const int64_t k_begin = static_cast<int64_t>(split) * kSplit;
    const int64_t k_end = k_begin + kSplit < p.d_in ? k_begin + kSplit : p.d_in;
    const int steps = static_cast<int>(ceil_div(k_end - k_begin, kRowItems<T>));
    const T* x = static_cast<const T*>(p.x) + tile.first * p.x_stride;

    for (int first_block = 0;; first_block += kRankBlocks) {
      // ---- the columns of this pass ----
      int total;
      const Column column =
          column_at<T>(p, tile, workspace.partials.width, split, first_block, threadIdx.x, &total);
      const int blocks = total - first_block < kRankBlocks ? total - first_block : kRankBlocks;
      if (blocks <= 0) break;  // the whole block agrees
      __syncthreads();         // the pass before may still read columns and stages
      columns[threadIdx.x] = column;
      __syncthreads();

      // ---- the sums, kShrinkStages - 1 stages ahead of the tensor cores ----
      const auto load = [&](int step) {
        if (step < steps) {
          uint8_t* x_tile = stages + step % kShrinkStages * kShrinkStageBytes;
          uint8_t* a_tile = x_tile + kShrinkTileBytes;
          const int64_t k = k_begin + static_cast<int64_t>(step) * kRowItems<T>;
          const int piece = static_cast<int>(threadIdx.x) % kPieces;
          const int64_t at = k + piece * kPieceItems<T>;
          for (int row = threadIdx.x / kPieces; row < kTileRows; row += kThreads / kPieces) {
            fill_piece(x_tile, row, piece, x + row * p.x_stride + at,
                       row < tile.rows ? k_end - at : 0, x_aligned, p.pool);
          }
          for (int row = threadIdx.x / kPieces; row < blocks * kRankBlock;
               row += kThreads / kPieces) {
            const uint8_t* weights = columns[row].row;
            fill_piece(a_tile, row, piece, reinterpret_cast<const T*>(weights) + at,
                       weights != nullptr ? k_end - at : 0, true, p.pool);
          }
        }
        commit_copies();  // also an empty group, so that waiting counts steps
      };
      ShrinkSums sums = {};
#pragma unroll
      for (int step = 0; step < kShrinkStages - 1; ++step) load(step);
      for (int step = 0; step < steps; ++step) {
        wait_copies<kShrinkStages - 2>();
        __syncthreads();  // this stage has arrived, and nobody reads the one that load overwrites
        load(step + kShrinkStages - 1);
        const uint8_t* x_tile = stages + step % kShrinkStages * kShrinkStageBytes;
        shrink_stage<T>(sums, x_tile, x_tile + kShrinkTileBytes, down, across, blocks);
      }

      // ---- out: two neighbouring ranks a store ----
#pragma unroll
      for (int b = 0; b < kWarpRankBlocks; ++b) {
        const int block = b * kWarpsAcross + across;
        if (block >= blocks) break;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int column_at = block * kRankBlock + n * 8 + lane % 4 * 2;
          float* target = workspace.partials.sums + columns[column_at].target;
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            const int row = down * 32 + m * 8 + lane / 4;
            if (row >= tile.rows) continue;
            const float* sum = &sums[b][m / 2][n][m % 2 * 2];
            *reinterpret_cast<float2*>(target + row * workspace.partials.width) =
                make_float2(sum[0], sum[1]);
          }
        }
      }
    }
    wait_copies<0>();  // only empty groups are left; the next unit starts counting anew
  }
}

}  // namespace milora::prefill
