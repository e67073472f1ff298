// Prefill by wgmma, second product:  y_s[t] += g (scale Bt_s^T S_t + u y_s[t] + v),
// S_t = C (rg * sum of partials).
//
// A unit is a job of the plan and 1024 columns of y, as in sm80/expand.cuh, with 128 rows. S
// [128, rank] is made once a unit, in shared memory, rounded. Then 64 columns a step:
//
//   memory --tensor copy--> y [128, 64], Bt [<= 64 ranks, 64] by cp.async (its rows start anywhere
//   in the pool, and what lies past the rank or d_out must be 0) --wgmma 64 x 64 x 16-->
//   registers --> y's tile in shared memory, updated in f32 and rounded once --tensor copy-->
//   memory
//
// Rows of y leave in boxes of 8; where the tile ends inside of one, threads store what is left.
//
// The loads run through steps and units as one sequence, kAhead stages before the arithmetic (Loads
// below): while a unit's S is made, its first 64 KB of y are already on their way. A stage is
// filled again two steps after its use, so that its store has had a step's time to read it.
//
// Bytes: y read and written once; Bt once a tile (rank / 128 bytes for each of y's four) and 4
// splits rank / 1024 of partials, from L2. FLOPs: 2 rank per element of y, which takes four bytes:
// the memory is the limit at any rank. Ranks above 64 take several stages for a step of columns.
#pragma once

#include "kernels/cuda/tensor_core.cuh"
#include "kernels/grouped_lora/sm80/core.cuh"
#include "kernels/grouped_lora/sm80/tile.cuh"
#include "kernels/grouped_lora/sm90/boxes.cuh"
#include "kernels/grouped_lora/sm90/operand.cuh"

namespace milora::prefill_wgmma {

struct YMaps {
  CUtensorMap slice[kMaxSlices];
};

// What loads and arithmetic know of a unit.
struct ExpandUnit {
  Tile tile;
  int slice, rank;
  int rank_steps;  // stages for 64 columns
  int steps;
  int64_t entry;  // of the tables
  int64_t column_begin, d_out;
};

// The first unit from *index on, in the block's stride, that has columns.
__device__ __forceinline__ bool find_unit(const GroupedLoraPoolParams& p,
                                          const Workspace& workspace, int column_units,
                                          int64_t* index, ExpandUnit* unit) {
  const int64_t units = static_cast<int64_t>(workspace.counts->jobs) * column_units;
  for (; *index < units; *index += gridDim.x) {
    const Job job = workspace.jobs[*index / column_units];
    unit->slice = job % kMaxSlices;
    unit->d_out = p.d_out[unit->slice];
    unit->column_begin = *index % column_units * kUnitColumns;
    if (unit->column_begin >= unit->d_out) continue;  // a narrower slice than the widest
    unit->tile = workspace.tiles[job / kMaxSlices];
    unit->entry = unit->tile.adapter * p.num_experts + p.expert[unit->slice];
    unit->rank = p.ranks[unit->entry];
    unit->rank_steps = static_cast<int>(ceil_div(unit->rank, kRanksPerStage));
    const int64_t left = unit->d_out - unit->column_begin;
    unit->steps = unit->rank_steps *
                  static_cast<int>(ceil_div(left < kUnitColumns ? left : kUnitColumns, kDepth));
    return true;
  }
  return false;
}

// The loads of all of a block's steps, one after the other.
template <class T>
struct Loads {
  const GroupedLoraPoolParams& p;
  const Workspace& workspace;
  const YMaps& maps;
  ExpandShared& shared;
  int column_units;
  int64_t index;  // of the unit
  bool more;
  ExpandUnit unit;
  int step;
  uint32_t issued;

  __device__ __forceinline__ void begin() {
    index = blockIdx.x;
    more = find_unit(p, workspace, column_units, &index, &unit);
    step = 0;
    issued = 0;
  }

  // Starts the next step's, if there is one. All threads; a thread's newest group of stores may
  // still be read.
  __device__ __forceinline__ void next() {
    if (more) {
      const uint32_t stage = issued % kExpandStages;
      const int64_t column = unit.column_begin + step / unit.rank_steps * kDepth;
      const int first_rank = step % unit.rank_steps * kRanksPerStage;
      load_y(stage, column);
      load_bt(shared.stages[stage] + kYBytes, column, first_rank);
      if (++step == unit.steps) {
        index += gridDim.x;
        more = find_unit(p, workspace, column_units, &index, &unit);
        step = 0;
      }
      ++issued;
    }
    commit_copies();  // also an empty group, so that waiting counts steps
  }

 private:
  // y is wanted with the last ranks. The barrier's phase passes in any case.
  __device__ __forceinline__ void load_y(uint32_t stage, int64_t column) {
    const int box = own_box(), boxes = boxes_of(unit.tile);
    if (step % unit.rank_steps != unit.rank_steps - 1) {
      if (threadIdx.x == 0) barrier_arrive(&shared.filled[stage]);
      return;
    }
    if (threadIdx.x == 0) barrier_expect(&shared.filled[stage], boxes * kBoxBytes);
    if (box < boxes) {
      wait_stores_read<1>();  // the thread that loads a box is the one that stored it
      tensor_load(shared.stages[stage] + box * kBoxBytes, &maps.slice[unit.slice],
                  static_cast<int32_t>(column), unit.tile.first + box * kBoxRows,
                  &shared.filled[stage]);
    }
  }

  __device__ __forceinline__ void load_bt(uint8_t* to, int64_t column, int first_rank) {
    constexpr int kItems = kPieceBytes / static_cast<int>(sizeof(T));
    const uint8_t* bt = p.pool + offsets_at(p, unit.entry)[kPartBt];
    const int64_t row_bytes = prefill::pool_row_bytes<T>(unit.d_out);
    const int left = static_cast<int>(ceil_div(unit.rank - first_rank, kRankBlock)) * kRankBlock;
    const int piece = threadIdx.x % kPieces;
    const int64_t at = column + piece * kItems;
    for (int row = threadIdx.x / kPieces; row < (left < kRanksPerStage ? left : kRanksPerStage);
         row += kThreads / kPieces) {
      const int r = first_rank + row;
      prefill::fill_piece(to, row, piece, reinterpret_cast<const T*>(bt + r * row_bytes) + at,
                          r < unit.rank ? unit.d_out - at : 0, true, p.pool);
    }
  }
};

// S of a unit, rounded, up to the rank's next multiple of 16; rows that the tile has not may be
// anything.
template <class T>
__device__ __forceinline__ void make_hidden(const GroupedLoraPoolParams& p, const float* partials,
                                            const ExpandUnit& unit, ExpandShared& shared) {
  constexpr int kItems = kPieceBytes / static_cast<int>(sizeof(T));
  const auto target = [&](int row, int r) {
    uint8_t* block = shared.hidden + r / kDepth * kHiddenBlockBytes;
    return reinterpret_cast<T*>(block + swizzled(row, r % kDepth / kItems)) + r % kItems;
  };
  const int64_t core = offsets_at(p, unit.entry)[kPartCore];
  if (core >= 0) {
    prefill::multiply_core<T, kThreads>(
        p, partials, unit.tile, unit.slice, unit.rank, p.pool + core, shared.core_rows,
        [&](int row, int k, float sum) { *target(row, k) = from_float<T>(sum); });
    return;
  }
  const int fours = static_cast<int>(ceil_div(unit.rank, kRankBlock)) * (kRankBlock / 4);
  for (int i = threadIdx.x; i < unit.tile.rows * fours; i += kThreads) {
    const int row = i / fours, r = i % fours * 4;
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    if (r < unit.rank) {
      sum = prefill::hidden_four(p, partials, unit.tile.first + row, unit.slice, unit.rank, r);
    }
    T* at = target(row, r);
    at[0] = from_float<T>(sum.x);
    at[1] = from_float<T>(sum.y);
    at[2] = from_float<T>(sum.z);
    at[3] = from_float<T>(sum.w);
  }
}

// sums [64, 64] += S Bt of one stage, kBlocks times 16 ranks.
template <class T, int kBlocks>
__device__ __forceinline__ void multiply_ranks(float (&sums)[kDepth / 2], const uint8_t* hidden,
                                               const uint8_t* bt) {
  hold(sums);
  __syncwarp();
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    wgmma<T, kDepth, true>(sums, operand(hidden + i * 32, 8 * kRowBytes, 16),
                           operand(bt + i * 16 * kRowBytes, 8 * kRowBytes, 16), true);
  }
  wgmma_commit();
  wgmma_wait<0>();
  hold(sums);
}

// y += g (scale sums + u y + v) for this thread's elements of the tile in shared memory.
template <class T>
struct Update {
  float gate, scale;
  const float *u, *v;

  __device__ __forceinline__ void apply(const float (&sums)[kDepth / 2], uint8_t* y_tile, int rows,
                                        int64_t column, int64_t d_out) const {
    constexpr int kItems = kPieceBytes / static_cast<int>(sizeof(T));
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int j = 0; j < kDepth / 8; ++j) {
      const int c = 8 * j + lane % 4 * 2;
      float us[2] = {}, vs[2] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (column + c + i >= d_out) continue;
        if (u != nullptr) us[i] = u[column + c + i];
        if (v != nullptr) vs[i] = v[column + c + i];
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int row = threadIdx.x / kWarp * 16 + lane / 4 + 8 * m;
        if (row >= rows) continue;
        auto* at = reinterpret_cast<uint32_t*>(y_tile + swizzled(row, c / kItems) +
                                               c % kItems * sizeof(T));
        T pair[2];
        memcpy(pair, at, 4);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float base = to_float(pair[i]);
          float delta = scale * sums[4 * j + 2 * m + i];
          if (u != nullptr) delta = fmaf(us[i], base, delta);
          if (v != nullptr) delta += vs[i];
          pair[i] = from_float<T>(fmaf(gate, delta, base));
        }
        memcpy(at, pair, 4);
      }
    }
  }
};

// The tile's rows from shared memory to y: whole boxes by the copy engine, the rest by threads.
template <class T>
__device__ __forceinline__ void store_y(const GroupedLoraPoolParams& p, const CUtensorMap* map,
                                        const ExpandUnit& unit, const uint8_t* y_tile,
                                        int64_t column) {
  constexpr int kItems = kPieceBytes / static_cast<int>(sizeof(T));
  const int whole = unit.tile.rows / kBoxRows, box = own_box();
  if (box < whole) {
    tensor_store(map, static_cast<int32_t>(column), unit.tile.first + box * kBoxRows,
                 y_tile + box * kBoxBytes);
  }
  const int row = whole * kBoxRows + threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
  if (row >= unit.tile.rows) return;
  const uint8_t* source = y_tile + swizzled(row, piece);
  T* target = static_cast<T*>(p.y[unit.slice]) + (unit.tile.first + row) * p.y_stride[unit.slice] +
              column + piece * kItems;
  const int64_t left = unit.d_out - column - piece * kItems;
  if (left >= kItems) {
    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
    return;
  }
  for (int i = 0; i < left; ++i) target[i] = reinterpret_cast<const T*>(source)[i];
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    expand_wgmma_kernel(const __grid_constant__ GroupedLoraPoolParams p, Workspace workspace,
                        int column_units, const __grid_constant__ YMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  auto& shared = *reinterpret_cast<ExpandShared*>(shared_memory());
  if (threadIdx.x == 0) {
    if (shared_address(&shared) % 1024 != 0) __trap();  // the swizzle follows the address
    for (int i = 0; i < kExpandStages; ++i) barrier_init(&shared.filled[i]);
    barrier_init_fence();
  }
  __syncthreads();
  Loads<T> loads{p, workspace, maps, shared, column_units, 0, false, {}, 0, 0};
  loads.begin();
  for (int i = 0; i < kAhead; ++i) loads.next();

  const int group = threadIdx.x / kGroupThreads;
  uint32_t taken = 0;
  ExpandUnit unit;
  for (int64_t index = blockIdx.x; find_unit(p, workspace, column_units, &index, &unit);
       index += gridDim.x) {
    const int64_t* offset = offsets_at(p, unit.entry);
    const Update<T> update{p.gates[unit.tile.route * p.num_experts + p.expert[unit.slice]],
                           p.scales[unit.entry],
                           prefill::output_vector(p, offset[kPartU], unit.d_out),
                           prefill::output_vector(p, offset[kPartV], unit.d_out)};
    const bool multiplies = unit.tile.rows > group * kGroupRows;
    make_hidden<T>(p, workspace.partials, unit, shared);

    float sums[kDepth / 2] = {};
    for (int step = 0; step < unit.steps; ++step, ++taken) {
      const uint32_t stage = taken % kExpandStages;
      uint8_t* y_tile = shared.stages[stage];
      wait_copies<kAhead - 1>();
      publish_shared();
      __syncthreads();  // Bt and S are there; the stage of two steps ago is free but for its store
      loads.next();
      const int first_rank = step % unit.rank_steps * kRanksPerStage;
      if (multiplies) {
        const uint8_t* hidden = shared.hidden + first_rank / kDepth * kHiddenBlockBytes +
                                group * kGroupRows * kRowBytes;
        const uint8_t* bt = y_tile + kYBytes;
        const int left = unit.rank - first_rank;
        if (left <= 16) {
          multiply_ranks<T, 1>(sums, hidden, bt);
        } else if (left <= 32) {
          multiply_ranks<T, 2>(sums, hidden, bt);
        } else if (left <= 48) {
          multiply_ranks<T, 3>(sums, hidden, bt);
        } else {
          multiply_ranks<T, 4>(sums, hidden, bt);
        }
      }
      const bool last = step % unit.rank_steps == unit.rank_steps - 1;
      if (last) {
        const int64_t column = unit.column_begin + step / unit.rank_steps * kDepth;
        barrier_wait(&shared.filled[stage], taken / kExpandStages & 1);
        update.apply(sums, y_tile, unit.tile.rows, column, unit.d_out);
#pragma unroll
        for (float& sum : sums) sum = 0.0f;
        publish_shared();
        __syncthreads();
        store_y<T>(p, &maps.slice[unit.slice], unit, y_tile, column);
      }
      commit_stores();  // also an empty group, so that waiting counts steps
    }
    // S is free: the last step's barrier came after its product.
  }
  wait_copies<0>();
  wait_stores_read<0>();  // shared memory must outlive the stores
#endif
}

}  // namespace milora::prefill_wgmma
