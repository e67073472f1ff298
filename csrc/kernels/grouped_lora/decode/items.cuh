// Which groups of rows a block serves, found on the device: the host never sees a route.
//
// Every block reads the routes of 256 tokens with one thread each, marks the first rows of groups
// per slice, and counts them: the active (group, slice) pairs get numbers without gaps, so a grid
// that is as large as the chip deals them out evenly, and bare rows, idle experts and rows that
// another one's block serves cost no block at all. The dependent reads (route, adapter and gate,
// rank, offsets) are the same four that a single row needs.
#pragma once

#include "kernels/cuda/vectors.cuh"
#include "kernels/grouped_lora/decode/plan.h"

namespace milora {

constexpr int kDecodeThreads = 256;
constexpr int kDecodeWarps = kDecodeThreads / kWarp;
constexpr int kMaxItems = 32;  // a block's items at a time

struct LoraItem {
  int64_t a, bt;  // bytes from the pool's start
  int64_t u, v;   // -1: none
  int64_t core;   // -1: none
  float scale;
  int32_t token, rows;
  int32_t slice, rank;  // rank 0: the tables point outside of the pool, nothing is done
};

struct ItemList {
  LoraItem items[kMaxItems];
  int32_t heads[kMaxSlices][kDecodeWarps];
};

struct ItemCount {
  int32_t here;   // entries of the list
  int32_t total;  // this worker's items of these 256 tokens
};

// Bytes [offset, offset + bytes) lie in the pool and start on 16.
__device__ __forceinline__ bool inside(int64_t offset, int64_t bytes, int64_t pool_bytes) {
  return offset >= 0 && offset % 16 == 0 && bytes <= pool_bytes && offset <= pool_bytes - bytes;
}

template <class T>
__device__ __forceinline__ LoraItem make_item(const GroupedLoraPoolParams& p, int32_t token,
                                              int32_t rows, int32_t slice, int64_t entry) {
  constexpr int kVec = kVecOf<T>;
  LoraItem item;
  item.token = token;
  item.rows = rows;
  item.slice = slice;
  item.rank = p.ranks[entry];
  item.scale = p.scales[entry];
  const int64_t* offset = offsets_at(p, entry);
  item.a = offset[kPartA];
  item.bt = offset[kPartBt];
  item.u = offset[kPartU];
  item.v = offset[kPartV];
  item.core = offset[kPartCore];
  const int64_t d_out = p.d_out[slice];
  const int64_t a_bytes = int64_t{item.rank} * vectors_of(p.d_in, kVec) * kVectorBytes;
  const int64_t bt_bytes = int64_t{item.rank} * vectors_of(d_out, kVec) * kVectorBytes;
  const int64_t core_bytes = int64_t{item.rank} * vectors_of(item.rank, kVec) * kVectorBytes;
  const int64_t vector_bytes = d_out * static_cast<int64_t>(sizeof(float));
  if (!inside(item.a, a_bytes, p.pool_bytes) || !inside(item.bt, bt_bytes, p.pool_bytes) ||
      (item.core >= 0 && !inside(item.core, core_bytes, p.pool_bytes))) {
    item.rank = 0;
  }
  if (!inside(item.u, vector_bytes, p.pool_bytes)) item.u = -1;
  if (!inside(item.v, vector_bytes, p.pool_bytes)) item.v = -1;
  return item;
}

// Fills the list with this worker's items number kMaxItems * window and following, of tokens
// [base, base + 256). All threads must call it; it begins and ends with a barrier.
template <class T>
__device__ __forceinline__ ItemCount find_items(const GroupedLoraPoolParams& p, int64_t base,
                                                int32_t window, int32_t worker, int32_t workers,
                                                ItemList& list) {
  static_assert(kMaxSlices <= 32, "a slice has one bit");
  const int64_t token = base + threadIdx.x;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto num_slices = static_cast<int32_t>(p.num_slices);
  __syncthreads();  // the list may still be in use

  int32_t adapter = -1;
  uint32_t slices = 0;  // with work for this token
  if (token < p.num_tokens) {
    const int32_t route = p.route_of[token];
    if (route >= 0 && route < p.num_routes) {
      adapter = p.adapter_of[route];
      if (adapter >= p.num_adapters) adapter = -1;
      for (int32_t s = 0; adapter >= 0 && s < num_slices; ++s) {
        const int64_t expert = p.expert[s];
        const int32_t rank = p.ranks[adapter * p.num_experts + expert];
        const bool works = p.gates[route * p.num_experts + expert] != 0.0f;  // NaN works, too
        if (works && rank >= 1 && rank <= most_ranks(p)) slices |= 1u << s;
      }
    }
  }
  const uint32_t same = __ballot_sync(kAllLanes, __shfl_up_sync(kAllLanes, adapter, 1) == adapter);
  for (int32_t s = 0; s < num_slices; ++s) {
    const uint32_t active = __ballot_sync(kAllLanes, slices >> s & 1);
    if (lane == 0) list.heads[s][warp] = __popc(row_groups(active, same).heads);
  }
  __syncthreads();

  int32_t total = 0;
  for (int32_t s = 0; s < num_slices; ++s) {
    const uint32_t active = __ballot_sync(kAllLanes, slices >> s & 1);
    const RowGroups groups = row_groups(active, same);
    int32_t number = total + __popc(groups.heads & ((1u << lane) - 1));
    for (int w = 0; w < kDecodeWarps; ++w) {
      if (w < warp) number += list.heads[s][w];
      total += list.heads[s][w];
    }
    const int32_t place = number / workers - window * kMaxItems;
    const bool mine = (groups.heads >> lane & 1) && number % workers == worker;
    if (mine && place >= 0 && place < kMaxItems) {
      list.items[place] =
          make_item<T>(p, static_cast<int32_t>(token), rows_of_group(groups.joins, lane), s,
                       adapter * p.num_experts + p.expert[s]);
    }
  }
  __syncthreads();
  const int32_t own = items_of_worker(total, worker, workers);
  const int32_t left = max(own - window * kMaxItems, 0);
  return {min(left, kMaxItems), own};
}

}  // namespace milora
