// CUDA launches of prompt_router and its backward. Each returns a cudaError_t as int.
#pragma once

#include "kernels/prompt_router/params.h"

namespace milora {

#ifdef MILORA_CUDA
int64_t prompt_router_cuda_scratch(const PromptRouterParams& params);
int prompt_router_cuda(const PromptRouterParams& params, void* scratch, void* stream);
int64_t prompt_router_backward_cuda_scratch(const PromptRouterParams& params);
int prompt_router_backward_cuda(const PromptRouterBackwardParams& params, void* scratch,
                                void* stream);
#else
// Never reached: run_cuda fails first.
inline int64_t prompt_router_cuda_scratch(const PromptRouterParams&) { return 0; }
inline int prompt_router_cuda(const PromptRouterParams&, void*, void*) { return 0; }
inline int64_t prompt_router_backward_cuda_scratch(const PromptRouterParams&) { return 0; }
inline int prompt_router_backward_cuda(const PromptRouterBackwardParams&, void*, void*) {
  return 0;
}
#endif

}  // namespace milora
