// fused_lora on a GPU: the base module and its experts in one matrix product.
#pragma once

#include "kernels/grouped_lora/params.h"

namespace milora {

struct FusedLoraParams {
  // One slice, whose y is the output and is only written. 16-bit dtypes.
  GroupedLoraPoolParams lora;
  const void* w;     // [d_out, d_in]
  int64_t w_stride;  // elements
  const void* bias;  // [d_out], dtype of x; null = none
};

#ifdef MILORA_CUDA
// Only where has_wgmma (sm90/device.h).
int64_t fused_lora_workspace(const FusedLoraParams& params);
// As grouped_lora_prefill_cuda.
int fused_lora_cuda(const FusedLoraParams& params, void* workspace, void* stream);
#else
// Never reached: run_cuda fails first.
inline int64_t fused_lora_workspace(const FusedLoraParams&) { return 0; }
inline int fused_lora_cuda(const FusedLoraParams&, void*, void*) { return 0; }
#endif

}  // namespace milora
