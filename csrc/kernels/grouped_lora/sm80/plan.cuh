// Finds the runs of a batch on the device: what the prefill kernels work on.
//
// Neighbouring tokens of one route form a run; a run is cut into tiles of up to kRows rows,
// counted from its first token, or, in an aligned plan, at multiples of kRows of the batch. A
// token begins a tile where tile_first(t, start of its run) is t itself, and ends one where the
// next token begins a tile or another run. So two scans over the tokens do: a maximum (the run's
// start) and a sum (the tile's number, and that of its jobs).
//
// One block, four tokens a thread, kPlanTokens at a time: 4096 tokens take one round. Bytes: 4 a
// token, and what the tables of the routes in use hold; the time is a few dependent loads. A token
// whose slices are all inactive belongs to no tile.
#pragma once

#include "kernels/grouped_lora/sm80/config.h"
#include "kernels/grouped_lora/sm80/expert.cuh"

namespace milora::prefill {

constexpr int kPlanThreads = 1024;
constexpr int kPlanItems = 4;
constexpr int kPlanTokens = kPlanThreads * kPlanItems;
constexpr int kPlanWarps = kPlanThreads / kWarp;

struct PlanShared {
  int32_t route[kPlanTokens + 2];  // of tokens begin - 1 to begin + kPlanTokens; -1 = in no run
  int32_t warp_max[kPlanWarps];
  int64_t warp_sum[kPlanWarps];
};

// Slices that change this token's row, as bits; 0 also for a token without a route or an adapter.
template <class T>
__device__ __forceinline__ uint32_t active_slices(const GroupedLoraPoolParams& p, int32_t route,
                                                  int32_t* adapter) {
  if (route < 0 || route >= p.num_routes) return 0;
  *adapter = p.adapter_of[route];
  if (*adapter < 0 || *adapter >= p.num_adapters) return 0;
  uint32_t slices = 0;
  for (int s = 0; s < p.num_slices; ++s) {
    slices |= static_cast<uint32_t>(is_active<T>(p, route, *adapter, s)) << s;
  }
  return slices;
}

// Inclusive scans over a block in the order of threads, with `carry` before the first.
template <class V, class Combine>
__device__ __forceinline__ V block_scan(V value, V carry, V* per_warp, const Combine& combine) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int step = 1; step < kWarp; step *= 2) {
    const V below = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value = combine(below, value);
  }
  __syncthreads();  // per_warp may still be read from the scan before
  if (lane == kWarp - 1) per_warp[warp] = value;
  __syncthreads();
  V before = carry;
  for (int w = 0; w < warp; ++w) before = combine(before, per_warp[w]);
  return combine(before, value);
}

template <class T, int kRows, bool kAligned>
__global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(const __grid_constant__ GroupedLoraPoolParams p, Workspace workspace) {
  __shared__ PlanShared shared;
  const auto later = [](int32_t a, int32_t b) { return a > b ? a : b; };
  const auto add = [](int64_t a, int64_t b) { return a + b; };
  int32_t start_before = -1;  // the last run's first token, of the tokens before this round
  int64_t done = 0;           // jobs << 32 | tiles
  int32_t last_route = -1;    // of the token before this round
  for (int64_t begin = 0; begin < p.num_tokens; begin += kPlanTokens) {
    // ---- which slices of which token ----
    const int64_t first = begin + threadIdx.x * kPlanItems;
    uint32_t slices[kPlanItems];
    int32_t adapter[kPlanItems];
#pragma unroll
    for (int i = 0; i < kPlanItems; ++i) {
      const int64_t t = first + i;
      const int32_t route = t < p.num_tokens ? p.route_of[t] : -1;
      adapter[i] = -1;
      slices[i] = active_slices<T>(p, route, &adapter[i]);
      shared.route[1 + threadIdx.x * kPlanItems + i] = slices[i] != 0 ? route : -1;
    }
    if (threadIdx.x == 0) {
      const int64_t next = begin + kPlanTokens;
      int32_t next_adapter;
      const int32_t route = next < p.num_tokens ? p.route_of[next] : -1;
      shared.route[0] = last_route;
      shared.route[1 + kPlanTokens] = active_slices<T>(p, route, &next_adapter) != 0 ? route : -1;
    }
    __syncthreads();

    // ---- the first token of each token's run ----
    const int32_t* route = shared.route + 1 + threadIdx.x * kPlanItems;  // route[-1] is before
    int32_t start[kPlanItems];
    int32_t latest = -1;
#pragma unroll
    for (int i = 0; i < kPlanItems; ++i) {
      if (route[i] >= 0 && route[i] != route[i - 1]) latest = static_cast<int32_t>(first + i);
      start[i] = latest;
    }
    const int32_t start_here = block_scan(latest, start_before, shared.warp_max, later);
    // What came before this thread: its own scan result may hold its own starts.
    int32_t before = __shfl_up_sync(kAllLanes, start_here, 1);
    if (threadIdx.x % kWarp == 0) {
      before = start_before;
      for (int w = 0; w < static_cast<int>(threadIdx.x) / kWarp; ++w) {
        before = later(before, shared.warp_max[w]);
      }
    }

    // ---- the numbers of tiles and jobs ----
    int64_t count = 0;
#pragma unroll
    for (int i = 0; i < kPlanItems; ++i) {
      if (start[i] < 0) start[i] = before;
      const int64_t t = first + i;
      const bool begins = route[i] >= 0 && tile_first<kRows, kAligned>(t, start[i]) == t;
      count += begins ? 1 + (static_cast<int64_t>(__popc(slices[i])) << 32) : 0;
    }
    int64_t number = block_scan(count, done, shared.warp_sum, add) - count;

    // ---- write them ----
#pragma unroll
    for (int i = 0; i < kPlanItems; ++i) {
      const int32_t t = static_cast<int32_t>(first + i);
      if (kAligned && t % kBlockRows == 0 && t < p.num_tokens) {
        workspace.block_begin[t / kBlockRows] = static_cast<int32_t>(number & 0xffffffff);
      }
      if (route[i] < 0) continue;
      const auto row = static_cast<int32_t>(t - tile_first<kRows, kAligned>(t, start[i]));
      if (row == 0) {
        const auto tile = static_cast<int32_t>(number & 0xffffffff);
        workspace.tiles[tile].first = t;
        workspace.tiles[tile].route = route[i];
        workspace.tiles[tile].adapter = adapter[i];
        workspace.tiles[tile].slices = static_cast<uint16_t>(slices[i]);
        int64_t job = number >> 32;
        for (int s = 0; s < p.num_slices; ++s) {
          if (slices[i] >> s & 1) workspace.jobs[job++] = tile * kMaxSlices + s;
        }
        number += 1 + (static_cast<int64_t>(__popc(slices[i])) << 32);
      }
      const bool ends =
          route[i + 1] != route[i] || tile_first<kRows, kAligned>(t + 1, start[i]) == t + 1;
      if (ends) workspace.tiles[(number & 0xffffffff) - 1].rows = static_cast<int16_t>(row + 1);
    }

    // ---- into the next round ----
    last_route = shared.route[kPlanTokens];
    for (int w = 0; w < kPlanWarps; ++w) {
      start_before = later(start_before, shared.warp_max[w]);
      done += shared.warp_sum[w];
    }
    __syncthreads();  // before the next round writes shared.route
  }
  if (threadIdx.x == 0) {
    *workspace.counts = {static_cast<int32_t>(done & 0xffffffff), static_cast<int32_t>(done >> 32)};
    if (kAligned)
      workspace.block_begin[ceil_div(p.num_tokens, kBlockRows)] = workspace.counts->tiles;
  }
}

}  // namespace milora::prefill
