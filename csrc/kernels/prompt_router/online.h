// Softmax over scores that come in groups: what was summed before a larger score appears is scaled
// down. Shared by the GPU kernels and, through their CPU stand-in, the tests.
#pragma once

#include <math.h>

#include "common/macros.h"

namespace milora {

// The larger of two, NaN if either is (as torch.amax).
MILORA_HOST_DEVICE float larger_or_nan(float a, float b) {
  return b > a || b != b ? (a != a ? a : b) : a;
}

struct OnlineSoftmax {
  float top = -INFINITY;  // the largest score so far, NaN if one was
  float sum = 0;          // of exp(score - softmax_shift)
};

// A score of -inf has weight 0 as long as a larger one may come.
MILORA_HOST_DEVICE float softmax_shift(const OnlineSoftmax& s) {
  return s.top == -INFINITY ? 0.0f : s.top;
}

// Takes a score into account; returns the factor for everything summed before.
MILORA_HOST_DEVICE float raise_top(OnlineSoftmax* s, float score) {
  const float before = s->top;
  s->top = larger_or_nan(before, score);
  const float factor = before == -INFINITY ? 0.0f : expf(before - softmax_shift(*s));
  s->sum *= factor;
  return factor;
}

}  // namespace milora
