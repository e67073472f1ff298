// Prompt router, first launch: each chunk of 16 tokens -> a partial (max, sum, vector)    [eq. 2,
// 8]
//
//   u_t = h_t . w_sa,  vector = sum_t exp(u_t - max) h_t,  sum = sum_t exp(u_t - max)
//
// A block owns a chunk; its threads own the columns, kVectors vectors of 16 bytes each. It takes
// the tokens in groups of kTokens: all their vectors are loaded into registers at once (64 KB in
// flight a block), multiplied with w_sa and reduced over the block; the weights then meet the same
// registers, so H is read once, by 16-byte loads. A group with a larger score scales down what was
// summed before (online.h). Mean and max pooling take the same way without scores, last reads one
// token. The order of all sums follows from d and the place in the prompt.
//
// That needs rows of whole vectors on 16 bytes, which every model has; others take the second
// kernel below. Which one serves follows from the layout of H, never from the batch.
//
// Bytes: num_tokens d itemsize, and 4 d a chunk written (and read by the second launch) for the
// partial: 1/8 more in bf16, most of it in L2. 4 FLOPs an element. 4096 tokens of 4096 bf16:
// 33.5 MB, 8.4 us at 4 TB/s, in 256 blocks. Estimates: no GPU has run this kernel yet.
#pragma once

#include "kernels/prompt_router/router.cuh"

namespace milora {

struct RouterPartials {
  float* vectors;    // [max_chunks, d]
  float* maxima;     // [max_chunks]
  float* sums;       // [max_chunks]
  int32_t* arrived;  // [num_prompts] blocks of the second launch that are done
};
// Cuts `memory` (null to measure) into the partials; returns its bytes.
inline int64_t lay_out(const PromptRouterParams& p, void* memory, RouterPartials* partials) {
  Cutter cutter{static_cast<char*>(memory)};
  partials->vectors = cutter.take<float>(max_chunks(p) * p.d);
  partials->maxima = cutter.take<float>(max_chunks(p));
  partials->sums = cutter.take<float>(max_chunks(p));
  partials->arrived = cutter.take<int32_t>(p.num_prompts);
  return cutter.size;
}

// Tokens of a group: with kVectors vectors each they fill 64 registers at most.
template <int kVectors>
constexpr int kGroupTokens = kVectors < 2 ? 8 : 16 / kVectors;

// The first element of this thread's vector v of a row.
template <class T>
__device__ __forceinline__ int64_t own_column(int v) {
  return (int64_t{v} * kRouterThreads + threadIdx.x) * kVecOf<T>;
}

// Scores of kTokens tokens, in every thread. `shared` [kRouterWarps][kTokens] is free for its next
// use after one more barrier.
template <class T, int kVectors, int kTokens>
__device__ __forceinline__ void score_tokens(const uint4 (&h)[kTokens][kVectors], int64_t d,
                                             const float* w_sa, float (*shared)[kTokens],
                                             float (&scores)[kTokens]) {
  constexpr int kVec = kVecOf<T>;
  float dots[kTokens] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float w[kVec] = {};
    if (own_column<T>(v) < d) {
#pragma unroll
      for (int i = 0; i < kVec / 4; ++i) {
        float four[4];
        unpack(__ldg(reinterpret_cast<const uint4*>(w_sa + own_column<T>(v)) + i), four, w_sa);
#pragma unroll
        for (int e = 0; e < 4; ++e) w[4 * i + e] = four[e];
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float f[kVec];
      unpack(h[t][v], f, static_cast<const T*>(nullptr));
#pragma unroll
      for (int e = 0; e < kVec; ++e) dots[t] = fmaf(f[e], w[e], dots[t]);
    }
  }
  constexpr int kHolders = kWarp / kTokens;  // lanes that end up with the same token's sum
  reduce_lanes<kWarp / 2, 1>(dots);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane % kHolders == 0) shared[warp][lane / kHolders] = dots[0];
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kTokens; ++t) scores[t] = 0;
#pragma unroll 1  // unrolled it would hold 64 values beside the group's registers
  for (int w = 0; w < kRouterWarps; ++w) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) scores[t] += shared[w][t];
  }
}

template <class T, int kVectors>
__global__ void __launch_bounds__(kRouterThreads, kVectors == 8 ? 1 : 2)
    router_pool_kernel(const __grid_constant__ PromptRouterParams p, RouterPartials partials) {
  constexpr int kVec = kVecOf<T>, kTokens = kGroupTokens<kVectors>;
  __shared__ ChunkSearch search;
  __shared__ float dots[2][kRouterWarps][kTokens];  // taken in turns
  const auto slot = static_cast<int32_t>(blockIdx.x);
  if (threadIdx.x == 0 && slot < p.num_prompts) partials.arrived[slot] = 0;
  Chunk chunk = find_chunk(p, slot, search);
  if (chunk.prompt < 0) return;
  Pooler pooler = p.codes[chunk.router].pooler;
  if (pooler == Pooler::kLast) {
    if (!chunk.last) return;  // nobody reads this partial
    chunk.begin = chunk.end - 1;
    pooler = Pooler::kMean;
  }
  const int n = chunk.end - chunk.begin;
  const T* first_row = static_cast<const T*>(p.h) + chunk.begin * p.h_stride;
  const float* w_sa = router_weights(p, chunk.router).w_sa;

  OnlineSoftmax softmax;
  float acc[kVectors][kVec] = {};
  for (int first = 0, turn = 0; first < n; first += kTokens, turn ^= 1) {
    // Phase 1: the group's tokens, all loads at once.
    uint4 h[kTokens][kVectors];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int64_t column = own_column<T>(v);
        h[t][v] = make_uint4(0, 0, 0, 0);
        if (first + t < n && column < p.d) {
          h[t][v] =
              __ldg(reinterpret_cast<const uint4*>(first_row + (first + t) * p.h_stride + column));
        }
      }
    }

    // Phase 2: their weights; 0 for tokens that are not there.
    float weights[kTokens];
    float factor = 1;
    if (pooler == Pooler::kSelfAttention) {
      score_tokens<T, kVectors, kTokens>(h, p.d, w_sa, dots[turn], weights);
      float top = -INFINITY;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (first + t >= n) weights[t] = -INFINITY;
        top = larger_or_nan(top, weights[t]);
      }
      factor = raise_top(&softmax, top);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        weights[t] = expf(weights[t] - softmax_shift(softmax));
        softmax.sum += weights[t];
      }
    } else {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) weights[t] = first + t < n ? 1.0f : 0.0f;
    }

    // Phase 3: add, or take the maximum.
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) acc[v][e] *= factor;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        float f[kVec];
        unpack(h[t][v], f, static_cast<const T*>(nullptr));
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          if (pooler == Pooler::kMax) {
            if (first + t < n) {
              acc[v][e] = first + t == 0 ? f[e] : larger_or_nan(acc[v][e], f[e]);
            }
          } else {
            acc[v][e] = fmaf(weights[t], f[e], acc[v][e]);
          }
        }
      }
    }
  }

  // Phase 4: the partial. A mean is a softmax over equal scores.
  if (threadIdx.x == 0) {
    const bool attends = pooler == Pooler::kSelfAttention;
    partials.maxima[slot] = attends ? softmax.top : 0.0f;
    partials.sums[slot] = attends ? softmax.sum : static_cast<float>(n);
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t column = own_column<T>(v);
    auto* to = reinterpret_cast<float4*>(partials.vectors + slot * p.d + column);
#pragma unroll
    for (int i = 0; i < kVec / 4; ++i) {
      const float* a = &acc[v][4 * i];
      if (column < p.d) to[i] = make_float4(a[0], a[1], a[2], a[3]);
    }
  }
}

// For rows that are not whole vectors on 16 bytes, or more of them than a block's registers take:
// scores first, then the weighted sum, for which the chunk comes from L2 again.
template <class T>
__global__ void __launch_bounds__(kRouterThreads, 2)
    router_pool_any_kernel(const __grid_constant__ PromptRouterParams p, RouterPartials partials) {
  __shared__ ChunkSearch search;
  __shared__ float weights[kRouterChunk];
  const auto slot = static_cast<int32_t>(blockIdx.x);
  if (threadIdx.x == 0 && slot < p.num_prompts) partials.arrived[slot] = 0;
  const Chunk chunk = find_chunk(p, slot, search);
  if (chunk.prompt < 0) return;
  const Pooler pooler = p.codes[chunk.router].pooler;
  if (pooler == Pooler::kLast && !chunk.last) return;
  const int n = chunk.end - chunk.begin;
  const T* h = static_cast<const T*>(p.h) + chunk.begin * p.h_stride;
  const float* w_sa = router_weights(p, chunk.router).w_sa;

  OnlineSoftmax softmax{0.0f, static_cast<float>(n)};  // a mean: equal scores
  for (int t = threadIdx.x / kWarp; t < n; t += kRouterWarps) {
    const bool attends = pooler == Pooler::kSelfAttention;
    const float score = attends ? warp_dot(h + t * p.h_stride, w_sa, p.d) : 1.0f;
    if (threadIdx.x % kWarp == 0) weights[t] = score;
  }
  __syncthreads();
  if (pooler == Pooler::kSelfAttention) {
    softmax = OnlineSoftmax{};
    for (int t = 0; t < n; ++t) raise_top(&softmax, weights[t]);
    softmax.sum = 0;
    for (int t = 0; t < n; ++t) softmax.sum += expf(weights[t] - softmax_shift(softmax));
    __syncthreads();
    const int t = threadIdx.x;
    if (t < n) weights[t] = expf(weights[t] - softmax_shift(softmax));
    __syncthreads();
  }
  for (int64_t c = threadIdx.x; c < p.d; c += kRouterThreads) {
    float acc = to_float(h[(n - 1) * p.h_stride + c]);  // what kLast asks for
    if (pooler == Pooler::kMax) {
      for (int t = 0; t < n; ++t) acc = larger_or_nan(acc, to_float(h[t * p.h_stride + c]));
    } else if (pooler != Pooler::kLast) {
      acc = 0;
      for (int t = 0; t < n; ++t) acc = fmaf(weights[t], to_float(h[t * p.h_stride + c]), acc);
    }
    partials.vectors[slot * p.d + c] = acc;
  }
  if (threadIdx.x == 0) {
    partials.maxima[slot] = softmax.top;
    partials.sums[slot] = softmax.sum;
  }
}

}  // namespace milora
