// Prompt router, second launch: a prompt's partials -> pooled -> probabilities and gates
//                                                                       [MiLoRA, eq. 2, 3, 6, 8]
//   pooled = sum_i exp(max_i - top) vector_i / sum_i exp(max_i - top) sum_i,
//   p = softmax(W_r g(norm(pooled))),  gates = top_k of p
//
// A block owns 256 columns of a prompt, a thread one of them: it adds the partials in the order of
// the chunks. The block that is the last of its prompt to be done (a counter, which the first
// launch has set to 0) goes on with the head: the norm, then each thread activates its columns and
// multiplies them with up to 8 experts' rows at once. Which block that is changes no sum's order.
//
// Bytes: the partials (4 d a chunk), and W_r (4 d num_experts) once a prompt. 128 chunks of 4096:
// 2 MB over 16 blocks.
#pragma once

#include "kernels/prompt_router/pool.cuh"

namespace milora {

constexpr int kHeadExperts = 8;  // logits of a pass; blocks of transformers have 4 to 11 linears

struct HeadShared {
  float factors[kRouterThreads];  // of 256 chunks at a time
  float sums[kRouterThreads];
  float scratch[kRouterWarps];
  int32_t counts[kRouterWarps];
  float logits[kMaxExperts], probs[kMaxExperts], gates[kMaxExperts];
  bool last;
};

// Column c of the pooled vector from partials [first, last); 0 for an empty prompt.
__device__ __forceinline__ float combine_column(const PromptRouterParams& p,
                                                const RouterPartials& partials, Pooler pooler,
                                                int32_t first, int32_t last, int64_t c,
                                                HeadShared& shared) {
  if (first >= last) return 0;
  const bool own = c < p.d;
  const float* column = partials.vectors + c;
  if (pooler == Pooler::kLast) return own ? column[(last - 1) * p.d] : 0.0f;
  if (pooler == Pooler::kMax) {
    float value = own ? column[first * p.d] : 0.0f;
    for (int32_t i = first + 1; own && i < last; ++i) {
      value = larger_or_nan(value, column[i * p.d]);
    }
    return value;
  }
  float top = -INFINITY;
  for (int32_t i = first + threadIdx.x; i < last; i += kRouterThreads) {
    top = larger_or_nan(top, partials.maxima[i]);
  }
  top = block_max(top, shared.scratch);
  float value = 0, total = 0;
  for (int32_t base = first; base < last; base += kRouterThreads) {
    const int32_t mine = base + static_cast<int32_t>(threadIdx.x);
    __syncthreads();
    if (mine < last) {
      shared.factors[threadIdx.x] = expf(partials.maxima[mine] - top);
      shared.sums[threadIdx.x] = partials.sums[mine];
    }
    __syncthreads();
    const int32_t count = min(last - base, kRouterThreads);
#pragma unroll 8
    for (int32_t i = 0; i < count; ++i) {
      const float part = own ? column[(base + i) * p.d] : 0.0f;
      value = fmaf(shared.factors[i], part, value);
      total = fmaf(shared.factors[i], shared.sums[i], total);
    }
  }
  return value / total;
}

// logits[e] = W_r[e] . g(factor pooled) of all experts.
__device__ __forceinline__ void head_logits(const PromptRouterParams& p, const RouterCodes& codes,
                                            const RouterWeights& weights, int num_experts,
                                            const float* pooled, HeadShared& shared) {
  const float factor = rms_factor(codes, pooled, p.d, shared.scratch);
  for (int base = 0; base < num_experts; base += kHeadExperts) {
    float sums[kHeadExperts] = {};
    for (int64_t c = threadIdx.x; c < p.d; c += kRouterThreads) {
      const float g = activate(codes.activation, factor * pooled[c], weights.coef);
#pragma unroll
      for (int e = 0; e < kHeadExperts; ++e) {
        if (base + e < num_experts) {
          sums[e] = fmaf(weights.w_r[(base + e) * weights.w_r_stride + c], g, sums[e]);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kHeadExperts; ++e) {
      const float sum = block_sum<kRouterThreads>(sums[e], shared.scratch);
      if (threadIdx.x == 0 && base + e < num_experts) shared.logits[base + e] = sum;
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kRouterThreads, 2)
    router_head_kernel(const __grid_constant__ PromptRouterParams p, RouterPartials partials) {
  __shared__ HeadShared shared;
  const int64_t prompt = blockIdx.x;
  const int64_t c = static_cast<int64_t>(blockIdx.y) * kRouterThreads + threadIdx.x;
  const int32_t router = router_of(p, prompt);
  float* pooled = p.pooled + prompt * p.d;
  float* probs = p.probs + prompt * p.num_experts;
  float* gates = p.gates + prompt * p.num_experts;
  if (router < 0) {
    if (c < p.d) pooled[c] = 0;
    for (int64_t e = c; e < p.num_experts && blockIdx.y == 0; e += kRouterThreads) {
      probs[e] = gates[e] = 0;
    }
    return;
  }
  const RouterCodes codes = p.codes[router];

  // Phase 1: this block's columns of the pooled vector.
  const int32_t first = first_slot(p, prompt, shared.counts);
  const int32_t last = end_slot(p, prompt, first);
  const float value = combine_column(p, partials, codes.pooler, first, last, c, shared);
  if (c < p.d) pooled[c] = value;

  // Phase 2: the last block of the prompt to come here goes on; it sees what the others wrote.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const int32_t before = atomicAdd(&partials.arrived[prompt], 1);
    shared.last = before == static_cast<int32_t>(gridDim.y) - 1;
  }
  __syncthreads();
  if (!shared.last) return;
  __threadfence();

  // Phase 3: the head.
  const int num_experts = codes.num_experts;  // in [1, p.num_experts], says router_of
  head_logits(p, codes, router_weights(p, router), num_experts, pooled, shared);
  if (threadIdx.x == 0) {
    softmax(shared.logits, num_experts, shared.probs);
    make_gates(shared.probs, codes, shared.gates);
  }
  __syncthreads();
  for (int64_t e = threadIdx.x; e < p.num_experts; e += kRouterThreads) {
    probs[e] = e < num_experts ? shared.probs[e] : 0.0f;
    gates[e] = e < num_experts ? shared.gates[e] : 0.0f;
  }
}

}  // namespace milora
