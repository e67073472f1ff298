// Backward of the prompt router on a GPU. The equations stand in backward_cpu.h.
//
// head (block per prompt): dlogits, activated, the gradient dv of the pooled vector, dcoef.
// dots (block per chunk): h . w_sa and h . dv of each token. weights (block per prompt): softmax
// weights and score gradients; for max pooling the first maximum. scatter (block per chunk): dh and
// a partial of dw_sa. combine (block per router and 256 columns): adds prompts and chunks in order.
// H is read twice, dh written once; no atomics.
#include "kernels/prompt_router/router.cuh"

namespace milora {
namespace {

struct Scratch {
  float* dvector;    // [num_prompts, d]
  float* activated;  // [num_prompts, d]
  float* dlogits;    // [num_prompts, num_experts]
  float* dcoef;      // [num_prompts, kNumCoefs]
  float* scores;     // [num_tokens] h . w_sa, then softmax weight
  float* dots;       // [num_tokens] h . dv, then gradient of the score
  float* dw_sa;      // [max_chunks, d]
  int32_t* argmax;   // [num_prompts, d]
};

__global__ void __launch_bounds__(kRouterThreads)
    head_backward_kernel(PromptRouterBackwardParams params, Scratch scratch) {
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

template <class T>
__global__ void __launch_bounds__(kRouterThreads)
    dots_kernel(PromptRouterParams p, Scratch scratch) {
  const Chunk chunk = chunk_of_slot(p, static_cast<int32_t>(blockIdx.x));
  if (chunk.prompt < 0 || p.codes[chunk.router].pooler != Pooler::kSelfAttention) return;
  for (int32_t t = chunk.begin + threadIdx.x / kWarp; t < chunk.end; t += kRouterWarps) {
    const T* h = static_cast<const T*>(p.h) + t * p.h_stride;
    const float score = warp_dot(h, p.w_sa + chunk.router * p.d, p.d);
    const float dot = warp_dot(h, scratch.dvector + chunk.prompt * p.d, p.d);
    if (threadIdx.x % kWarp == 0) {
      scratch.scores[t] = score;
      scratch.dots[t] = dot;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kRouterThreads)
    weights_kernel(PromptRouterParams p, Scratch scratch) {
  __shared__ float shared[kRouterWarps];
  const int64_t prompt = blockIdx.x;
  const int32_t router = router_of(p, prompt);
  if (router < 0) return;
  const Pooler pooler = p.codes[router].pooler;
  int32_t begin, end;
  span_of(p, prompt, &begin, &end);
  if (pooler == Pooler::kMax) {
    for (int64_t c = threadIdx.x; c < p.d; c += kRouterThreads) {
      const float best = p.pooled[prompt * p.d + c];
      int32_t found = -1;
      for (int32_t t = begin; t < end && found < 0; ++t) {
        const float value = to_float(static_cast<const T*>(p.h)[t * p.h_stride + c]);
        if (value == best || value != value) found = t;
      }
      scratch.argmax[prompt * p.d + c] = found;
    }
  }
  if (pooler != Pooler::kSelfAttention || begin == end) return;

  float top = scratch.scores[begin];
  for (int32_t t = begin; t < end; ++t) top = max_or_nan(top, scratch.scores[t]);
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

template <class T>
__global__ void __launch_bounds__(kRouterThreads)
    scatter_kernel(PromptRouterBackwardParams params, Scratch scratch) {
  const PromptRouterParams& p = params.forward;
  const auto slot = static_cast<int32_t>(blockIdx.x);
  const Chunk chunk = chunk_of_slot(p, slot);
  if (chunk.prompt < 0) return;
  const Pooler pooler = p.codes[chunk.router].pooler;
  int32_t span_begin, span_end;
  span_of(p, chunk.prompt, &span_begin, &span_end);
  const float length = static_cast<float>(span_end - span_begin);
  for (int64_t c = threadIdx.x; c < p.d; c += kRouterThreads) {
    const float dvector = scratch.dvector[chunk.prompt * p.d + c];
    const float w_sa = p.w_sa[chunk.router * p.d + c];
    const int32_t first_maximum =
        pooler == Pooler::kMax ? scratch.argmax[chunk.prompt * p.d + c] : -1;
    float sum = 0;
    for (int32_t t = chunk.begin; t < chunk.end; ++t) {
      float grad = 0;
      switch (pooler) {
        case Pooler::kSelfAttention:
          grad = fmaf(scratch.dots[t], w_sa, scratch.scores[t] * dvector);
          sum =
              fmaf(scratch.dots[t], to_float(static_cast<const T*>(p.h)[t * p.h_stride + c]), sum);
          break;
        case Pooler::kMean:
          grad = dvector / length;
          break;
        case Pooler::kMax:
          grad = t == first_maximum ? dvector : 0.0f;
          break;
        case Pooler::kLast:
          grad = t == span_end - 1 ? dvector : 0.0f;
          break;
      }
      static_cast<T*>(params.dh)[t * p.d + c] = from_float<T>(grad);
    }
    scratch.dw_sa[slot * p.d + c] = sum;
  }
}

__global__ void __launch_bounds__(kRouterThreads)
    combine_kernel(PromptRouterBackwardParams params, Scratch scratch) {
  const PromptRouterParams& p = params.forward;
  const auto router = static_cast<int32_t>(blockIdx.x);
  const int64_t c = static_cast<int64_t>(blockIdx.y) * kRouterThreads + threadIdx.x;
  const RouterCodes codes = p.codes[router];
  int32_t slot = 0;
  for (int64_t prompt = 0; prompt < p.num_prompts; ++prompt) {
    const int32_t count = chunks_of(p, prompt);
    if (router_of(p, prompt) == router) {
      for (int e = 0; e < codes.num_experts && c < p.d; ++e) {
        float* dw_r = params.dw_r + (router * p.num_experts + e) * p.d + c;
        *dw_r = fmaf(scratch.dlogits[prompt * p.num_experts + e],
                     scratch.activated[prompt * p.d + c], *dw_r);
      }
      for (int32_t i = slot; codes.pooler == Pooler::kSelfAttention && i < slot + count; ++i) {
        if (c < p.d) params.dw_sa[router * p.d + c] += scratch.dw_sa[i * p.d + c];
      }
      if (c < kNumCoefs && codes.activation == Activation::kRational) {
        params.dcoef[router * kNumCoefs + c] += scratch.dcoef[prompt * kNumCoefs + c];
      }
    }
    slot += count;
  }
}

}  // namespace

int64_t prompt_router_backward_cuda_scratch(const PromptRouterParams& p) {
  const int64_t floats = p.num_prompts * (2 * p.d + p.num_experts + kNumCoefs) + 2 * p.num_tokens +
                         max_chunks(p) * p.d;
  return floats * static_cast<int64_t>(sizeof(float)) +
         p.num_prompts * p.d * static_cast<int64_t>(sizeof(int32_t));
}

int prompt_router_backward_cuda(const PromptRouterBackwardParams& params, void* memory,
                                void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const PromptRouterParams& p = params.forward;
  Scratch scratch{};
  scratch.dvector = static_cast<float*>(memory);
  scratch.activated = scratch.dvector + p.num_prompts * p.d;
  scratch.dlogits = scratch.activated + p.num_prompts * p.d;
  scratch.dcoef = scratch.dlogits + p.num_prompts * p.num_experts;
  scratch.scores = scratch.dcoef + p.num_prompts * kNumCoefs;
  scratch.dots = scratch.scores + p.num_tokens;
  scratch.dw_sa = scratch.dots + p.num_tokens;
  scratch.argmax = reinterpret_cast<int32_t*>(scratch.dw_sa + max_chunks(p) * p.d);
  const auto prompts = static_cast<unsigned>(p.num_prompts);
  const auto chunks = static_cast<unsigned>(max_chunks(p));
  // At least one block of columns: dcoef has 12 even where d is smaller.
  const dim3 combine_grid(static_cast<unsigned>(p.num_routers),
                          static_cast<unsigned>((p.d + kRouterThreads - 1) / kRouterThreads));
  return dispatch_device_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    head_backward_kernel<<<prompts, kRouterThreads, 0, stream>>>(params, scratch);
    dots_kernel<T><<<chunks, kRouterThreads, 0, stream>>>(p, scratch);
    weights_kernel<T><<<prompts, kRouterThreads, 0, stream>>>(p, scratch);
    scatter_kernel<T><<<chunks, kRouterThreads, 0, stream>>>(params, scratch);
    combine_kernel<<<combine_grid, kRouterThreads, 0, stream>>>(params, scratch);
  });
}

}  // namespace milora
