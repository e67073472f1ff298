// The base module and its experts in one product (sm_90a):
//
//   y_t = y0 + g (u y0 + v) + sum_r S_tr Bt_r,   y0 = W x_t + bias,   S_t = g scale C A x_t
//
// S comes from the prefill's shrink (rounded to x's dtype by finish_kernel). Then one matrix
// product writes y once: rank is more depth. After the d_in / 64 steps of x and W an output tile
// takes, for each run of rows with one route in it, ceil(rank / 64) steps more, whose operands are
// S (zeros in rows of other runs) and Bt. So tiles stay where they are, however the runs are cut: a
// run's border costs one step of rank, not a part-empty tile.
//
//   warpgroup 0, producer: thread 0 starts tensor copies of x [128, 64] and W [256, 64]; for steps
//     of rank all 128 threads copy S [128, 64] and Bt [64, 256] by cp.async, since rows are masked
//     and Bt starts anywhere in the pool
//   warpgroups 1 and 2, consumers: wgmma 64 x 256 x 16, sums in registers, then bias, u, v, store
//
// Four stages, each with a barrier `full` (the copies, or thread 0 for all of the producer) and one
// `empty` (a lane of each of the 8 consumer warps). Both sides walk through the same tiles,
// segments and steps, so they agree on the stage without telling each other.
//
// FLOPs 2 d_in d_out a row and 2 rank d_out more: 0.8 % at rank 32 and d_in 4096, where a step of
// 64 costs 1.6 % because the operands of a stage are loaded whole. Bytes added: S and Bt from L2.
//
// A row of another run multiplies S = 0: that is exact as long as Bt is finite, which the loader of
// adapters demands. Sums ascend in d_in and then in rank; a row's bits do not depend on other rows.
#pragma once

#include "kernels/cuda/tensor_core.cuh"
#include "kernels/grouped_lora/sm80/core.cuh"
#include "kernels/grouped_lora/sm90/fused_config.h"
#include "kernels/grouped_lora/sm90/operand.cuh"

namespace milora::fused {

// S = gate scale C (sum of partials), one tile of the plan a block at a time. Bytes: partials once,
// a sixteenth of x at rank 32.
template <class T>
__global__ void __launch_bounds__(prefill::kThreads)
    finish_kernel(const __grid_constant__ GroupedLoraPoolParams p, Workspace workspace) {
  __shared__ prefill::CoreRows staged;
  const prefill::Partials& partials = workspace.shrink.partials;
  T* hidden = static_cast<T*>(workspace.hidden);
  for (int index = blockIdx.x; index < workspace.shrink.counts->tiles; index += gridDim.x) {
    const prefill::Tile tile = workspace.shrink.tiles[index];
    const int64_t entry = tile.adapter * p.num_experts + p.expert[0];
    const int rank = p.ranks[entry];
    const int64_t core = offsets_at(p, entry)[kPartCore];
    const float factor = p.gates[tile.route * p.num_experts + p.expert[0]] * p.scales[entry];
    const auto put = [&](int row, int r, float sum) {
      hidden[(tile.first + row) * int64_t{kMaxRank} + r] =
          from_float<T>(r < rank ? factor * sum : 0.0f);
    };
    if (core >= 0) {
      prefill::multiply_core<T>(p, partials, tile, 0, rank, p.pool + core, staged, put);
      continue;
    }
    const int padded = static_cast<int>(ceil_div(rank, prefill::kRankBlock)) * prefill::kRankBlock;
    const int splits = prefill::num_splits(p.d_in);
    for (int i = threadIdx.x; i < tile.rows * padded; i += prefill::kThreads) {
      const int row = i / padded, r = i % padded;
      float sum = 0;
      for (int split = 0; split < splits && r < rank; ++split) {
        sum +=
            partials.sums[prefill::partial_row(p, partials.width, split, 0, tile.first + row) + r];
      }
      put(row, r, sum);
    }
  }
}

struct Ring {
  uint64_t full[kStages], empty[kStages];
};
static_assert(sizeof(Ring) == kBarrierBytes);

// Which stage a step uses, and the parity of its barriers' phase.
struct Position {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The expert of a segment, as both sides need it.
template <class T>
struct Expert {
  const uint8_t* bt;
  const float *u, *v;
  int rank;
  float gate;
};
template <class T>
__device__ __forceinline__ Expert<T> expert_of(const GroupedLoraPoolParams& p,
                                               const Segment& segment) {
  const int64_t entry = segment.adapter * p.num_experts + p.expert[0];
  const int64_t* offset = offsets_at(p, entry);
  return {p.pool + offset[kPartBt], prefill::output_vector(p, offset[kPartU], p.d_out[0]),
          prefill::output_vector(p, offset[kPartV], p.d_out[0]), p.ranks[entry],
          p.gates[segment.route * p.num_experts + p.expert[0]]};
}

// One step of rank into a stage, by the producer's 128 threads.
template <class T>
__device__ __forceinline__ void fill_rank_stage(uint8_t* stage, const GroupedLoraPoolParams& p,
                                                const void* hidden, const Segment& segment,
                                                const Expert<T>& expert, int first_rank,
                                                int64_t row_begin, int64_t column_begin) {
  constexpr int kItems = kPieceBytes / static_cast<int>(sizeof(T));
  const int thread = threadIdx.x;
  const int left = expert.rank - first_rank;  // ranks from here on; S is padded to 16 of them
  const int padded = static_cast<int>(ceil_div(left, prefill::kRankBlock)) * prefill::kRankBlock;
#pragma unroll 2  // more would not fit the producer's registers
  for (int i = thread; i < kRows * kPieces; i += kGroupThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const int64_t token = row_begin + row;
    const bool wanted =
        token >= segment.first && token < segment.first + segment.rows && piece * kItems < padded;
    const T* source =
        static_cast<const T*>(hidden) + token * kMaxRank + first_rank + piece * kItems;
    copy_16_async(stage + swizzled(row, piece), wanted ? static_cast<const void*>(source) : p.pool,
                  wanted ? kPieceBytes : 0);
  }
  const int64_t bt_row = prefill::pool_row_bytes<T>(p.d_out[0]);
  const int rows = padded < kDepth ? padded : kDepth;
  constexpr int kAcross = kColumns / kItems;  // pieces
#pragma unroll 2
  for (int i = thread; i < rows * kAcross; i += kGroupThreads) {
    const int row = i / kAcross, piece = i % kAcross;
    const int64_t column = column_begin + piece * kItems;
    int64_t items = row < left ? p.d_out[0] - column : 0;
    items = items < 0 ? 0 : (items < kItems ? items : kItems);
    const uint8_t* source =
        expert.bt + (first_rank + row) * bt_row + column * static_cast<int64_t>(sizeof(T));
    copy_16_async(stage + kXBytes + piece / kPieces * kBlockBytes + swizzled(row, piece % kPieces),
                  items > 0 ? source : p.pool, static_cast<int>(items * sizeof(T)));
  }
  commit_copies();
}

template <class T>
__device__ __forceinline__ void produce(const FusedLoraParams& p, const Workspace& workspace,
                                        const CUtensorMap* x_map, const CUtensorMap* w_map,
                                        uint8_t* stages, Ring& ring, int64_t tiles_down,
                                        int64_t tiles_across) {
  const int depth_steps = static_cast<int>(ceil_div(p.lora.d_in, kDepth));
  Position at;
  for (int64_t index = blockIdx.x; index < tiles_down * tiles_across; index += gridDim.x) {
    const OutputTile tile = output_tile(index, tiles_down, tiles_across);
    const int64_t row_begin = static_cast<int64_t>(tile.down) * kRows;
    const int64_t column_begin = static_cast<int64_t>(tile.across) * kColumns;

    // ---- x and W: thread 0 ----
    for (int step = 0; step < depth_steps; ++step, at.advance()) {
      if (threadIdx.x != 0) continue;
      uint8_t* stage = stages + at.stage * kStageBytes;
      barrier_wait(&ring.empty[at.stage], at.parity ^ 1);  // the first round finds it empty
      barrier_expect(&ring.full[at.stage], kStageBytes);
      tensor_load(stage, x_map, step * kDepth, static_cast<int32_t>(row_begin),
                  &ring.full[at.stage]);
      tensor_load(stage + kXBytes, w_map, step * kDepth, static_cast<int32_t>(column_begin),
                  &ring.full[at.stage]);
    }

    // ---- S and Bt: all threads, led by thread 0 ----
    // Only thread 0 waits on `empty`: the others may be rounds ahead, where parity says nothing.
    int32_t next = workspace.shrink.block_begin[tile.down];
    const int32_t end = workspace.shrink.block_begin[tile.down + 1];
    Segment segment;
    while (next_segment(workspace.shrink.tiles, &next, end, &segment)) {
      const Expert<T> expert = expert_of<T>(p.lora, segment);
      for (int rank = 0; rank < expert.rank; rank += kDepth, at.advance()) {
        if (threadIdx.x == 0) barrier_wait(&ring.empty[at.stage], at.parity ^ 1);
        named_barrier<1, kGroupThreads>();
        fill_rank_stage(stages + at.stage * kStageBytes, p.lora, workspace.hidden, segment, expert,
                        rank, row_begin, column_begin);
        wait_copies<0>();
        publish_shared();
        named_barrier<1, kGroupThreads>();
        if (threadIdx.x == 0) barrier_arrive(&ring.full[at.stage]);
      }
    }
  }
}

// A warpgroup's half of the tile: its sums, the rows and columns that this thread holds of them.
struct Half {
  float sums[128];
  int64_t row;     // and row + 8
  int64_t column;  // + 8 j, and the next
};

// One stage of kSteps times 16. Leaves its wgmma under way. The count is a constant, since a branch
// between two wgmma makes the compiler wait for the first.
template <class T, bool kRank, int kSteps>
__device__ __forceinline__ void multiply_stage(Half& half, const uint8_t* stage, int group,
                                               bool& accumulate) {
  const uint8_t* x = stage + group * 64 * kRowBytes;
  const uint8_t* w = stage + kXBytes;
  hold(half.sums);
  __syncwarp();  // lanes may leave a wait one by one; wgmma wants them together
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const uint64_t a = operand(x + k * 32, 8 * kRowBytes, 16);
    // Bt: 16 rows of depth further, blocks of 64 columns beside each other. W: 32 bytes further.
    const uint64_t b = kRank ? operand(w + k * 16 * kRowBytes, 8 * kRowBytes, kBlockBytes)
                             : operand(w + k * 32, 8 * kRowBytes, 16);
    wgmma<T, kColumns, kRank>(half.sums, a, b, accumulate);
    accumulate = true;
  }
  wgmma_commit();
}

// A stage of rank: as many steps as it has blocks of 16.
template <class T>
__device__ __forceinline__ void multiply_rank_stage(Half& half, const uint8_t* stage, int group,
                                                    int ranks, bool& accumulate) {
  static_assert(kDepth == 64);
  if (ranks <= 16) {
    multiply_stage<T, true, 1>(half, stage, group, accumulate);
  } else if (ranks <= 32) {
    multiply_stage<T, true, 2>(half, stage, group, accumulate);
  } else if (ranks <= 48) {
    multiply_stage<T, true, 3>(half, stage, group, accumulate);
  } else {
    multiply_stage<T, true, 4>(half, stage, group, accumulate);
  }
}

// y0 += bias; then y0 += g (u y0 + v) for rows of experts that have output vectors.
template <class T>
__device__ __forceinline__ void adjust(Half& half, const FusedLoraParams& p,
                                       const Workspace& workspace, int32_t next, int32_t end) {
  const int64_t d_out = p.lora.d_out[0];
  if (p.bias != nullptr) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t column = half.column + 8 * j + i;
        const float bias = column < d_out ? to_float(static_cast<const T*>(p.bias)[column]) : 0.0f;
        half.sums[4 * j + i] += bias;
        half.sums[4 * j + 2 + i] += bias;
      }
    }
  }
  Segment segment;
  while (next_segment(workspace.shrink.tiles, &next, end, &segment)) {
    const Expert<T> expert = expert_of<T>(p.lora, segment);
    if (expert.u == nullptr && expert.v == nullptr) continue;
    float gates[2];  // of the two rows; 0 for one that is not of this segment
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int64_t row = half.row + 8 * m - segment.first;
      gates[m] = row >= 0 && row < segment.rows ? expert.gate : 0.0f;
    }
    if (gates[0] == 0.0f && gates[1] == 0.0f) continue;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t column = half.column + 8 * j + i;
        if (column >= d_out) continue;
        const float u = expert.u != nullptr ? expert.u[column] : 0.0f;
        const float v = expert.v != nullptr ? expert.v[column] : 0.0f;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          float& sum = half.sums[4 * j + 2 * m + i];
          if (gates[m] != 0.0f) sum = fmaf(gates[m], fmaf(u, sum, v), sum);
        }
      }
    }
  }
}

// words[i] of lane q of a quad becomes words[q] of lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = (threadIdx.x & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      uint32_t& low = words[i];
      uint32_t& high = words[i + step];
      const uint32_t got = __shfl_xor_sync(kAllLanes, upper ? low : high, step);
      (upper ? low : high) = got;
    }
  }
}

// Rounds and stores. A quad holds 32 neighbouring columns of a row as four times 2 a lane; after
// the exchange a lane has 8 of them, 16 bytes.
template <class T>
__device__ __forceinline__ void store(const Half& half, const FusedLoraParams& p) {
  const int64_t d_out = p.lora.d_out[0], stride = p.lora.y_stride[0];
  const bool aligned = reinterpret_cast<uintptr_t>(p.lora.y[0]) % 16 == 0 && stride % 8 == 0;
  const int quad_lane = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const int64_t row = half.row + 8 * m;
    T* y = static_cast<T*>(p.lora.y[0]) + row * stride;
#pragma unroll
    for (int block = 0; block < kColumns / 32; ++block) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* sums = &half.sums[4 * (4 * block + i) + 2 * m];
        const T pair[2] = {from_float<T>(sums[0]), from_float<T>(sums[1])};
        memcpy(&words[i], pair, 4);
      }
      transpose_quad(words);  // all lanes, also those without a row
      const int64_t column = half.column - 2 * quad_lane + 32 * block + 8 * quad_lane;
      if (row >= p.lora.num_tokens || column >= d_out) continue;
      if (aligned && column + 8 <= d_out) {
        *reinterpret_cast<uint4*>(y + column) = {words[0], words[1], words[2], words[3]};
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (column + i >= d_out) continue;
          reinterpret_cast<uint16_t*>(y)[column + i] =
              static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
        }
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void consume(const FusedLoraParams& p, const Workspace& workspace,
                                        const uint8_t* stages, Ring& ring, int64_t tiles_down,
                                        int64_t tiles_across) {
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads - 1;
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  const int lane = thread % kWarp;
  const int depth_steps = static_cast<int>(ceil_div(p.lora.d_in, kDepth));
  Position at;
  int before = -1;  // the stage whose wgmma are under way
  const auto release = [&] {
    if (before >= 0 && lane == 0) barrier_arrive(&ring.empty[before]);
    before = -1;
  };
  for (int64_t index = blockIdx.x; index < tiles_down * tiles_across; index += gridDim.x) {
    const OutputTile tile = output_tile(index, tiles_down, tiles_across);
    Half half;
    half.row =
        static_cast<int64_t>(tile.down) * kRows + group * 64 + thread / kWarp * 16 + lane / 4;
    half.column = static_cast<int64_t>(tile.across) * kColumns + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 128; ++i) half.sums[i] = 0.0f;
    bool accumulate = false;

    // ---- x W^T ----
    for (int step = 0; step < depth_steps; ++step, at.advance()) {
      barrier_wait(&ring.full[at.stage], at.parity);
      multiply_stage<T, false, kDepth / 16>(half, stages + at.stage * kStageBytes, group,
                                            accumulate);
      wgmma_wait<1>();
      release();
      before = at.stage;
    }
    wgmma_wait<0>();
    hold(half.sums);
    release();

    // ---- bias, u, v; then S Bt ----
    int32_t next = workspace.shrink.block_begin[tile.down];
    const int32_t end = workspace.shrink.block_begin[tile.down + 1];
    adjust<T>(half, p, workspace, next, end);
    Segment segment;
    while (next_segment(workspace.shrink.tiles, &next, end, &segment)) {
      const int ranks = p.lora.ranks[segment.adapter * p.lora.num_experts + p.lora.expert[0]];
      for (int rank = 0; rank < ranks; rank += kDepth, at.advance()) {
        barrier_wait(&ring.full[at.stage], at.parity);
        multiply_rank_stage<T>(half, stages + at.stage * kStageBytes, group, ranks - rank,
                               accumulate);
        wgmma_wait<1>();
        release();
        before = at.stage;
      }
    }
    wgmma_wait<0>();
    hold(half.sums);
    release();
    store<T>(half, p);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    fused_kernel(const __grid_constant__ FusedLoraParams p, Workspace workspace,
                 const __grid_constant__ CUtensorMap x_map,
                 const __grid_constant__ CUtensorMap w_map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  uint8_t* stages = shared_memory();
  Ring& ring = *reinterpret_cast<Ring*>(stages + kStages * kStageBytes);
  if (threadIdx.x == 0) {
    if (shared_address(stages) % 1024 != 0) __trap();  // the swizzle follows the address
    for (int i = 0; i < kStages; ++i) {
      barrier_init_count(&ring.full[i], 1);
      barrier_init_count(&ring.empty[i], kConsumers * kGroupThreads / kWarp);
    }
    barrier_init_fence();
  }
  __syncthreads();
  const int64_t tiles_down = ceil_div(p.lora.num_tokens, kRows);
  const int64_t tiles_across = ceil_div(p.lora.d_out[0], kColumns);
  if (threadIdx.x < kGroupThreads) {
    give_registers<kProducerRegisters>();
    produce<T>(p, workspace, &x_map, &w_map, stages, ring, tiles_down, tiles_across);
  } else {
    take_registers<kConsumerRegisters>();
    consume<T>(p, workspace, stages, ring, tiles_down, tiles_across);
  }
#endif
}

}  // namespace milora::fused
