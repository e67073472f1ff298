// The CPU kernels of prompt_router and its backward.
//
//   pool      one chunk of a prompt's tokens -> a partial (max, sum, vector)
//   head      one prompt: combine its partials in order, activate, route
//
// Backward: head_backward (per prompt), dots (per chunk), weights (per prompt), scatter (per
// chunk). Chunks have a fixed size, so a prompt's result depends on its own tokens only.
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/prompt_router/params.h"

namespace milora {

struct RouterChunk {
  int32_t prompt;
  int32_t begin, end;  // tokens
};

struct RouterWork {
  PromptRouterParams p;
  const RouterChunk* chunks;
  const int32_t* first_chunk;  // [num_prompts + 1]
  float* maxima;               // [chunks] largest score, self-attention
  float* sums;                 // [chunks] sum of exp(score - max)
  float* vectors;              // [chunks, d]
};

struct RouterBackwardWork {
  PromptRouterBackwardParams p;
  const RouterChunk* chunks;
  const int32_t* first_chunk;  // [num_prompts + 1]
  float* dvector;              // [num_prompts, d] gradient of the pooled vector
  float* activated;            // [num_prompts, d]
  float* dlogits;              // [num_prompts, num_experts]
  float* dcoef;                // [num_prompts, kNumCoefs]
  float* scores;               // [num_tokens] h . w_sa, then softmax weight
  float* dots;                 // [num_tokens] h . dvector, then gradient of the score
  int32_t* argmax;             // [num_prompts, d] token of the first maximum
  float* dw_sa;                // [chunks, d]
};

struct PromptRouterCpu {
  void (*pool)(const RouterWork& work, int64_t begin, int64_t end);
  void (*head)(const RouterWork& work, int64_t begin, int64_t end);
  void (*head_backward)(const RouterBackwardWork& work, int64_t begin, int64_t end);
  void (*dots)(const RouterBackwardWork& work, int64_t begin, int64_t end);
  void (*weights)(const RouterBackwardWork& work, int64_t begin, int64_t end);
  void (*scatter)(const RouterBackwardWork& work, int64_t begin, int64_t end);
  void (*combine)(const RouterBackwardWork& work, int64_t begin, int64_t end);  // over routers
};

#define MILORA_DECLARE(isa) MILORA_DECLARE_TABLE(isa, PromptRouterCpu, kPromptRouterCpu)
MILORA_FOR_EACH_ISA(MILORA_DECLARE)
#undef MILORA_DECLARE

inline const PromptRouterCpu& prompt_router_cpu() {
#define MILORA_CASE(isa) \
  case CpuIsa::isa:      \
    return isa::kPromptRouterCpu;
  switch (cpu_isa()) { MILORA_FOR_EACH_ISA(MILORA_CASE) }
#undef MILORA_CASE
  return baseline::kPromptRouterCpu;
}

}  // namespace milora
