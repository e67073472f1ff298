// Forward of the prompt router on a GPU.                              [MiLoRA, eq. 2, 3, 6, 8]
//
// pool_kernel: a block per chunk of 32 tokens; a warp per token scores it (h . w_sa), then a thread
// per column adds the weighted rows, which the second time come from L1 or L2: memory sees H
// once. It leaves a partial (max, sum, vector) per chunk. head_kernel: a block per prompt combines
// its partials in order, activates, and a warp per expert computes a logit.
// Bytes: num_tokens * d * itemsize, plus a 32nd of that for the partials; 4 FLOPs an element.
#include "kernels/prompt_router/router.cuh"

namespace milora {
namespace {

struct Partials {
  float* maxima;     // [max_chunks]
  float* sums;       // [max_chunks]
  float* vectors;    // [max_chunks, d]
  float* activated;  // [num_prompts, d]
};

template <class T>
__global__ void __launch_bounds__(kRouterThreads)
    pool_kernel(PromptRouterParams p, Partials partials) {
  __shared__ float weights[kRouterChunk];
  const auto slot = static_cast<int32_t>(blockIdx.x);
  const Chunk chunk = chunk_of_slot(p, slot);
  if (chunk.prompt < 0) return;
  const Pooler pooler = p.codes[chunk.router].pooler;
  const int n = chunk.end - chunk.begin;
  const T* h = static_cast<const T*>(p.h) + chunk.begin * p.h_stride;
  float* vector = partials.vectors + slot * p.d;

  if (pooler == Pooler::kMax || pooler == Pooler::kLast) {
    for (int64_t c = threadIdx.x; c < p.d; c += kRouterThreads) {
      float best = to_float(h[(n - 1) * p.h_stride + c]);
      for (int t = 0; pooler == Pooler::kMax && t < n; ++t) {
        best = max_or_nan(best, to_float(h[t * p.h_stride + c]));
      }
      vector[c] = best;
    }
    return;
  }

  // Scores, then weights relative to the chunk's maximum.
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int t = warp; t < n; t += kRouterWarps) {
    const bool attend = pooler == Pooler::kSelfAttention;
    const float score =
        attend ? warp_dot(h + t * p.h_stride, router_weights(p, chunk.router).w_sa, p.d) : 0.0f;
    if (lane == 0) weights[t] = score;
  }
  __syncthreads();
  float top = weights[0], total = 0;
  for (int t = 1; t < n; ++t) top = max_or_nan(top, weights[t]);
  for (int t = 0; t < n; ++t) total += expf(weights[t] - top);
  __syncthreads();
  if (threadIdx.x < n) weights[threadIdx.x] = expf(weights[threadIdx.x] - top);
  if (threadIdx.x == 0) {
    partials.maxima[slot] = top;
    partials.sums[slot] = total;
  }
  __syncthreads();

  for (int64_t c = threadIdx.x; c < p.d; c += kRouterThreads) {
    float sum = 0;
    for (int t = 0; t < n; ++t) sum = fmaf(weights[t], to_float(h[t * p.h_stride + c]), sum);
    vector[c] = sum;
  }
}

__global__ void __launch_bounds__(kRouterThreads)
    head_kernel(PromptRouterParams p, Partials partials) {
  __shared__ float logits[kMaxExperts];
  __shared__ float shared[kRouterWarps];
  const int64_t prompt = blockIdx.x;
  const int32_t router = router_of(p, prompt);
  float* pooled = p.pooled + prompt * p.d;
  float* probs = p.probs + prompt * p.num_experts;
  float* gates = p.gates + prompt * p.num_experts;
  for (int64_t e = threadIdx.x; e < p.num_experts; e += kRouterThreads) probs[e] = gates[e] = 0;
  if (router < 0) {
    for (int64_t c = threadIdx.x; c < p.d; c += kRouterThreads) pooled[c] = 0;
    return;
  }
  const RouterCodes codes = p.codes[router];
  const int num_experts = min(codes.num_experts, static_cast<int>(p.num_experts));

  // Phase 1: the partials, in order. A mean is a softmax over equal scores.
  const int32_t first = first_slot(p, prompt), last = first + chunks_of(p, prompt);
  const bool selects = codes.pooler == Pooler::kMax || codes.pooler == Pooler::kLast;
  float top = 0, total = 0;
  if (!selects && first < last) {
    top = partials.maxima[first];
    for (int32_t i = first; i < last; ++i) top = max_or_nan(top, partials.maxima[i]);
    for (int32_t i = first; i < last; ++i) {
      total += expf(partials.maxima[i] - top) * partials.sums[i];
    }
  }
  for (int64_t c = threadIdx.x; c < p.d; c += kRouterThreads) {
    float value = 0;
    if (selects && first < last) {
      value = partials.vectors[(last - 1) * p.d + c];
      for (int32_t i = first; codes.pooler == Pooler::kMax && i < last; ++i) {
        value = max_or_nan(value, partials.vectors[i * p.d + c]);
      }
    } else if (first < last) {
      for (int32_t i = first; i < last; ++i) {
        value = fmaf(expf(partials.maxima[i] - top), partials.vectors[i * p.d + c], value);
      }
      value /= total;
    }
    pooled[c] = value;
  }
  __syncthreads();

  // Phase 2: activation and head.
  const float factor = rms_factor(codes, pooled, p.d, shared);
  const RouterWeights weights = router_weights(p, router);
  float* activated = partials.activated + prompt * p.d;
  for (int64_t c = threadIdx.x; c < p.d; c += kRouterThreads) {
    activated[c] = activate(codes.activation, factor * pooled[c], weights.coef);
  }
  __syncthreads();
  for (int e = threadIdx.x / kWarp; e < num_experts; e += kRouterWarps) {
    const float logit = warp_dot(weights.w_r + e * weights.w_r_stride, activated, p.d);
    if (threadIdx.x % kWarp == 0) logits[e] = logit;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    softmax(logits, num_experts, probs);
    make_gates(probs, codes, gates);
  }
}

}  // namespace

int64_t prompt_router_cuda_scratch(const PromptRouterParams& p) {
  return (max_chunks(p) * (p.d + 2) + p.num_prompts * p.d) * static_cast<int64_t>(sizeof(float));
}

int prompt_router_cuda(const PromptRouterParams& p, void* scratch, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const int64_t chunks = max_chunks(p);
  Partials partials{};
  partials.maxima = static_cast<float*>(scratch);
  partials.sums = partials.maxima + chunks;
  partials.vectors = partials.sums + chunks;
  partials.activated = partials.vectors + chunks * p.d;
  return dispatch_device_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    pool_kernel<T><<<static_cast<unsigned>(chunks), kRouterThreads, 0, stream>>>(p, partials);
    head_kernel<<<static_cast<unsigned>(p.num_prompts), kRouterThreads, 0, stream>>>(p, partials);
  });
}

}  // namespace milora
