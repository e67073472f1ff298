// Backward of the prompt router on a CPU.
//
//   dlogits from (dprobs, dgates);  dg = W_r^T dlogits;  dW_r = dlogits g^T
//   dv = gradient of pooled, through the activation (dcoef) and the norm, plus dpooled
//   self-attention:  ds_t = a_t (h_t . dv - pooled . dv),  dh_t = a_t dv + ds_t w_sa,
//                    dw_sa = sum_t ds_t h_t
//
// H is read twice (dots, then scatter for dw_sa) and dh written once; sums over tokens go by chunk
// and are added in order.
#pragma once

#include "kernels/prompt_router/forward_cpu.h"

namespace milora::MILORA_ISA {
namespace {

inline float dot(const float* a, const float* b, int64_t d) {
  const float* rows[1] = {a};
  float out;
  dot_rows(rows, 1, b, d, 1, d, &out, 1);
  return out;
}

void head_backward_prompt(const RouterBackwardWork& work, int64_t prompt) {
  const PromptRouterParams& p = work.p.forward;
  const int64_t router = p.router_of[prompt];
  if (router < 0) return;
  const RouterCodes& codes = p.codes[router];
  const float* coef = p.coef + router * kNumCoefs;
  const float* w_r = p.w_r + router * p.num_experts * p.d;
  const float* pooled = p.pooled + prompt * p.d;
  float* dlogits = work.dlogits + prompt * p.num_experts;
  float* activated = work.activated + prompt * p.d;
  float* dvector = work.dvector + prompt * p.d;
  float* dcoef = work.dcoef + prompt * kNumCoefs;
  gates_backward(p.probs + prompt * p.num_experts, codes, work.p.dprobs + prompt * p.num_experts,
                 work.p.dgates + prompt * p.num_experts, dlogits);

  const float factor = rms_factor(codes, pooled, p.d);
  axpy_stream<1, FmaStep<float>>(
      dlogits, codes.num_experts, codes.num_experts, w_r, p.d, p.d,
      [&](int64_t, int64_t c, Vec acc, int64_t n) { store_upto(dvector + c, acc, n); });
  for (int i = 0; i < kNumCoefs; ++i) dcoef[i] = 0;
  constexpr int64_t kBlock = 64;  // coefficients' sums in two levels: d terms in one would drift
  for (int64_t c0 = 0; c0 < p.d; c0 += kBlock) {
    float partial[kNumCoefs] = {};
    const int64_t c1 = p.d - c0 < kBlock ? p.d : c0 + kBlock;
    for (int64_t c = c0; c < c1; ++c) {
      const float x = factor * pooled[c];
      activated[c] = activate(codes.activation, x, coef);
      dvector[c] = activate_backward(codes.activation, x, coef, dvector[c], partial);
    }
    for (int i = 0; i < kNumCoefs; ++i) dcoef[i] += partial[i];
  }
  if (codes.norm == RouterNorm::kRms) {
    // x = f pooled with f = (mean pooled^2 + eps)^-1/2
    const float mean = factor * dot(dvector, pooled, p.d) / static_cast<float>(p.d);
    for (int64_t c = 0; c < p.d; ++c) {
      dvector[c] = factor * (dvector[c] - factor * pooled[c] * mean);
    }
  }
  for (int64_t c = 0; c < p.d; ++c) dvector[c] += work.p.dpooled[prompt * p.d + c];
}

template <class T>
void dots_chunk(const RouterBackwardWork& work, int64_t index) {
  const PromptRouterParams& p = work.p.forward;
  const RouterChunk& chunk = work.chunks[index];
  const int64_t router = p.router_of[chunk.prompt];
  if (p.codes[router].pooler != Pooler::kSelfAttention) return;
  const T* h = static_cast<const T*>(p.h) + chunk.begin * p.h_stride;
  const int64_t n = chunk.end - chunk.begin;
  const float* w_sa = p.w_sa + router * p.d;
  const float* dvector = work.dvector + chunk.prompt * p.d;
  dot_rows(&w_sa, 1, h, p.h_stride, n, p.d, work.scores + chunk.begin, n);
  dot_rows(&dvector, 1, h, p.h_stride, n, p.d, work.dots + chunk.begin, n);
}

// Scores become softmax weights, dots become gradients of the scores; max: the first maximum.
template <class T>
void weights_prompt(const RouterBackwardWork& work, int64_t prompt) {
  const PromptRouterParams& p = work.p.forward;
  const int64_t router = p.router_of[prompt];
  const int64_t begin = p.spans[2 * prompt], end = p.spans[2 * prompt + 1];
  if (router < 0 || begin == end) return;
  if (p.codes[router].pooler == Pooler::kMax) {
    const float* pooled = p.pooled + prompt * p.d;
    int32_t* argmax = work.argmax + prompt * p.d;
    for (int64_t c = 0; c < p.d; ++c) argmax[c] = -1;
    for (int64_t t = begin; t < end; ++t) {
      const T* row = static_cast<const T*>(p.h) + t * p.h_stride;
      for (int64_t c = 0; c < p.d; c += kLanes) {
        const int64_t n = p.d - c < kLanes ? p.d - c : kLanes;
        alignas(64) float values[kLanes];
        store(values, load_upto(row + c, n));
        for (int64_t i = 0; i < n; ++i) {
          const bool hit = values[i] == pooled[c + i] || (values[i] != values[i]);
          if (hit && argmax[c + i] < 0) argmax[c + i] = static_cast<int32_t>(t);
        }
      }
    }
    return;
  }
  if (p.codes[router].pooler != Pooler::kSelfAttention) return;
  float top = work.scores[begin], total = 0;
  for (int64_t t = begin; t < end; ++t) top = max_or_nan(top, work.scores[t]);
  for (int64_t t = begin; t < end; ++t) {
    work.scores[t] = expf(work.scores[t] - top);
    total += work.scores[t];
  }
  float mean = 0;  // pooled . dvector
  for (int64_t t = begin; t < end; ++t) {
    work.scores[t] /= total;
    mean += work.scores[t] * work.dots[t];
  }
  for (int64_t t = begin; t < end; ++t) {
    work.dots[t] = work.scores[t] * (work.dots[t] - mean);
  }
}

template <class T>
void scatter_chunk(const RouterBackwardWork& work, int64_t index) {
  const PromptRouterParams& p = work.p.forward;
  const RouterChunk& chunk = work.chunks[index];
  const int64_t router = p.router_of[chunk.prompt];
  const int64_t n = chunk.end - chunk.begin;
  const int64_t span_end = p.spans[2 * chunk.prompt + 1];
  const float length = static_cast<float>(span_end - p.spans[2 * chunk.prompt]);
  const float* dvector = work.dvector + chunk.prompt * p.d;
  const float* w_sa = p.w_sa + router * p.d;
  const int32_t* argmax = work.argmax + chunk.prompt * p.d;
  const Pooler pooler = p.codes[router].pooler;
  for (int64_t t = chunk.begin; t < chunk.end; ++t) {
    T* dh = static_cast<T*>(work.p.dh) + t * p.d;
    if (pooler == Pooler::kLast && t != span_end - 1) continue;
    float weight = 1.0f, dscore = 0.0f;
    if (pooler == Pooler::kMean) weight = 1.0f / length;
    if (pooler == Pooler::kSelfAttention) {
      weight = work.scores[t];
      dscore = work.dots[t];
    }
    for (int64_t c = 0; c < p.d; c += kLanes) {
      const int64_t count = p.d - c < kLanes ? p.d - c : kLanes;
      Vec grad = mul(set1(weight), load_upto(dvector + c, count));
      if (pooler == Pooler::kSelfAttention) {
        grad = fma(set1(dscore), load_upto(w_sa + c, count), grad);
      }
      if (pooler == Pooler::kMax) {
        alignas(64) float values[kLanes];
        store(values, grad);
        for (int64_t i = 0; i < count; ++i) values[i] = argmax[c + i] == t ? values[i] : 0.0f;
        grad = load(values);
      }
      store_upto(dh + c, grad, count);
    }
  }
  if (pooler == Pooler::kSelfAttention) {
    const T* h = static_cast<const T*>(p.h) + chunk.begin * p.h_stride;
    axpy_stream<1, FmaStep<T>>(work.dots + chunk.begin, n, n, h, p.h_stride, p.d,
                               [&](int64_t, int64_t c, Vec acc, int64_t m) {
                                 store_upto(work.dw_sa + index * p.d + c, acc, m);
                               });
  }
}

inline void add_scaled(float factor, const float* from, int64_t d, float* to) {
  for (int64_t c = 0; c < d; c += kLanes) {
    const int64_t n = d - c < kLanes ? d - c : kLanes;
    store_upto(to + c, fma(set1(factor), load_upto(from + c, n), load_upto(to + c, n)), n);
  }
}

// A router's gradients: its prompts in order, each prompt's chunks in order.
void combine_router(const RouterBackwardWork& work, int64_t router) {
  const PromptRouterParams& p = work.p.forward;
  const RouterCodes& codes = p.codes[router];
  for (int64_t prompt = 0; prompt < p.num_prompts; ++prompt) {
    if (p.router_of[prompt] != router) continue;
    for (int e = 0; e < codes.num_experts; ++e) {
      add_scaled(work.dlogits[prompt * p.num_experts + e], work.activated + prompt * p.d, p.d,
                 work.p.dw_r + (router * p.num_experts + e) * p.d);
    }
    if (codes.activation == Activation::kRational) {
      add_scaled(1.0f, work.dcoef + prompt * kNumCoefs, kNumCoefs,
                 work.p.dcoef + router * kNumCoefs);
    }
    if (codes.pooler != Pooler::kSelfAttention) continue;
    for (int64_t i = work.first_chunk[prompt]; i < work.first_chunk[prompt + 1]; ++i) {
      add_scaled(1.0f, work.dw_sa + i * p.d, p.d, work.p.dw_sa + router * p.d);
    }
  }
}

void head_backward(const RouterBackwardWork& work, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) head_backward_prompt(work, i);
}
void dots(const RouterBackwardWork& work, int64_t begin, int64_t end) {
  MILORA_DISPATCH_DTYPE(work.p.forward.dtype, T, {
    for (int64_t i = begin; i < end; ++i) dots_chunk<T>(work, i);
  })
}
void weights(const RouterBackwardWork& work, int64_t begin, int64_t end) {
  MILORA_DISPATCH_DTYPE(work.p.forward.dtype, T, {
    for (int64_t i = begin; i < end; ++i) weights_prompt<T>(work, i);
  })
}
void scatter(const RouterBackwardWork& work, int64_t begin, int64_t end) {
  MILORA_DISPATCH_DTYPE(work.p.forward.dtype, T, {
    for (int64_t i = begin; i < end; ++i) scatter_chunk<T>(work, i);
  })
}
void combine(const RouterBackwardWork& work, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) combine_router(work, i);
}

}  // namespace
}  // namespace milora::MILORA_ISA
