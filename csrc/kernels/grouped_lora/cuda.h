// CUDA launches of grouped_lora and its backward. Each returns a cudaError_t as int.
#pragma once

#include "kernels/grouped_lora/params.h"

namespace milora {

#ifdef MILORA_CUDA
int64_t grouped_lora_cuda_scratch(const GroupedLoraParams& params);
int grouped_lora_cuda(const GroupedLoraParams& params, void* scratch, void* stream);
int64_t grouped_lora_backward_cuda_scratch(const GroupedLoraBackwardParams& params);
int grouped_lora_backward_cuda(const GroupedLoraBackwardParams& params, void* scratch,
                               void* stream);
#else
// Never reached: run_cuda fails first.
inline int64_t grouped_lora_cuda_scratch(const GroupedLoraParams&) { return 0; }
inline int grouped_lora_cuda(const GroupedLoraParams&, void*, void*) { return 0; }
inline int64_t grouped_lora_backward_cuda_scratch(const GroupedLoraBackwardParams&) { return 0; }
inline int grouped_lora_backward_cuda(const GroupedLoraBackwardParams&, void*, void*) { return 0; }
#endif

}  // namespace milora
