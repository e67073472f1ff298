// What the forward and the backward of the prompt router share on a GPU: which slot of the grid
// works on which chunk of which prompt. The host knows neither spans nor routers (to read them
// would stop the stream), so the grid has one slot per possible chunk: num_tokens / kRouterChunk
// plus one per prompt suffices, since spans do not overlap.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/prompt_router/cuda.h"
#include "kernels/prompt_router/math.h"
#include "kernels/prompt_router/weights.h"

namespace milora {

constexpr int kRouterThreads = 256;
constexpr int kRouterWarps = kRouterThreads / kWarp;

inline int64_t max_chunks(const PromptRouterParams& p) {
  return p.num_tokens / kRouterChunk + p.num_prompts;
}

// -1: none, or one that is not there.
__device__ __forceinline__ int32_t router_of(const PromptRouterParams& p, int64_t prompt) {
  const int32_t router = p.router_of[prompt];
  if (router < 0 || router >= p.num_routers) return -1;
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
  return (end - begin + kRouterChunk - 1) / kRouterChunk;
}

// Slots before the prompt's first.
__device__ __forceinline__ int32_t first_slot(const PromptRouterParams& p, int64_t prompt) {
  int32_t slot = 0;
  for (int64_t i = 0; i < prompt; ++i) slot += chunks_of(p, i);
  return slot;
}

struct Chunk {
  int32_t prompt, router, begin, end;  // prompt -1: this slot has no work
};

__device__ __forceinline__ Chunk chunk_of_slot(const PromptRouterParams& p, int32_t slot) {
  for (int64_t prompt = 0; prompt < p.num_prompts; ++prompt) {
    const int32_t count = chunks_of(p, prompt);
    if (slot < count) {
      int32_t begin, end;
      span_of(p, prompt, &begin, &end);
      begin += slot * kRouterChunk;
      return {static_cast<int32_t>(prompt), router_of(p, prompt), begin,
              min(begin + kRouterChunk, end)};
    }
    slot -= count;
  }
  return {-1, -1, 0, 0};
}

__device__ __forceinline__ float max_or_nan(float a, float b) {
  return b > a || b != b ? (a != a ? a : b) : a;
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
