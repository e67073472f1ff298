// The router's maths that needs no device feature: activations, softmax, gates, and their
// derivatives. Shared by the CPU kernels, the CUDA kernels and, through them, the tests.
#pragma once

#include <math.h>

#include "common/macros.h"
#include "kernels/prompt_router/params.h"

namespace milora {

// g(x) = P(x) / (1 + |Q(x)|), P of degree 6, Q of degree 5 without a constant     [MiLoRA, eq. 6]
//
// Beyond |x| = 1 everything is written in u = 1/x, so that nothing overflows:
//   g = |x| Pr(u) / E,   E = |u|^5 + |Qr(u)|,   Pr(u) = x^-6 P,   Qr(u) = x^-5 Q.
// Residual streams of language models hold values of 1e3 and more; x^6 would overflow at 2e6.
struct Rational {
  float value;
  float dx;
  float dcoef[kNumCoefs];
};

MILORA_HOST_DEVICE float sign_of(float x) { return x > 0 ? 1.0f : (x < 0 ? -1.0f : 0.0f); }

MILORA_HOST_DEVICE float rational_value(float x, const float* coef) {
  const float* a = coef;      // a0..a6
  const float* b = coef + 7;  // b1..b5
  if (fabsf(x) <= 1.0f) {
    const float high = a[3] + x * (a[4] + x * (a[5] + x * a[6]));
    const float p = a[0] + x * (a[1] + x * (a[2] + x * high));
    const float q = x * (b[0] + x * (b[1] + x * (b[2] + x * (b[3] + x * b[4]))));
    return p / (1.0f + fabsf(q));
  }
  const float u = 1.0f / x;
  const float low = a[3] + u * (a[2] + u * (a[1] + u * a[0]));
  const float p = a[6] + u * (a[5] + u * (a[4] + u * low));
  const float q = b[4] + u * (b[3] + u * (b[2] + u * (b[1] + u * b[0])));
  const float u2 = u * u;
  return fabsf(x) * (p / (fabsf(u) * u2 * u2 + fabsf(q)));
}

MILORA_HOST_DEVICE Rational rational_with_grad(float x, const float* coef) {
  const float* a = coef;
  const float* b = coef + 7;
  Rational r;
  if (fabsf(x) <= 1.0f) {
    float p = 0, dp = 0, q = 0, dq = 0;
    for (int j = 6; j >= 0; --j) {
      dp = dp * x + p;
      p = p * x + a[j];
    }
    for (int i = 5; i >= 0; --i) {
      dq = dq * x + q;
      q = q * x + (i > 0 ? b[i - 1] : 0.0f);
    }
    const float inverse = 1.0f / (1.0f + fabsf(q));
    const float sign = sign_of(q);
    r.value = p * inverse;
    r.dx = (dp - r.value * sign * dq) * inverse;
    float power = inverse;  // x^j / D
    for (int j = 0; j <= 6; ++j) {
      r.dcoef[j] = power;
      if (j >= 1 && j <= 5) r.dcoef[6 + j] = -r.value * sign * power;
      power *= x;
    }
    return r;
  }
  const float u = 1.0f / x;
  const float side = sign_of(x);
  float p = 0, dp = 0, q = 0, dq = 0;  // Pr, sum j a_j u^(6-j), Qr, sum i b_i u^(5-i)
  for (int j = 0; j <= 6; ++j) {
    p = p * u + a[j];
    dp = dp * u + static_cast<float>(j) * a[j];
  }
  for (int i = 1; i <= 5; ++i) {
    q = q * u + b[i - 1];
    dq = dq * u + static_cast<float>(i) * b[i - 1];
  }
  const float u2 = u * u;
  const float inverse = 1.0f / (fabsf(u) * u2 * u2 + fabsf(q));
  const float sign = sign_of(q);  // of Qr; Q itself has sign * side
  const float ratio = p * inverse;
  r.value = fabsf(x) * ratio;
  r.dx = side * (dp - ratio * sign * dq) * inverse;  // value |u| = ratio
  r.dcoef[6] = fabsf(x) * inverse;
  float power = 1.0f;  // u^(5-j)
  for (int j = 5; j >= 0; --j) {
    r.dcoef[j] = side * power * inverse;
    if (j >= 1) r.dcoef[6 + j] = -fabsf(x) * (ratio * sign * inverse) * power;
    power *= u;
  }
  return r;
}

MILORA_HOST_DEVICE float activate(Activation kind, float x, const float* coef) {
  switch (kind) {
    case Activation::kRational:
      return rational_value(x, coef);
    case Activation::kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Activation::kRelu:
      return x > 0 ? x : (x == x ? 0.0f : x);  // NaN stays NaN
  }
  return x;
}

// Value and derivative; adds dy * d(value)/d(coef) to dcoef for the rational.
MILORA_HOST_DEVICE float activate_backward(Activation kind, float x, const float* coef, float dy,
                                           float* dcoef) {
  switch (kind) {
    case Activation::kRational: {
      const Rational r = rational_with_grad(x, coef);
      for (int i = 0; i < kNumCoefs; ++i) dcoef[i] += dy * r.dcoef[i];
      return dy * r.dx;
    }
    case Activation::kGelu: {
      const float cdf = 0.5f * (1.0f + erff(x * 0.70710678118654752f));
      const float pdf = 0.39894228040143268f * expf(-0.5f * x * x);
      return dy * (cdf + x * pdf);
    }
    case Activation::kRelu:
      return x > 0 ? dy : 0.0f;
  }
  return dy;
}

// logits [n] -> probs [n], in place allowed.
MILORA_HOST_DEVICE void softmax(const float* logits, int n, float* probs) {
  float top = logits[0];
  for (int i = 1; i < n; ++i) top = fmaxf(top, logits[i]);
  float total = 0;
  for (int i = 0; i < n; ++i) {
    probs[i] = expf(logits[i] - top);
    total += probs[i];
  }
  for (int i = 0; i < n; ++i) probs[i] /= total;
}

// Bit i is set if expert i is among the top_k largest; ties go to the lower index.
MILORA_HOST_DEVICE uint64_t top_k_mask(const float* probs, int n, int top_k) {
  uint64_t mask = 0;
  for (int k = 0; k < top_k && k < n; ++k) {
    int best = -1;
    for (int i = 0; i < n; ++i) {
      if (mask >> i & 1) continue;
      if (best < 0 || probs[i] > probs[best]) best = i;
    }
    mask |= uint64_t{1} << best;
  }
  return mask;
}

// probs [n] -> gates [n]                                                    [MiLoRA, eq. 3]
MILORA_HOST_DEVICE void make_gates(const float* probs, const RouterCodes& codes, float* gates) {
  const uint64_t mask = top_k_mask(probs, codes.num_experts, codes.top_k);
  float kept = 0;
  for (int i = 0; i < codes.num_experts; ++i) {
    if (mask >> i & 1) kept += probs[i];
  }
  for (int i = 0; i < codes.num_experts; ++i) {
    float gate = probs[i];
    if (codes.gate == GateKind::kRenormalized) gate /= kept;
    if (codes.gate == GateKind::kHard) gate = 1.0f;
    gates[i] = mask >> i & 1 ? gate : 0.0f;
  }
}

// dprobs, dgates [n] -> dlogits [n]
MILORA_HOST_DEVICE void gates_backward(const float* probs, const RouterCodes& codes,
                                       const float* dprobs, const float* dgates, float* dlogits) {
  const int n = codes.num_experts;
  const uint64_t mask = top_k_mask(probs, n, codes.top_k);
  float kept = 0, inner = 0;
  for (int i = 0; i < n; ++i) {
    if (!(mask >> i & 1)) continue;
    kept += probs[i];
    inner += dgates[i] * probs[i];
  }
  float total = 0;
  for (int i = 0; i < n; ++i) {
    float dp = dprobs[i];
    if (mask >> i & 1) {
      // Hard gates pass the gradient straight through to the kept probabilities.
      dp += codes.gate == GateKind::kRenormalized ? (dgates[i] - inner / kept) / kept : dgates[i];
    }
    dlogits[i] = dp;
    total += dp * probs[i];
  }
  for (int i = 0; i < n; ++i) dlogits[i] = probs[i] * (dlogits[i] - total);
}

}  // namespace milora
