// What the prompt_router kernels read and write: raw pointers, each with its shape.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace milora {

constexpr int kMaxExperts = 64;   // experts of one block; transformers have from 4 to 11
constexpr int kNumCoefs = 12;     // a0..a6, b1..b5
constexpr int kNumCodes = 6;      // pooler, activation, norm, gate, top_k, num_experts
constexpr int kRouterChunk = 32;  // tokens of one partial sum: fixes the order of summation
constexpr float kRmsEpsilon = 1e-6f;

enum class Pooler : int32_t { kSelfAttention = 0, kMean = 1, kMax = 2, kLast = 3 };
enum class Activation : int32_t { kRational = 0, kGelu = 1, kRelu = 2 };
enum class RouterNorm : int32_t { kNone = 0, kRms = 1 };
enum class GateKind : int32_t { kProbability = 0, kRenormalized = 1, kHard = 2 };

struct RouterCodes {
  Pooler pooler;
  Activation activation;
  RouterNorm norm;
  GateKind gate;
  int32_t top_k;
  int32_t num_experts;
};
static_assert(sizeof(RouterCodes) == kNumCodes * sizeof(int32_t), "codes are read in place");

struct PromptRouterParams {
  const void* h;             // [num_tokens, d]
  int64_t h_stride;          // elements
  const int32_t* spans;      // [num_prompts, 2] half-open
  const int32_t* router_of;  // [num_prompts]
  const float* w_sa;         // [num_routers, d]; null like the next two with a pool
  const float* w_r;          // [num_routers, num_experts, d]
  const float* coef;         // [num_routers, kNumCoefs]
  const uint8_t* pool;       // [pool_bytes], 16-byte aligned
  int64_t pool_bytes;
  const int64_t* offsets;    // [num_routers, 3]: w_sa, W_r, coef; bytes, -1 = absent; or null
  const RouterCodes* codes;  // [num_routers]
  float* probs;              // [num_prompts, num_experts]
  float* gates;              // [num_prompts, num_experts]
  float* pooled;             // [num_prompts, d]
  int64_t num_tokens, num_prompts, num_routers, num_experts, d;
  Dtype dtype;
};

struct PromptRouterBackwardParams {
  const float* dprobs;   // [num_prompts, num_experts]
  const float* dgates;   // [num_prompts, num_experts]
  const float* dpooled;  // [num_prompts, d]
  PromptRouterParams forward;
  void* dh;      // [num_tokens, d], contiguous, zeroed
  float* dw_sa;  // [num_routers, d], zeroed
  float* dw_r;   // [num_routers, num_experts, d], zeroed
  float* dcoef;  // [num_routers, kNumCoefs], zeroed
};

}  // namespace milora
