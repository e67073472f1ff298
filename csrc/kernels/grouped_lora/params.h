// What the grouped_lora kernels read and write: raw pointers, each with its shape.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"

namespace milora {

constexpr int kMaxSlices = 16;  // outputs that share one x: q, k, v and gate, up need at most 3
constexpr int kMaxRank = 256;

// The caller names the kernels: a row's bits may differ between them, never within one. On the CPU
// all mean the same loops.
enum LoraPath : int64_t { kDecodePath = 0, kPrefillPath = 1, kPrefillWgmmaPath = 2 };

// The columns of `offsets`. The core C [rank, rank] stands between A and B; absent, it is 1.
enum ExpertPart : int { kPartA, kPartBt, kPartU, kPartV, kPartCore, kNumParts };

// grouped_lora_: y_s[t] += g (scale B C (rg[t, s] * A x_t) + u y_s[t] + v), weights in the pool.
struct GroupedLoraPoolParams {
  void* y[kMaxSlices];           // [num_tokens, d_out[s]]
  int64_t y_stride[kMaxSlices];  // elements
  int64_t d_out[kMaxSlices];
  int32_t expert[kMaxSlices];  // column of gates, offsets, ranks and scales
  const void* x;               // [num_tokens, d_in]
  int64_t x_stride;            // elements
  const uint8_t* pool;         // [pool_bytes], 16-byte aligned
  int64_t pool_bytes;
  const int64_t* offsets;     // [num_adapters, num_experts, kNumParts] bytes; -1 = absent
  const int32_t* ranks;       // [num_adapters, num_experts]
  const float* scales;        // [num_adapters, num_experts]
  const float* gates;         // [num_routes, num_experts]
  const int32_t* route_of;    // [num_tokens]
  const int32_t* adapter_of;  // [num_routes]
  int64_t num_tokens, num_routes, num_experts, num_adapters;
  int64_t num_slices, d_in;
  Dtype dtype;
  const float* rank_gates;  // [num_tokens, num_slices, max_rank], or null: all 1
  int64_t max_rank;  // no expert of the call has a higher rank; 0 = kMaxRank. Columns of rank_gates
};

// The highest rank that an expert may have in this call.
MILORA_HOST_DEVICE int64_t most_ranks(const GroupedLoraPoolParams& p) {
  return p.max_rank == 0 ? kMaxRank : p.max_rank;
}

// The offsets of adapter * num_experts + expert, by ExpertPart.
MILORA_HOST_DEVICE const int64_t* offsets_at(const GroupedLoraPoolParams& p, int64_t entry) {
  return p.offsets + entry * kNumParts;
}

// The gates of a token's ranks in a slice; only where there are any.
MILORA_HOST_DEVICE const float* rank_gates_at(const GroupedLoraPoolParams& p, int64_t token,
                                              int64_t slice) {
  return p.rank_gates + (token * p.num_slices + slice) * p.max_rank;
}

// grouped_lora and its backward: one slice, weights as tensors, gates of one expert.
struct LoraWeights {
  const void* a;  // [rank, d_in]
  const void* b;  // [d_out, rank]
  int32_t rank;
  float scale;
};

struct GroupedLoraParams {
  const void* y;                // [num_tokens, d_out]
  void* out;                    // [num_tokens, d_out], contiguous; may be y
  const void* x;                // [num_tokens, d_in]
  const LoraWeights* adapters;  // [num_adapters], host memory
  const float* gates;           // [num_routes]
  const int32_t* route_of;      // [num_tokens]
  const int32_t* adapter_of;    // [num_routes]
  int64_t y_stride, x_stride;   // elements
  int64_t num_tokens, num_routes, num_adapters, d_in, d_out;
  Dtype dtype;
};

struct LoraGrads {
  void* da;  // [rank, d_in]
  void* db;  // [d_out, rank]
};

// Null outputs are not wanted.
struct GroupedLoraBackwardParams {
  const void* dy;               // [num_tokens, d_out]
  const void* x;                // [num_tokens, d_in]
  const LoraWeights* adapters;  // [num_adapters], host memory
  const float* gates;           // [num_routes]
  const int32_t* route_of;      // [num_tokens]
  const int32_t* adapter_of;    // [num_routes]
  void* dx;                     // [num_tokens, d_in], contiguous, added to
  const LoraGrads* grads;       // [num_adapters], host memory
  float* dgates;                // [num_routes]
  int64_t dy_stride, x_stride;  // elements
  int64_t num_tokens, num_routes, num_adapters, d_in, d_out;
  Dtype dtype;
};

}  // namespace milora
