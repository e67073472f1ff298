// grouped_lora_ on a GPU for few rows per adapter (path 0): the entry that ops/ calls.
#pragma once

#include "kernels/grouped_lora/params.h"

namespace milora {

#ifdef MILORA_CUDA
// Bytes of device memory that a call needs on the current device, 0 where clusters serve. A
// function of the host-known sizes alone, so that a captured graph may keep its workspace.
int64_t grouped_lora_decode_workspace(const GroupedLoraPoolParams& params);

// Launches on `stream` (a cudaStream_t) without synchronising; returns a cudaError_t. `workspace`
// starts on 16 bytes, holds anything, and belongs to this call until the stream has passed it.
int grouped_lora_decode_cuda(const GroupedLoraPoolParams& params, void* workspace, void* stream);
#else
// Never reached: run_cuda fails first.
inline int64_t grouped_lora_decode_workspace(const GroupedLoraPoolParams&) { return 0; }
inline int grouped_lora_decode_cuda(const GroupedLoraPoolParams&, void*, void*) { return 0; }
#endif

}  // namespace milora
