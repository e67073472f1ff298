// grouped_lora_ for few rows per adapter, before sm90 and on sm120: without clusters the 8 blocks
// of an item cannot wait for each other, so the two products are two launches.
//
// shrink: block i of an item multiplies its share of A with its share of x and leaves rank x rows
// sums in the workspace. expand: every block adds the 8 sums in order, multiplies by the expert's
// core, if there is one, and by its share of Bt. Weights go from memory to registers, 4 vectors of
// 16 bytes in flight per thread; two or more blocks a multiprocessor keep 32 KB and more under way,
// three times what an A100's memory needs (18 bytes a ns and multiprocessor x 0.6 us). Bytes as in
// cluster.cuh, plus 64 rank rows of sums an item, which stay in L2. The arithmetic, its order and
// hence the bits are those of the cluster form.
#pragma once

#include "kernels/grouped_lora/decode/math.cuh"

namespace milora {

constexpr int kSlabTokens = 1024;  // tokens of a launch: bounds the workspace

// sums [num_tokens, num_slices, kLoraSplits, kMaxRank]: row -> its kLoraSplits x kMaxRank.
MILORA_HOST_DEVICE int64_t split_sums_at(const GroupedLoraPoolParams& p, int64_t token,
                                         int64_t slice) {
  return (token * p.num_slices + slice) * kLoraSplits * kMaxRank;
}

template <class T, int R>
__device__ __forceinline__ void split_shrink(const GroupedLoraPoolParams& p, const LoraItem& item,
                                             int part, float (*warp_sums)[kTileRanks][kGroupRows],
                                             float (*block_sums)[kGroupRows], float* sums) {
  constexpr int kVec = kVecOf<T>;
  constexpr int kAtOnce = R < kRowsAtOnce ? R : kRowsAtOnce;
  const int32_t row_vectors = vectors_of(p.d_in, kVec);
  const LoraShare in = share_of(row_vectors, part);
  const int32_t tiles = num_tiles(item.rank, in.count);
  const int vector = own_vector();
  for (int i = threadIdx.x; tiles == 0 && i < item.rank * R; i += kDecodeThreads) {
    block_sums[i / R][i % R] = 0;
  }
  for (int32_t i = 0; i < tiles; ++i) {
    const LoraTile tile = shrink_tile_at(item.rank, in.count, i);
    const int64_t place = int64_t{in.begin} + tile.first_vector + vector;
    const int valid = valid_elements<T>(p, tile, place * kVec);
    const auto* a = reinterpret_cast<const uint4*>(p.pool + item.a) +
                    int64_t{tile.first_rank} * row_vectors + place;
    for (int from = 0; from < R; from += kAtOnce) {
      float x[kAtOnce][kVec];
      load_rows<T, kAtOnce>(p, item, from, place * kVec, valid, x);
      shrink_tile<T, kAtOnce>(
          x, tile, valid, from, [&](int rank) { return __ldg(a + int64_t{rank} * row_vectors); },
          warp_sums[threadIdx.x / kWarp]);
    }
    if (!tile.last) continue;
    __syncthreads();
    add_warps<R>(warp_sums, tile, block_sums);
    __syncthreads();
  }
  __syncthreads();
  for (int i = threadIdx.x; i < item.rank * item.rows; i += kDecodeThreads) {
    const int row = i / item.rank, rank = i % item.rank;
    sums[split_sums_at(p, item.token + row, item.slice) + part * kMaxRank + rank] =
        block_sums[rank][row];
  }
  __syncthreads();
}

template <class T, int R>
__device__ __forceinline__ void split_expand(const GroupedLoraPoolParams& p, const LoraItem& item,
                                             int part, float (*gathered)[kGroupRows],
                                             float (*hidden)[kGroupRows], float* gates,
                                             const float* sums) {
  auto* target = item.core >= 0 ? gathered : hidden;
  load_gates(p, item, gates);
  for (int i = threadIdx.x; i < item.rank * R; i += kDecodeThreads) {
    const int row = i / item.rank, rank = i % item.rank;
    float sum = 0;
    if (row < item.rows) {
      const float* parts = sums + split_sums_at(p, item.token + row, item.slice) + rank;
#pragma unroll
      for (int b = 0; b < kLoraSplits; ++b) sum += parts[b * kMaxRank];
      sum *= rank_gate(p, item, rank, row);
    }
    target[rank][row] = sum;
  }
  __syncthreads();
  if (item.core >= 0) {
    multiply_core<T, R>(p, item, gathered, hidden);
    __syncthreads();
  }
  const int32_t row_vectors = vectors_of(p.d_out[item.slice], kVecOf<T>);
  const auto multiply_tile = [&](auto& y, const LoraTile& tile, int64_t place, bool valid) {
    const auto* bt = reinterpret_cast<const uint4*>(p.pool + item.bt) +
                     int64_t{tile.first_rank} * row_vectors + place;
    expand_tile<T, R>(
        y, tile, valid, [&](int rank) { return __ldg(bt + int64_t{rank} * row_vectors); }, hidden);
  };
  expand_share<T, R>(p, item, share_of(row_vectors, part), gates, multiply_tile);
  __syncthreads();  // hidden and gates are free again
}

// kExpand false: the first launch, which writes sums; true: the second, which reads them.
template <class T, bool kExpand>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    decode_split_kernel(const __grid_constant__ GroupedLoraPoolParams p, float* sums) {
#if !defined(__CUDA_ARCH__) || !MILORA_DECODE_BY_CLUSTERS(__CUDA_ARCH__ / 100)
  __shared__ ItemList list;
  __shared__ float warp_sums[kExpand ? 1 : kDecodeWarps][kTileRanks][kGroupRows];
  __shared__ float hidden[kMaxRank][kGroupRows];  // the shrink's: this block's sums
  __shared__ float gathered[kExpand ? kMaxRank : 1][kGroupRows];
  __shared__ float gates[kGroupRows];
  const auto part = static_cast<int>(blockIdx.x % kLoraSplits);
  const auto worker = static_cast<int32_t>(blockIdx.x / kLoraSplits);
  const auto workers = static_cast<int32_t>(gridDim.x / kLoraSplits);
  for (int64_t base = 0; base < p.num_tokens; base += kDecodeThreads) {
    for (int32_t window = 0;; ++window) {
      const ItemCount count = find_items<T>(p, base, window, worker, workers, list);
      for (int32_t i = 0; i < count.here; ++i) {
        const LoraItem& item = list.items[i];
        if (item.rank == 0) continue;
        dispatch_rows(item.rows, [&](auto rows) {
          constexpr int R = decltype(rows)::value;
          if constexpr (kExpand) {
            split_expand<T, R>(p, item, part, gathered, hidden, gates, sums);
          } else {
            split_shrink<T, R>(p, item, part, warp_sums, hidden, sums);
          }
        });
      }
      if ((window + 1) * kMaxItems >= count.total) break;
    }
  }
#endif
}

}  // namespace milora
