// What the forward and the backward of the prompt router share on a GPU: which slot of the grid
// works on which chunk of which prompt. The host knows neither spans nor routers (to read them
// would stop the stream), so the grid has one slot per possible chunk: num_tokens / kChunkTokens
// plus one per prompt suffices, since spans do not overlap. Chunks begin with their prompt, so a
// prompt is cut the same way alone and among others.
#pragma once

#include "common/cutter.h"
#include "kernels/cuda/vectors.cuh"
#include "kernels/prompt_router/cuda.h"
#include "kernels/prompt_router/math.h"
#include "kernels/prompt_router/online.h"
#include "kernels/prompt_router/weights.h"

namespace milora {

constexpr int kRouterThreads = 256;
constexpr int kChunkTokens = 16;  // 4096 tokens fill 132 multiprocessors twice
constexpr int kRouterWarps = kRouterThreads / kWarp;

// Whether H and w_sa are rows of whole 16-byte vectors on 16 bytes. In a pool w_sa always is.
template <class T>
MILORA_HOST_DEVICE bool in_vectors(const PromptRouterParams& p) {
  const auto on_16_bytes = [](const void* at) {
    return reinterpret_cast<uintptr_t>(at) % kVectorBytes == 0;
  };
  return p.d % kVecOf<T> == 0 && p.h_stride % kVecOf<T> == 0 && on_16_bytes(p.h) &&
         on_16_bytes(p.w_sa);
}

MILORA_HOST_DEVICE int64_t max_chunks(const PromptRouterParams& p) {
  return p.num_tokens / kChunkTokens + p.num_prompts;
}

// -1: none, or one that is not there or has a number of experts that cannot be.
__device__ __forceinline__ int32_t router_of(const PromptRouterParams& p, int64_t prompt) {
  const int32_t router = p.router_of[prompt];
  if (router < 0 || router >= p.num_routers) return -1;
  const int32_t num_experts = p.codes[router].num_experts;
  if (num_experts < 1 || num_experts > p.num_experts) return -1;
  for (int i = 0; p.offsets != nullptr && i < 3; ++i) {
    const int64_t bytes = router_bytes(p, p.codes[router], i);
    if (bytes != 0 && !inside_pool(p, p.offsets[3 * router + i], bytes)) return -1;
  }
  return router;
}

// The prompt's tokens, cut to what exists.
__device__ __forceinline__ void span_of(const PromptRouterParams& p, int64_t prompt, int32_t* begin,
                                        int32_t* end) {
  const auto limit = static_cast<int32_t>(p.num_tokens);
  *begin = max(0, min(p.spans[2 * prompt], limit));
  *end = max(*begin, min(p.spans[2 * prompt + 1], limit));
}

__device__ __forceinline__ int32_t chunks_of(const PromptRouterParams& p, int64_t prompt) {
  if (router_of(p, prompt) < 0) return 0;
  int32_t begin, end;
  span_of(p, prompt, &begin, &end);
  return (end - begin + kChunkTokens - 1) / kChunkTokens;
}

struct Chunk {
  int32_t prompt, router, begin, end;  // prompt -1: this slot has no work
  bool last;                           // of its prompt
};

struct ChunkSearch {  // shared memory
  int32_t warp_totals[kRouterWarps];
  int32_t prompt, number;
};

// The chunk of this slot: every thread counts the chunks of one prompt, a scan gives their places.
// All threads must call it.
__device__ __forceinline__ Chunk find_chunk(const PromptRouterParams& p, int32_t slot,
                                            ChunkSearch& search) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (threadIdx.x == 0) search.prompt = -1;
  int32_t before = 0;  // slots of the prompts that earlier rounds have counted
  for (int64_t base = 0; base < p.num_prompts; base += kRouterThreads) {
    const int64_t prompt = base + threadIdx.x;
    const int32_t count = prompt < p.num_prompts ? chunks_of(p, prompt) : 0;
    int32_t through = count;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, through, step);
      if (lane >= step) through += other;
    }
    if (lane == kWarp - 1) search.warp_totals[warp] = through;
    __syncthreads();
    int32_t first = before + through - count;
    for (int w = 0; w < kRouterWarps; ++w) {
      if (w < warp) first += search.warp_totals[w];
      before += search.warp_totals[w];
    }
    if (slot >= first && slot < first + count) {
      search.prompt = static_cast<int32_t>(prompt);
      search.number = slot - first;
    }
    __syncthreads();
    if (search.prompt >= 0) break;  // the same for all threads
  }
  Chunk chunk{search.prompt, -1, 0, 0, false};
  if (chunk.prompt < 0) return chunk;
  chunk.router = router_of(p, chunk.prompt);
  int32_t begin, end;
  span_of(p, chunk.prompt, &begin, &end);
  chunk.begin = begin + search.number * kChunkTokens;
  chunk.end = min(chunk.begin + kChunkTokens, end);
  chunk.last = chunk.end == end;
  return chunk;
}

// The slots of a prompt whose first is given. Where spans overlap, which they must not, there are
// fewer slots than chunks: the last prompts then lose some, and nothing is read past the end.
__device__ __forceinline__ int32_t end_slot(const PromptRouterParams& p, int64_t prompt,
                                            int32_t first) {
  return min(first + chunks_of(p, prompt), static_cast<int32_t>(max_chunks(p)));
}

// Slots before the prompt's first. `shared` as for block_sum; all threads must call it.
__device__ __forceinline__ int32_t first_slot(const PromptRouterParams& p, int64_t prompt,
                                              int32_t* shared) {
  int32_t sum = 0;
  for (int64_t i = threadIdx.x; i < prompt; i += kRouterThreads) sum += chunks_of(p, i);
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = sum;
  __syncthreads();
  sum = 0;
  for (int w = 0; w < kRouterWarps; ++w) sum += shared[w];
  return sum;
}

// The maximum over a block, NaN if one is; the same in every thread. All threads must call it.
__device__ __forceinline__ float block_max(float a, float* shared) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    a = larger_or_nan(a, __shfl_xor_sync(kAllLanes, a, step));
  }
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = a;
  __syncthreads();
  for (int w = 0; w < kRouterWarps; ++w) a = larger_or_nan(a, shared[w]);
  return a;
}

// 1 / rms of the pooled vector, or 1 without a norm. All threads must call it.
__device__ __forceinline__ float rms_factor(const RouterCodes& codes, const float* pooled,
                                            int64_t d, float* shared) {
  if (codes.norm == RouterNorm::kNone) return 1.0f;
  float squares = 0;
  for (int64_t c = threadIdx.x; c < d; c += kRouterThreads) squares += pooled[c] * pooled[c];
  squares = block_sum<kRouterThreads>(squares, shared);
  return 1.0f / sqrtf(squares / static_cast<float>(d) + kRmsEpsilon);
}

}  // namespace milora
