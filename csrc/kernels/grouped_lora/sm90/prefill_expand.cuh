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
// filled again two steps after its use, so that its store has had a step's time to read it. A step
// issues about 500 instructions a warp, 1,000 cycles; its 32 KB take the memory of an H200 1,700.
//
// Bytes: y read and written once; Bt once a tile, rank / 128 bytes for each of y's four, and splits
// * rank * 4 bytes of partials a row for every 1024 columns, both from L2. FLOPs: 2 rank per
// element of y, which takes four bytes: the memory is the limit at any rank. Ranks above 64 take
// several stages for a step of columns.
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
  int64_t entry;  // of the tables
  int64_t column_begin, column_end, d_out;
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
    unit->column_end = unit->column_begin + kUnitColumns < unit->d_out
                           ? unit->column_begin + kUnitColumns
                           : unit->d_out;
    unit->tile = workspace.tiles[job / kMaxSlices];
    unit->entry = unit->tile.adapter * p.num_experts + p.expert[unit->slice];
    unit->rank = p.ranks[unit->entry];
    return true;
  }
  return false;
}

// A step of a unit: up to 64 ranks for 64 columns; all ranks, then the next columns.
struct ExpandStep {
  int64_t column;
  int first_rank;

  __device__ __forceinline__ void begin(const ExpandUnit& unit) {
    column = unit.column_begin;
    first_rank = 0;
  }
  __device__ __forceinline__ bool last_ranks(const ExpandUnit& unit) const {
    return first_rank + kRanksPerStage >= unit.rank;
  }
  // Whether there is another one.
  __device__ __forceinline__ bool advance(const ExpandUnit& unit) {
    const bool last = last_ranks(unit);
    column += last ? kDepth : 0;
    first_rank = last ? 0 : first_rank + kRanksPerStage;
    return column < unit.column_end;
  }
};

// The loads of all of a block's steps, one after the other. Warpgroup 0 moves y, warpgroup 1 loads
// Bt: tensor stores and cp.async of one warp would be waited for by one counter, each for both.
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
  ExpandStep step;
  const uint8_t* bt;
  int64_t bt_row_bytes;
  uint32_t issued;

  __device__ __forceinline__ void begin() {
    index = blockIdx.x;
    issued = 0;
    find();
  }

  // Starts the next step's, if there is one. All threads; a thread's newest group of stores may
  // still be read.
  __device__ __forceinline__ void next() {
    if (more) {
      const uint32_t stage = issued % kExpandStages;
      if (threadIdx.x < kGroupThreads) {
        load_y(stage);
      } else {
        load_bt(shared.stages[stage] + kYBytes);
      }
      if (!step.advance(unit)) {
        index += gridDim.x;
        find();
      }
      ++issued;
    }
    commit_copies();  // also an empty group, so that waiting counts steps
  }

 private:
  __device__ __forceinline__ void find() {
    more = find_unit(p, workspace, column_units, &index, &unit);
    if (!more) return;
    step.begin(unit);
    bt = p.pool + offsets_at(p, unit.entry)[kPartBt];
    bt_row_bytes = prefill::pool_row_bytes<T>(unit.d_out);
  }

  // y is wanted with the last ranks. The barrier's phase passes in any case.
  __device__ __forceinline__ void load_y(uint32_t stage) {
    const int box = box_of_group(), boxes = boxes_of(unit.tile);
    wait_stores_read<1>();  // the thread that loads a box is the one that has stored it
    if (!step.last_ranks(unit)) {
      if (threadIdx.x == 0) barrier_arrive(&shared.filled[stage]);
      return;
    }
    if (threadIdx.x == 0) barrier_expect(&shared.filled[stage], boxes * kBoxBytes);
    if (box < boxes) {
      tensor_load(shared.stages[stage] + box * kBoxBytes, &maps.slice[unit.slice],
                  static_cast<int32_t>(step.column), unit.tile.first + box * kBoxRows,
                  &shared.filled[stage]);
    }
  }

  __device__ __forceinline__ void load_bt(uint8_t* to) {
    constexpr int kItems = kPieceBytes / static_cast<int>(sizeof(T));
    const int thread = static_cast<int>(threadIdx.x) - kGroupThreads;
    const int left = unit.rank - step.first_rank;
    const int rows = static_cast<int>(ceil_div(left, kRankBlock)) * kRankBlock;
    const int piece = thread % kPieces;
    const int64_t at = step.column + piece * kItems;
    const uint8_t* first = bt + step.first_rank * bt_row_bytes;
    for (int row = thread / kPieces; row < (rows < kRanksPerStage ? rows : kRanksPerStage);
         row += kGroupThreads / kPieces) {
      prefill::fill_piece(to, row, piece,
                          reinterpret_cast<const T*>(first + row * bt_row_bytes) + at,
                          row < left ? unit.d_out - at : 0, true, p.pool);
    }
  }
};

// sums [64, 64] = S Bt of one stage, kBlocks times 16 ranks; += after the unit's first ranks.
template <class T, int kBlocks>
__device__ __forceinline__ void multiply_ranks(float (&sums)[kDepth / 2], const uint8_t* hidden,
                                               const uint8_t* bt, bool accumulate) {
  hold(sums);
  __syncwarp();
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    wgmma<T, kDepth, true>(sums, operand(hidden + i * 32, 8 * kRowBytes, 16),
                           operand(bt + i * 16 * kRowBytes, 8 * kRowBytes, 16),
                           i > 0 || accumulate);
  }
  wgmma_commit();
  wgmma_wait<0>();
  hold(sums);
}

// y += g (scale sums + u y + v) for this thread's elements of the tile in shared memory, also of
// rows past the tile's, which nobody stores. The 16 words are read before the first is written.
template <class T>
struct Update {
  float gate, scale;
  const float *u, *v;

  __device__ __forceinline__ void apply(const float (&sums)[kDepth / 2], uint8_t* y_tile,
                                        int64_t column, int64_t d_out) const {
    const int lane = threadIdx.x % kWarp;
    const int row = threadIdx.x / kWarp * 16 + lane / 4;  // and row + 8
    uint8_t* quad = y_tile + row * kRowBytes + lane % 4 * 4;
    const auto word_at = [&](int j, int m) {  // swizzled(row + 8 m, j): 8 rows further, same pieces
      return reinterpret_cast<uint32_t*>(quad + (j ^ lane / 4) * kPieceBytes + m * 8 * kRowBytes);
    };
    uint32_t words[kDepth / 8][2];
#pragma unroll
    for (int j = 0; j < kDepth / 8; ++j) {
#pragma unroll
      for (int m = 0; m < 2; ++m) words[j][m] = *word_at(j, m);
    }
    const bool has_vectors = u != nullptr || v != nullptr;
#pragma unroll
    for (int j = 0; j < kDepth / 8; ++j) {
      float us[2] = {}, vs[2] = {};
      if (has_vectors) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t c = column + 8 * j + lane % 4 * 2 + i;
          if (u != nullptr && c < d_out) us[i] = u[c];
          if (v != nullptr && c < d_out) vs[i] = v[c];
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        T pair[2];
        memcpy(pair, &words[j][m], 4);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float base = to_float(pair[i]);
          float delta = scale * sums[4 * j + 2 * m + i];
          if (has_vectors) delta = fmaf(us[i], base, delta) + vs[i];
          pair[i] = from_float<T>(fmaf(gate, delta, base));
        }
        uint32_t word;
        memcpy(&word, pair, 4);
        *word_at(j, m) = word;
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
  const int whole = unit.tile.rows / kBoxRows;
  if (threadIdx.x < kGroupThreads) {
    const int box = box_of_group();
    if (box >= whole) return;
    tensor_store(map, static_cast<int32_t>(column), unit.tile.first + box * kBoxRows,
                 y_tile + box * kBoxBytes);
    return;
  }
  const int thread = static_cast<int>(threadIdx.x) - kGroupThreads;
  const int row = whole * kBoxRows + thread / kPieces, piece = thread % kPieces;
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
  init_stages(&shared, shared.filled);
  Loads<T> loads{p, workspace, maps, shared, column_units, 0, false, {}, {}, nullptr, 0, 0};
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
    const uint8_t* core = offset[kPartCore] >= 0 ? p.pool + offset[kPartCore] : nullptr;
    prefill::make_hidden<T, kThreads>(
        p, workspace.partials, unit.tile, unit.slice, unit.rank, unit.tile.rows, core,
        shared.core_rows, [&](int row, int r) {
          constexpr int kItems = kPieceBytes / static_cast<int>(sizeof(T));
          uint8_t* block = shared.hidden + r / kDepth * kHiddenBlockBytes;
          return reinterpret_cast<T*>(block + swizzled(row, r % kDepth / kItems)) + r % kItems;
        });

    float sums[kDepth / 2] = {};
    ExpandStep step;
    step.begin(unit);
    for (bool more = true; more; more = step.advance(unit), ++taken) {
      const uint32_t stage = taken % kExpandStages;
      uint8_t* y_tile = shared.stages[stage];
      wait_copies<kAhead - 1>();
      publish_shared();
      __syncthreads();  // Bt and S are there; the stage of two steps ago is free but for its store
      loads.next();
      if (multiplies) {
        const uint8_t* hidden = shared.hidden + step.first_rank / kDepth * kHiddenBlockBytes +
                                group * kGroupRows * kRowBytes;
        const uint8_t* bt = y_tile + kYBytes;
        const int left = unit.rank - step.first_rank;
        const bool accumulate = step.first_rank > 0;
        if (left <= 16) {
          multiply_ranks<T, 1>(sums, hidden, bt, accumulate);
        } else if (left <= 32) {
          multiply_ranks<T, 2>(sums, hidden, bt, accumulate);
        } else if (left <= 48) {
          multiply_ranks<T, 3>(sums, hidden, bt, accumulate);
        } else {
          multiply_ranks<T, 4>(sums, hidden, bt, accumulate);
        }
      }
      if (step.last_ranks(unit)) {
        if (multiplies) {
          barrier_wait(&shared.filled[stage], taken / kExpandStages & 1);
          update.apply(sums, y_tile, step.column, unit.d_out);
        }
        publish_shared();
        __syncthreads();
        store_y<T>(p, &maps.slice[unit.slice], unit, y_tile, step.column);
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
