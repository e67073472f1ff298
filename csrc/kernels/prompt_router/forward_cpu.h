// Forward of the prompt router on a CPU.                              [MiLoRA, eq. 2, 3, 6, 8]
//
//   u_t = h_t . w_sa,  a = softmax(u) over the span,  pooled = sum_t a_t h_t   (or mean, max, last)
//   p = softmax(W_r g(norm(pooled))),  gates = top_k of p
//
// Data flow: a chunk of 32 tokens is read for its scores, in the order of memory, and, still in L2,
// for its weighted sum; the partials are rescaled to the prompt's maximum and added in order. H is
// read from memory once: bytes = num_tokens * d * itemsize, 4 FLOPs an element.
#pragma once

#include "kernels/cpu/axpy.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/prompt_router/cpu.h"
#include "kernels/prompt_router/math.h"
#include "kernels/prompt_router/weights.h"

namespace milora::MILORA_ISA {
namespace {

// The larger of two, NaN if either is (as torch.amax).
inline float max_or_nan(float a, float b) { return b > a || b != b ? (a != a ? a : b) : a; }

template <class T>
void pool_chunk(const RouterWork& work, int64_t index) {
  const RouterChunk& chunk = work.chunks[index];
  const PromptRouterParams& p = work.p;
  const int64_t router = p.router_of[chunk.prompt];
  const Pooler pooler = p.codes[router].pooler;
  const int64_t n = chunk.end - chunk.begin;
  const T* h = static_cast<const T*>(p.h) + chunk.begin * p.h_stride;
  float* vector = work.vectors + index * p.d;
  const auto weighted_sum = [&](const float* weights) {
    axpy_stream<1, FmaStep<T>>(weights, n, n, h, p.h_stride, p.d,
                               [&](int64_t, int64_t c, Vec acc, int64_t count)
                                   MILORA_ALWAYS_INLINE { store_upto(vector + c, acc, count); });
  };

  float weights[kRouterChunk];
  switch (pooler) {
    case Pooler::kSelfAttention: {
      const float* w_sa = router_weights(p, router).w_sa;
      dot_rows(&w_sa, 1, h, p.h_stride, n, p.d, weights, n);
      float top = weights[0];
      for (int64_t t = 1; t < n; ++t) top = max_or_nan(top, weights[t]);
      float total = 0;
      for (int64_t t = 0; t < n; ++t) {
        weights[t] = expf(weights[t] - top);
        total += weights[t];
      }
      work.maxima[index] = top;
      work.sums[index] = total;
      weighted_sum(weights);
      break;
    }
    case Pooler::kMean:
      for (int64_t t = 0; t < n; ++t) weights[t] = 1.0f;
      weighted_sum(weights);
      break;
    case Pooler::kMax:
      for (int64_t t = 0; t < n; ++t) {
        const T* row = h + t * p.h_stride;
        for (int64_t c = 0; c < p.d; c += kLanes) {
          const int64_t count = p.d - c < kLanes ? p.d - c : kLanes;
          const Vec value = load_upto(row + c, count);
          const Vec best = t == 0 ? value : max_or_nan(load_upto(vector + c, count), value);
          store_upto(vector + c, best, count);
        }
      }
      break;
    case Pooler::kLast: {
      // Only the last chunk counts; head reads no other.
      const T* row = h + (n - 1) * p.h_stride;
      for (int64_t c = 0; c < p.d; c += kLanes) {
        const int64_t count = p.d - c < kLanes ? p.d - c : kLanes;
        store_upto(vector + c, load_upto(row + c, count), count);
      }
      break;
    }
  }
}

// pooled = the prompt's partials, combined in order.
inline void combine_partials(const RouterWork& work, int64_t prompt, Pooler pooler, float* pooled) {
  const PromptRouterParams& p = work.p;
  const int64_t first = work.first_chunk[prompt];
  const int64_t last = work.first_chunk[prompt + 1];
  for (int64_t c = 0; c < p.d; ++c) pooled[c] = 0;
  if (first == last) return;  // an empty span pools to zero
  if (pooler == Pooler::kLast || pooler == Pooler::kMax) {
    for (int64_t i = pooler == Pooler::kLast ? last - 1 : first; i < last; ++i) {
      const float* vector = work.vectors + i * p.d;
      const bool start = i == first || pooler == Pooler::kLast;
      for (int64_t c = 0; c < p.d; ++c) {
        pooled[c] = start ? vector[c] : max_or_nan(pooled[c], vector[c]);
      }
    }
    return;
  }
  float top = 0, total = 0;
  if (pooler == Pooler::kSelfAttention) {
    top = work.maxima[first];
    for (int64_t i = first + 1; i < last; ++i) top = max_or_nan(top, work.maxima[i]);
  } else {
    total = static_cast<float>(p.spans[2 * prompt + 1] - p.spans[2 * prompt]);
  }
  for (int64_t i = first; i < last; ++i) {
    float factor = 1.0f;
    if (pooler == Pooler::kSelfAttention) {
      factor = expf(work.maxima[i] - top);
      total += factor * work.sums[i];
    }
    const float* vector = work.vectors + i * p.d;
    for (int64_t c = 0; c < p.d; c += kLanes) {
      const int64_t count = p.d - c < kLanes ? p.d - c : kLanes;
      store_upto(pooled + c,
                 fma(set1(factor), load_upto(vector + c, count), load_upto(pooled + c, count)),
                 count);
    }
  }
  for (int64_t c = 0; c < p.d; ++c) pooled[c] /= total;
}

inline float rms_factor(const RouterCodes& codes, const float* pooled, int64_t d) {
  if (codes.norm == RouterNorm::kNone) return 1.0f;
  const float* rows[1] = {pooled};
  float squares;
  dot_rows(rows, 1, pooled, d, 1, d, &squares, 1);
  return 1.0f / sqrtf(squares / static_cast<float>(d) + kRmsEpsilon);
}

// The rational activation of math.h, a vector at a time: polynomials in x up to |x| = 1, in 1/x
// beyond, where the coefficients go backwards.
inline Vec rational(Vec x, const float* a, const float* b) {
  const Vec one = set1(1.0f), size = abs(x);
  const auto pick = [&](Vec inside, Vec outside)
                        MILORA_ALWAYS_INLINE { return select_le(size, one, inside, outside); };
  const Vec u = pick(x, div(one, x));
  Vec p = pick(set1(a[6]), set1(a[0]));
  for (int i = 5; i >= 0; --i) p = fma(p, u, pick(set1(a[i]), set1(a[6 - i])));
  Vec q = pick(set1(b[4]), set1(b[0]));
  for (int i = 3; i >= 0; --i) q = fma(q, u, pick(set1(b[i]), set1(b[4 - i])));
  const Vec u2 = mul(u, u);
  const Vec low = pick(one, mul(abs(u), mul(u2, u2)));
  const Vec high = abs(pick(mul(q, u), q));
  return mul(pick(one, size), div(p, add(low, high)));
}

// out[c] = g(factor x[c]) for n columns.
inline void activate_row(Activation kind, const float* coef, const float* x, float factor,
                         int64_t n, float* out) {
  if (kind == Activation::kGelu) {
    for (int64_t c = 0; c < n; ++c) out[c] = activate(kind, factor * x[c], coef);
    return;
  }
  for (int64_t c = 0; c < n; c += kLanes) {
    const int64_t count = n - c < kLanes ? n - c : kLanes;
    const Vec scaled = mul(set1(factor), load_upto(x + c, count));
    const bool relu = kind == Activation::kRelu;
    store_upto(out + c, relu ? max_or_nan(zero(), scaled) : rational(scaled, coef, coef + 7),
               count);
  }
}

void head_prompt(const RouterWork& work, int64_t prompt) {
  const PromptRouterParams& p = work.p;
  float* pooled = work.p.pooled + prompt * p.d;
  float* probs = p.probs + prompt * p.num_experts;
  float* gates = p.gates + prompt * p.num_experts;
  for (int64_t i = 0; i < p.num_experts; ++i) probs[i] = gates[i] = 0;
  const int64_t router = p.router_of[prompt];
  if (router < 0) {
    for (int64_t c = 0; c < p.d; ++c) pooled[c] = 0;
    return;
  }
  const RouterCodes& codes = p.codes[router];
  combine_partials(work, prompt, codes.pooler, pooled);

  // Activate a block of columns at a time and take it through every expert's row of W_r.
  const float factor = rms_factor(codes, pooled, p.d);
  const RouterWeights weights = router_weights(p, router);
  constexpr int64_t kBlock = 512;
  float logits[kMaxExperts] = {};
  for (int64_t c0 = 0; c0 < p.d; c0 += kBlock) {
    const int64_t n = p.d - c0 < kBlock ? p.d - c0 : kBlock;
    float block[kBlock], partial[kMaxExperts];
    activate_row(codes.activation, weights.coef, pooled + c0, factor, n, block);
    const float* rows[1] = {block};
    dot_rows(rows, 1, weights.w_r + c0, weights.w_r_stride, codes.num_experts, n, partial,
             codes.num_experts);
    for (int e = 0; e < codes.num_experts; ++e) logits[e] += partial[e];
  }
  softmax(logits, codes.num_experts, probs);
  make_gates(probs, codes, gates);
}

void pool(const RouterWork& work, int64_t begin, int64_t end) {
  MILORA_DISPATCH_DTYPE(work.p.dtype, T, {
    for (int64_t i = begin; i < end; ++i) pool_chunk<T>(work, i);
  })
}

void head(const RouterWork& work, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) head_prompt(work, i);
}

}  // namespace
}  // namespace milora::MILORA_ISA
