// grouped_lora_ for few rows per adapter, sm90 and sm100:                                  [eq. 1]
//   y_s[t] += g (s B C (rg * A x_t) + u y_s[t] + v)
//
// Work. An item is a group of up to 8 neighbouring rows of one adapter in one slice (items.cuh); a
// cluster of 8 blocks serves it. Block i owns share i of d_in and share i of d_out (plan.h).
//   1. Every block multiplies its columns of A with its columns of x: rank x rows partial sums,
//      kept in its own shared memory.
//   2. Cluster barrier. Every block reads the 8 partial sums of all (rank, row) through distributed
//      shared memory, adds them in the order of the blocks, and multiplies by the rank's gate; then
//      by C, if the expert has one.
//   3. Every block multiplies that with its columns of Bt and updates its columns of y.
// No atomics; the order of every sum follows from d_in and the rank.
//
// Memory. The tiles of A and Bt of all items of a block form one sequence. Warps 0 to 3 keep
// kStages tiles of 16 KB ahead of it with bulk copies of a row (up to 1 KB): while the cluster
// waits in step 2, Bt and the next item's A are on their way. The copies of one warp start one
// after the other (their operands are uniform registers), so four warps, one a scheduler, start
// four each. A stage is refilled after the barrier that ends its use, without a proxy fence: before
// it the stage was only read. 5 stages and the sums take 107 KB: two blocks, or 160 KB in flight,
// per multiprocessor.
//
// Floor. Bytes = (rank (d_in + d_out) + rows (d_in + 2 d_out)) itemsize per item, each weight read
// once; 2 FLOPs per weight and row. 4096 -> 4096, rank 32, bf16: 512 KiB an item.
//   1 row of 1 adapter: 64 KiB per block over 8 multiprocessors; latency rules: four dependent
//   reads of the tables (4 x ~0.6 us), one copy (~1 us), two cluster barriers, one store: 4 us.
//   64 rows of 64 adapters: 33.5 MB, 8.4 us at 4 TB/s. 256 of 256: 134 MB, 34 us; the chip holds
//   33 clusters, so each serves 8 items in a row and the copies never pause.
// These are estimates: no GPU has run this kernel yet.
//
// Programmatic dependent launch behind the base GEMM would hide at most the launch gap (about 1
// us): a block needs 107 KB that the GEMM's blocks still hold, and nothing may be read before the
// wait, since gates and routes may come from the kernel just before. The shrink on a side stream
// beside the base GEMM would save only latency too: at decode both wait for the same memory, and
// two launches and an event cost more than the overlap gives. Neither is done.
#pragma once

#include "kernels/cuda/sm90.cuh"
#include "kernels/grouped_lora/decode/math.cuh"

namespace milora {

constexpr int kStages = 5;
constexpr int kCopyWarps = 4;
constexpr int kCopyThreads = kCopyWarps * kWarp;

using LoraStage = uint4[kTileRanks][kTileVectors];

struct ClusterShared {
  LoraStage stages[kStages];
  union {
    float warp_sums[2][kDecodeWarps][kTileRanks][kGroupRows];  // taken in turns by rank tiles
    float gathered[kMaxRank][kGroupRows];  // rg * A x of an item with a core, after its shrink
  };
  float block_sums[kMaxRank][kGroupRows];  // read by the other blocks
  float hidden[kMaxRank][kGroupRows];      // [C] (rg * A x)
  float gates[kGroupRows];
  ItemList list;
  uint64_t filled[kStages];
};
static_assert(2 * (sizeof(ClusterShared) + 1024) <= 228 * 1024, "two blocks a multiprocessor");

// A block's view of its items: what the copies and the arithmetic walk through.
template <class T>
struct BlockWork {
  const GroupedLoraPoolParams& p;
  ClusterShared& shared;
  int32_t num_items;
  int part;        // block of the cluster
  uint32_t taken;  // tiles used up since the kernel began
  bool reading;    // the other blocks may still read block_sums
  // The next tile to copy; only the warps that copy follow.
  uint32_t issued;
  int32_t next_item, next_tile;

  __device__ __forceinline__ LoraShare share_in() const {
    return share_of(vectors_of(p.d_in, kVecOf<T>), part);
  }
  __device__ __forceinline__ LoraShare share_out(const LoraItem& item) const {
    return share_of(vectors_of(p.d_out[item.slice], kVecOf<T>), part);
  }

  // The first kCopyThreads: start copying the next tile, if there is one.
  __device__ __forceinline__ void issue() {
    for (; next_item < num_items; ++next_item, next_tile = 0) {
      const LoraItem& item = shared.list.items[next_item];
      const LoraShare in = share_in(), out = share_out(item);
      const int32_t shrinks = num_tiles(item.rank, in.count);
      const bool expands = next_tile >= shrinks;
      if (next_tile >= shrinks + num_tiles(item.rank, out.count)) continue;
      const LoraTile tile = expands ? expand_tile_at(item.rank, out.count, next_tile - shrinks)
                                    : shrink_tile_at(item.rank, in.count, next_tile);
      const int64_t row_vectors = vectors_of(expands ? p.d_out[item.slice] : p.d_in, kVecOf<T>);
      const int32_t stage = issued % kStages;
      const uint32_t row_bytes = tile.num_vectors * kVectorBytes;
      // Other warps' copies may land before: the phase cannot end without this arrival.
      if (threadIdx.x == 0) barrier_expect(&shared.filled[stage], tile.num_ranks * row_bytes);
      const int rank = threadIdx.x % kWarp * kCopyWarps + threadIdx.x / kWarp;
      if (rank < tile.num_ranks) {
        const int64_t first = (tile.first_rank + rank) * row_vectors +
                              (expands ? out.begin : in.begin) + tile.first_vector;
        bulk_load(shared.stages[stage][rank],
                  p.pool + (expands ? item.bt : item.a) + first * kVectorBytes, row_bytes,
                  &shared.filled[stage]);
      }
      ++issued;
      ++next_tile;
      return;
    }
  }

  // Waits for the oldest tile in flight.
  __device__ __forceinline__ const LoraStage& wait() {
    const uint32_t stage = taken % kStages;
    barrier_wait(&shared.filled[stage], taken / kStages & 1);
    return shared.stages[stage];
  }

  // After the tile's use by all threads: refills its stage.
  __device__ __forceinline__ void release() {
    __syncthreads();
    ++taken;
    if (threadIdx.x < kCopyThreads) issue();
  }

  template <int R>
  __device__ __forceinline__ void shrink(const LoraItem& item) {
    constexpr int kVec = kVecOf<T>;
    const LoraShare in = share_in();
    const int32_t tiles = num_tiles(item.rank, in.count);
    if (tiles == 0) {  // d_in has fewer vectors than there are blocks
      for (int i = threadIdx.x; i < item.rank * R; i += kDecodeThreads) {
        shared.block_sums[i / R][i % R] = 0;
      }
    }
    constexpr int kAtOnce = R < kRowsAtOnce ? R : kRowsAtOnce;
    for (int32_t i = 0; i < tiles; ++i) {
      const LoraTile tile = shrink_tile_at(item.rank, in.count, i);
      const int vector = own_vector();
      const int64_t column = (int64_t{in.begin} + tile.first_vector + vector) * kVec;
      const int valid = valid_elements<T>(p, tile, column);
      auto& sums = shared.warp_sums[tile.first_rank / kTileRanks % 2];
      float x[kAtOnce][kVec];
      load_rows<T, kAtOnce>(p, item, 0, column, valid, x);
      const LoraStage& stage = wait();
      for (int from = 0;;) {
        shrink_tile<T, kAtOnce>(
            x, tile, valid, from, [&](int rank) { return stage[rank][vector]; },
            sums[threadIdx.x / kWarp]);
        from += kAtOnce;
        if (from >= R) break;
        load_rows<T, kAtOnce>(p, item, from, column, valid, x);
      }
      release();
      if (tile.last) add_warps<R>(sums, tile, shared.block_sums);
    }
  }

  template <int R>
  __device__ __forceinline__ void gather(const LoraItem& item) {
    cluster_arrive();
    cluster_wait();
    auto* sums = item.core >= 0 ? shared.gathered : shared.hidden;
    for (int i = threadIdx.x; i < item.rank * R; i += kDecodeThreads) {
      float parts[kLoraSplits];
#pragma unroll
      for (int b = 0; b < kLoraSplits; ++b) {
        parts[b] = read_remote(&shared.block_sums[i / R][i % R], b);
      }
      float sum = 0;
#pragma unroll
      for (int b = 0; b < kLoraSplits; ++b) sum += parts[b];
      sums[i / R][i % R] = sum * rank_gate(p, item, i / R, i % R);
    }
    __syncthreads();
    cluster_arrive_relaxed();  // the barrier before has completed this block's reads
    reading = true;
    if (item.core < 0) return;
    multiply_core<T, R>(p, item, shared.gathered, shared.hidden);
    __syncthreads();
  }

  template <int R>
  __device__ __forceinline__ void expand(const LoraItem& item) {
    const auto multiply_tile = [&](auto& y, const LoraTile& tile, int64_t, bool valid) {
      const LoraStage& stage = wait();
      expand_tile<T, R>(
          y, tile, valid, [&](int rank) { return stage[rank][own_vector()]; }, shared.hidden);
      release();
    };
    expand_share<T, R>(p, item, share_out(item), shared.gates, multiply_tile);
  }

  __device__ __forceinline__ void serve(const LoraItem& item) {
    if (reading) cluster_wait();
    load_gates(p, item, shared.gates);
    dispatch_rows(item.rows, [&](auto rows) {
      constexpr int R = decltype(rows)::value;
      shrink<R>(item);
      gather<R>(item);
      expand<R>(item);
    });
    __syncthreads();  // hidden and gates are free again
  }
};

template <class T>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    decode_cluster_kernel(const __grid_constant__ GroupedLoraPoolParams p) {
#if !defined(__CUDA_ARCH__) || MILORA_DECODE_BY_CLUSTERS(__CUDA_ARCH__ / 100)
  ClusterShared& shared = *static_cast<ClusterShared*>(dynamic_shared());
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) barrier_init(&shared.filled[i]);
    barrier_init_fence();
  }
  __syncthreads();
  const auto worker = static_cast<int32_t>(blockIdx.x / kLoraSplits);
  const auto workers = static_cast<int32_t>(gridDim.x / kLoraSplits);
  BlockWork<T> work{p, shared, 0, cluster_rank(), 0, false, 0, 0, 0};
  for (int64_t base = 0; base < p.num_tokens; base += kDecodeThreads) {
    for (int32_t window = 0;; ++window) {
      const ItemCount count = find_items<T>(p, base, window, worker, workers, shared.list);
      work.num_items = count.here;
      work.next_item = work.next_tile = 0;
      for (int i = 0; i < kStages && threadIdx.x < kCopyThreads; ++i) work.issue();
      for (int32_t i = 0; i < count.here; ++i) {
        if (shared.list.items[i].rank > 0) work.serve(shared.list.items[i]);
      }
      if ((window + 1) * kMaxItems >= count.total) break;
    }
  }
  if (work.reading) cluster_wait();  // shared memory must outlive its readers
#endif
}

}  // namespace milora
