// grouped_lora_ on a GPU for many rows per adapter (paths 1 and 2): the entries that ops/ calls.
#pragma once

#include "kernels/grouped_lora/params.h"

namespace milora {

#ifdef MILORA_CUDA
// Bytes of device memory that a call needs; a function of the host-known sizes alone, so that a
// captured graph may keep its workspace.
int64_t grouped_lora_prefill_workspace(const GroupedLoraPoolParams& params);

// Launches on `stream` (a cudaStream_t) without synchronising; returns a cudaError_t. `workspace`
// starts on 256 bytes, holds anything, and belongs to this call until the stream has passed it.
int grouped_lora_prefill_cuda(const GroupedLoraPoolParams& params, void* workspace, void* stream);

// The same by wgmma and tensor copies (path 2), with the same workspace: only where has_wgmma
// (sm90/device.h), of 16-bit dtypes, and with rows of x and y that start on 16 bytes.
int grouped_lora_prefill_wgmma_cuda(const GroupedLoraPoolParams& params, void* workspace,
                                    void* stream);
#else
// Never reached: run_cuda fails first.
inline int64_t grouped_lora_prefill_workspace(const GroupedLoraPoolParams&) { return 0; }
inline int grouped_lora_prefill_cuda(const GroupedLoraPoolParams&, void*, void*) { return 0; }
inline int grouped_lora_prefill_wgmma_cuda(const GroupedLoraPoolParams&, void*, void*) { return 0; }
#endif

}  // namespace milora
