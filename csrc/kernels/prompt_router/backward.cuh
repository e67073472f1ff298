// Kernels of the prompt router's backward on a GPU. The equations stand in backward_cpu.h.
//
// head (block per prompt): dlogits, activated, the gradient dv of the pooled vector, dcoef.
// dots (block per chunk): h . w_sa and h . dv of each token in one reading; for max pooling the
// first maximum. weights (block per prompt): softmax weights and score gradients. scatter (block
// per chunk): dh and a partial of dw_sa. combine (block per router and 256 columns): adds prompts
// and chunks in order. Bytes: H twice, dh once, all by 16-byte accesses where the rows allow;
// self-attention needs both readings because a score's gradient depends on all scores. Sums have a
// fixed order; the one atomic is a minimum of integers.
#pragma once

#include <limits>

#include "kernels/prompt_router/router.cuh"

namespace milora {

struct RouterBackwardScratch {
  float* dvector;    // [num_prompts, d]
  float* activated;  // [num_prompts, d]
  float* dlogits;    // [num_prompts, num_experts]
  float* dcoef;      // [num_prompts, kNumCoefs]
  float* scores;     // [num_tokens] h . w_sa, then softmax weight
  float* dots;       // [num_tokens] h . dv, then gradient of the score
  float* dw_sa;      // [max_chunks, d]
  int32_t* argmax;   // [num_prompts, d] token of the first maximum
};
// Cuts `memory` (null to measure) into the scratch; returns its bytes.
inline int64_t lay_out(const PromptRouterParams& p, void* memory, RouterBackwardScratch* scratch) {
  Cutter cutter{static_cast<char*>(memory)};
  scratch->dvector = cutter.take<float>(p.num_prompts * p.d);
  scratch->activated = cutter.take<float>(p.num_prompts * p.d);
  scratch->dlogits = cutter.take<float>(p.num_prompts * p.num_experts);
  scratch->dcoef = cutter.take<float>(p.num_prompts * kNumCoefs);
  scratch->scores = cutter.take<float>(p.num_tokens);
  scratch->dots = cutter.take<float>(p.num_tokens);
  scratch->dw_sa = cutter.take<float>(max_chunks(p) * p.d);
  scratch->argmax = cutter.take<int32_t>(p.num_prompts * p.d);
  return cutter.size;
}

constexpr int32_t kNoToken = std::numeric_limits<int32_t>::max();

// kWidth neighbouring elements: a vector on 16 bytes, or one.
template <class T, int kWidth>
__device__ __forceinline__ void load_elements(const T* from, float (&to)[kWidth]) {
  if constexpr (kWidth == 1) {
    to[0] = to_float(*from);
  } else {
    unpack(__ldg(reinterpret_cast<const uint4*>(from)), to, from);
  }
}
template <class T, int kWidth>
__device__ __forceinline__ void store_elements(T* to, const float (&from)[kWidth]) {
  if constexpr (kWidth == 1) {
    *to = from_float<T>(from[0]);
  } else {
    // A plain assignment was compiled to four stores of 4 bytes here.
    __stwb(reinterpret_cast<uint4*>(to), pack<T>(from));
  }
}
// The same of float32 beside kWidth elements of T: several vectors.
template <int kWidth>
__device__ __forceinline__ void load_floats(const float* from, float (&to)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; i += kWidth < 4 ? 1 : 4) {
    if constexpr (kWidth == 1) {
      to[0] = *from;
    } else {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
    }
  }
}

__global__ void __launch_bounds__(kRouterThreads, 2)
    router_head_backward_kernel(const __grid_constant__ PromptRouterBackwardParams params,
                                RouterBackwardScratch scratch) {
  __shared__ float dlogits[kMaxExperts];
  __shared__ float shared[kRouterWarps];
  const PromptRouterParams& p = params.forward;
  const int64_t prompt = blockIdx.x;
  const int32_t router = router_of(p, prompt);
  if (router < 0) return;
  const RouterCodes codes = p.codes[router];
  const float* coef = p.coef + router * kNumCoefs;
  const float* pooled = p.pooled + prompt * p.d;
  float* dvector = scratch.dvector + prompt * p.d;
  float* activated = scratch.activated + prompt * p.d;
  for (int64_t c = threadIdx.x; c < p.d; c += kRouterThreads) {
    scratch.argmax[prompt * p.d + c] = kNoToken;
  }
  if (threadIdx.x == 0) {
    gates_backward(p.probs + prompt * p.num_experts, codes, params.dprobs + prompt * p.num_experts,
                   params.dgates + prompt * p.num_experts, dlogits);
    for (int e = 0; e < codes.num_experts; ++e) {
      scratch.dlogits[prompt * p.num_experts + e] = dlogits[e];
    }
  }
  __syncthreads();

  const float factor = rms_factor(codes, pooled, p.d, shared);
  float dcoef[kNumCoefs] = {};
  float inner = 0;  // gradient at the activation's input . pooled
  for (int64_t c = threadIdx.x; c < p.d; c += kRouterThreads) {
    float grad = 0;
    for (int e = 0; e < codes.num_experts; ++e) {
      grad = fmaf(dlogits[e], p.w_r[(router * p.num_experts + e) * p.d + c], grad);
    }
    const float x = factor * pooled[c];
    activated[c] = activate(codes.activation, x, coef);
    grad = activate_backward(codes.activation, x, coef, grad, dcoef);
    inner = fmaf(grad, pooled[c], inner);
    dvector[c] = grad;
  }
#pragma unroll
  for (int i = 0; i < kNumCoefs; ++i) {
    const float sum = block_sum<kRouterThreads>(dcoef[i], shared);
    if (threadIdx.x == 0) scratch.dcoef[prompt * kNumCoefs + i] = sum;
  }
  inner = block_sum<kRouterThreads>(inner, shared);
  const float mean = factor * inner / static_cast<float>(p.d);
  for (int64_t c = threadIdx.x; c < p.d; c += kRouterThreads) {
    float grad = dvector[c];
    if (codes.norm == RouterNorm::kRms) grad = factor * (grad - factor * pooled[c] * mean);
    dvector[c] = grad + params.dpooled[prompt * p.d + c];
  }
}

template <int kWidth>
__device__ __forceinline__ void store_floats(float* to, const float (&from)[kWidth]) {
  if constexpr (kWidth == 1) {
    *to = from[0];
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      __stwb(reinterpret_cast<float4*>(to + i),
             make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]));
    }
  }
}

// A warp's h . w_sa and h . dv of one token.
template <class T, int kWidth>
__device__ __forceinline__ void two_dots(const T* h, const float* w_sa, const float* dvector,
                                         int64_t d, float* score, float* dot) {
  float sums[2] = {};
  for (int64_t c = threadIdx.x % kWarp * kWidth; c < d; c += kWarp * kWidth) {
    float values[kWidth], w[kWidth], g[kWidth];
    load_elements<T, kWidth>(h + c, values);
    load_floats<kWidth>(w_sa + c, w);
    load_floats<kWidth>(dvector + c, g);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      sums[0] = fmaf(values[e], w[e], sums[0]);
      sums[1] = fmaf(values[e], g[e], sums[1]);
    }
  }
  *score = warp_sum(sums[0]);
  *dot = warp_sum(sums[1]);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kRouterThreads, 2)
    router_dots_kernel(const __grid_constant__ PromptRouterParams p,
                       RouterBackwardScratch scratch) {
  __shared__ ChunkSearch search;
  const Chunk chunk = find_chunk(p, static_cast<int32_t>(blockIdx.x), search);
  if (chunk.prompt < 0) return;
  const Pooler pooler = p.codes[chunk.router].pooler;
  const T* h = static_cast<const T*>(p.h);
  if (pooler == Pooler::kMax) {
    for (int64_t c = threadIdx.x; c < p.d; c += kRouterThreads) {
      const float best = p.pooled[chunk.prompt * p.d + c];
      int32_t found = kNoToken;
      for (int32_t t = chunk.begin; t < chunk.end && found == kNoToken; ++t) {
        const float value = to_float(h[t * p.h_stride + c]);
        if (value == best || value != value) found = t;
      }
      if (found != kNoToken) atomicMin(&scratch.argmax[chunk.prompt * p.d + c], found);
    }
  }
  if (pooler != Pooler::kSelfAttention) return;
  for (int32_t t = chunk.begin + threadIdx.x / kWarp; t < chunk.end; t += kRouterWarps) {
    float score, dot;
    two_dots<T, kWidth>(h + t * p.h_stride, p.w_sa + chunk.router * p.d,
                        scratch.dvector + chunk.prompt * p.d, p.d, &score, &dot);
    if (threadIdx.x % kWarp == 0) {
      scratch.scores[t] = score;
      scratch.dots[t] = dot;
    }
  }
}

__global__ void __launch_bounds__(kRouterThreads, 2)
    router_weights_kernel(const __grid_constant__ PromptRouterParams p,
                          RouterBackwardScratch scratch) {
  __shared__ float shared[kRouterWarps];
  const int64_t prompt = blockIdx.x;
  const int32_t router = router_of(p, prompt);
  if (router < 0) return;
  int32_t begin, end;
  span_of(p, prompt, &begin, &end);
  if (p.codes[router].pooler != Pooler::kSelfAttention || begin == end) return;

  float top = -INFINITY;
  for (int32_t t = begin + threadIdx.x; t < end; t += kRouterThreads) {
    top = larger_or_nan(top, scratch.scores[t]);
  }
  top = block_max(top, shared);
  float total = 0, mean = 0;
  for (int32_t t = begin + threadIdx.x; t < end; t += kRouterThreads) {
    const float weight = expf(scratch.scores[t] - top);
    total += weight;
    mean = fmaf(weight, scratch.dots[t], mean);
  }
  total = block_sum<kRouterThreads>(total, shared);
  mean = block_sum<kRouterThreads>(mean, shared) / total;
  __syncthreads();
  for (int32_t t = begin + threadIdx.x; t < end; t += kRouterThreads) {
    const float weight = expf(scratch.scores[t] - top) / total;
    scratch.scores[t] = weight;
    scratch.dots[t] = weight * (scratch.dots[t] - mean);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kRouterThreads, 2)
    router_scatter_kernel(const __grid_constant__ PromptRouterBackwardParams params,
                          RouterBackwardScratch scratch) {
  __shared__ ChunkSearch search;
  const PromptRouterParams& p = params.forward;
  const auto slot = static_cast<int32_t>(blockIdx.x);
  const Chunk chunk = find_chunk(p, slot, search);
  if (chunk.prompt < 0) return;
  const Pooler pooler = p.codes[chunk.router].pooler;
  int32_t span_begin, span_end;
  span_of(p, chunk.prompt, &span_begin, &span_end);
  const float length = static_cast<float>(span_end - span_begin);
  const T* h = static_cast<const T*>(p.h);
  T* dh = static_cast<T*>(params.dh);
  for (int64_t c = threadIdx.x * kWidth; c < p.d; c += kRouterThreads * kWidth) {
    float dvector[kWidth], w_sa[kWidth], sums[kWidth] = {};
    load_floats<kWidth>(scratch.dvector + chunk.prompt * p.d + c, dvector);
    load_floats<kWidth>(p.w_sa + chunk.router * p.d + c, w_sa);
    const int32_t* argmax = scratch.argmax + chunk.prompt * p.d + c;
    for (int32_t t = chunk.begin; t < chunk.end; ++t) {
      float grads[kWidth];
      if (pooler == Pooler::kSelfAttention) {
        const float weight = scratch.scores[t], dscore = scratch.dots[t];
        float values[kWidth];
        load_elements<T, kWidth>(h + t * p.h_stride + c, values);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          grads[e] = fmaf(dscore, w_sa[e], weight * dvector[e]);
          sums[e] = fmaf(dscore, values[e], sums[e]);
        }
      } else {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const bool chosen = pooler == Pooler::kMax ? t == argmax[e] : t == span_end - 1;
          grads[e] = pooler == Pooler::kMean ? dvector[e] / length : (chosen ? dvector[e] : 0.0f);
        }
      }
      store_elements<T, kWidth>(dh + t * p.d + c, grads);
    }
    store_floats<kWidth>(scratch.dw_sa + slot * p.d + c, sums);
  }
}

__global__ void __launch_bounds__(kRouterThreads, 2)
    router_combine_kernel(const __grid_constant__ PromptRouterBackwardParams params,
                          RouterBackwardScratch scratch) {
  const PromptRouterParams& p = params.forward;
  const auto router = static_cast<int32_t>(blockIdx.x);
  const int64_t c = static_cast<int64_t>(blockIdx.y) * kRouterThreads + threadIdx.x;
  const RouterCodes codes = p.codes[router];
  float dw_sa = 0, dcoef = 0;
  int32_t slot = 0;
  for (int64_t prompt = 0; prompt < p.num_prompts; ++prompt) {
    const int32_t end = end_slot(p, prompt, slot);
    if (router_of(p, prompt) == router) {
      for (int e = 0; e < codes.num_experts && c < p.d; ++e) {
        float* dw_r = params.dw_r + (router * p.num_experts + e) * p.d + c;
        *dw_r = fmaf(scratch.dlogits[prompt * p.num_experts + e],
                     scratch.activated[prompt * p.d + c], *dw_r);
      }
      const bool attends = codes.pooler == Pooler::kSelfAttention && c < p.d;
#pragma unroll 4
      for (int32_t i = slot; attends && i < end; ++i) {
        dw_sa += scratch.dw_sa[i * p.d + c];
      }
      if (c < kNumCoefs && codes.activation == Activation::kRational) {
        dcoef += scratch.dcoef[prompt * kNumCoefs + c];
      }
    }
    slot = end;
  }
  if (c < p.d) params.dw_sa[router * p.d + c] = dw_sa;
  if (c < kNumCoefs) params.dcoef[router * kNumCoefs + c] = dcoef;
}

}  // namespace milora
