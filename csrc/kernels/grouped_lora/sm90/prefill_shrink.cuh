// Prefill by wgmma, first product:  partials[split, s, t, :] = A_s x_t  over one split of d_in.
//
// Units, splits and partial sums are those of sm80/shrink.cuh, with tiles of 128 rows: A, which is
// read from L2 for every tile, is then read half as often, and wgmma holds up no rank below 200.
//
//   memory --tensor copies--> x [128, 64], A [<= 128, 64] by cp.async (its rows start anywhere in
//   the pool, and what lies past d_in must be 0) in 3 stages --wgmma 64 x 32..128 x 16-->
//   registers [128, <= 128] f32 --> partials
//
// Warpgroup g sums rows 64 g and following; columns are the ranks of all active slices, rounded up
// to 32. Operands are not swapped where a tile has few rows: its 64 rows of wgmma take rank / 2
// cycles for 16 of d_in, a third of the time in which the memory brings as much of A.
//
// Bytes: x once, A once a tile from L2, 4 rank / 1024 bytes of partials per element of x. FLOPs: 2
// rank per element of x; wgmma does 590 (H100) or 410 (H200) of them while one arrives.
//
// A row's bits depend on its x and A alone: sums ascend in steps of 16 over a split.
#pragma once

#include "kernels/cuda/tensor_core.cuh"
#include "kernels/grouped_lora/sm80/columns.cuh"
#include "kernels/grouped_lora/sm80/tile.cuh"
#include "kernels/grouped_lora/sm90/boxes.cuh"
#include "kernels/grouped_lora/sm90/operand.cuh"

namespace milora::prefill_wgmma {

struct ShrinkPass {
  Tile tile;
  int64_t k_begin, k_end;
  int columns;  // of the pass, a multiple of 16
};

// The sums of a pass, kWidth >= its columns. `taken` counts stages since the kernel began.
template <class T, int kWidth>
__device__ __forceinline__ void shrink_pass(const ShrinkPass& pass, const GroupedLoraPoolParams& p,
                                            const CUtensorMap* x_map, const Partials& partials,
                                            ShrinkShared& shared, uint32_t& taken) {
  constexpr int kItems = kPieceBytes / static_cast<int>(sizeof(T));
  const int steps = static_cast<int>(ceil_div(pass.k_end - pass.k_begin, kDepth));
  const int group = threadIdx.x / kGroupThreads;
  const bool multiplies = pass.tile.rows > group * kGroupRows;

  const auto load = [&](int step) {
    if (step < steps) {
      const uint32_t stage = (taken + step) % kShrinkStages;
      const int64_t k = pass.k_begin + static_cast<int64_t>(step) * kDepth;
      const int box = own_box(), boxes = boxes_of(pass.tile);
      if (threadIdx.x == 0) barrier_expect(&shared.filled[stage], boxes * kBoxBytes);
      if (box < boxes) {
        tensor_load(shared.stages[stage] + box * kBoxBytes, x_map, static_cast<int32_t>(k),
                    pass.tile.first + box * kBoxRows, &shared.filled[stage]);
      }
      const int piece = threadIdx.x % kPieces;
      const int64_t at = k + piece * kItems;
      for (int row = threadIdx.x / kPieces; row < pass.columns; row += kThreads / kPieces) {
        const uint8_t* weights = shared.columns[row].row;
        prefill::fill_piece(shared.stages[stage] + kXBytes, row, piece,
                            reinterpret_cast<const T*>(weights) + at,
                            weights != nullptr ? pass.k_end - at : 0, true, p.pool);
      }
    }
    commit_copies();  // also an empty group, so that waiting counts steps
  };

  float sums[kWidth / 2] = {};
#pragma unroll
  for (int step = 0; step < kShrinkStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    const uint32_t turn = taken + step, stage = turn % kShrinkStages;
    wait_copies<kShrinkStages - 2>();
    publish_shared();
    __syncthreads();  // A is there, and nobody multiplies the stage that load overwrites
    load(step + kShrinkStages - 1);
    if (!multiplies) continue;
    barrier_wait(&shared.filled[stage], turn / kShrinkStages & 1);
    const uint8_t* x = shared.stages[stage] + group * kGroupRows * kRowBytes;
    const uint8_t* a = shared.stages[stage] + kXBytes;
    hold(sums);
    __syncwarp();  // lanes may leave a wait one by one
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDepth / 16; ++i) {
      wgmma<T, kWidth, false>(sums, operand(x + i * 32, 8 * kRowBytes, 16),
                              operand(a + i * 32, 8 * kRowBytes, 16), true);
    }
    wgmma_commit();
    wgmma_wait<0>();
    hold(sums);
  }
  taken += steps;
  wait_copies<0>();  // only empty groups are left; the next pass starts counting anew

  // ---- out: two neighbouring ranks a store ----
  const int lane = threadIdx.x % kWarp;
  const int first_row = threadIdx.x / kWarp * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < kWidth / 8; ++j) {
    const int column = 8 * j + lane % 4 * 2;
    if (column >= pass.columns) continue;
    float* target = partials.sums + shared.columns[column].target;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int row = first_row + 8 * m;
      if (row >= pass.tile.rows) continue;
      *reinterpret_cast<float2*>(target + row * partials.width) =
          make_float2(sums[4 * j + 2 * m], sums[4 * j + 2 * m + 1]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    shrink_wgmma_kernel(const __grid_constant__ GroupedLoraPoolParams p, Workspace workspace,
                        const __grid_constant__ CUtensorMap x_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  auto& shared = *reinterpret_cast<ShrinkShared*>(shared_memory());
  init_stages(&shared, shared.filled);
  const int splits = prefill::num_splits(p.d_in);
  const int64_t units = static_cast<int64_t>(workspace.counts->tiles) * splits;
  uint32_t taken = 0;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int split = static_cast<int>(unit % splits);
    const int64_t k_begin = static_cast<int64_t>(split) * kSplit;
    const int64_t k_end = k_begin + kSplit < p.d_in ? k_begin + kSplit : p.d_in;
    ShrinkPass pass{workspace.tiles[unit / splits], k_begin, k_end, 0};
    constexpr int kPassBlocks = kShrinkColumns / kRankBlock;
    for (int first_block = 0;; first_block += kPassBlocks) {
      int total;
      const Column column = prefill::column_at<T>(p, pass.tile, workspace.partials.width, split,
                                                  first_block, threadIdx.x, &total);
      const int blocks = total - first_block < kPassBlocks ? total - first_block : kPassBlocks;
      if (blocks <= 0) break;  // the whole block agrees
      pass.columns = blocks * kRankBlock;
      __syncthreads();  // the pass before may still read columns
      if (threadIdx.x < kShrinkColumns) shared.columns[threadIdx.x] = column;
      __syncthreads();
      const auto run = [&](auto width) {
        shrink_pass<T, decltype(width)::value>(pass, p, &x_map, workspace.partials, shared, taken);
      };
      if (pass.columns <= 32) {
        run(std::integral_constant<int, 32>());
      } else if (pass.columns <= 64) {
        run(std::integral_constant<int, 64>());
      } else if (pass.columns <= 96) {
        run(std::integral_constant<int, 96>());
      } else {
        run(std::integral_constant<int, 128>());
      }
    }
  }
#endif
}

}  // namespace milora::prefill_wgmma
