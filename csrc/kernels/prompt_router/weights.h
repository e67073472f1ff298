// Where a router's weights lie: in tensors with a row per router, or in the adapter pool.
#pragma once

#include "common/macros.h"
#include "kernels/prompt_router/params.h"

namespace milora {

struct RouterWeights {
  const float* w_sa;   // [d]
  const float* w_r;    // [num_experts, d], rows w_r_stride apart
  const float* coef;   // [kNumCoefs]
  int64_t w_r_stride;  // elements
};

// Bytes [offset, offset + bytes) lie in the pool and start on 16.
MILORA_HOST_DEVICE bool inside_pool(const PromptRouterParams& p, int64_t offset, int64_t bytes) {
  return offset >= 0 && offset % 16 == 0 && bytes <= p.pool_bytes && offset <= p.pool_bytes - bytes;
}

MILORA_HOST_DEVICE RouterWeights router_weights(const PromptRouterParams& p, int64_t router) {
  if (p.offsets == nullptr) {
    return {p.w_sa + router * p.d, p.w_r + router * p.num_experts * p.d,
            p.coef + router * kNumCoefs, p.d};
  }
  const int64_t* offset = p.offsets + 3 * router;
  const auto at = [&](int i) { return reinterpret_cast<const float*>(p.pool + offset[i]); };
  return {at(0), at(1), at(2), (p.d + 3) / 4 * 4};
}

// Which of w_sa, W_r, coef (0, 1, 2) a router with these codes reads, and how many bytes.
MILORA_HOST_DEVICE int64_t router_bytes(const PromptRouterParams& p, const RouterCodes& codes,
                                        int which) {
  const int64_t row = (p.d + 3) / 4 * 16;
  if (which == 0) return codes.pooler == Pooler::kSelfAttention ? p.d * 4 : 0;
  if (which == 1) return codes.num_experts * row;
  return codes.activation == Activation::kRational ? kNumCoefs * 4 : 0;
}

}  // namespace milora
