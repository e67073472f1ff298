// What grouped_lora_ and fused_lora share on the host.
#pragma once

#include "kernels/grouped_lora/params.h"
#include "ops/ops.h"

namespace milora {

// Checks the arguments of grouped_lora_ (milora/ops.py has the contract) and fills its Params. `op`
// names the caller in errors.
GroupedLoraPoolParams pool_params(const char* op, const Tensors& y, const Tensor& x,
                                  const Tensor& pool, const Tensor& offsets, const Tensor& ranks,
                                  const Tensor& scales, const Tensor& gates, const Tensor& route_of,
                                  const Tensor& adapter_of, const std::vector<int64_t>& experts);

// For kernels made of wgmma and tensor copies; `advice` ends the errors. What is checked: the GPU,
// the dtype, and, by check_rows_on_16, where rows start.
void check_wgmma(const char* op, const Tensor& x, const char* advice);
// The stride of a single row does not matter, and becomes a multiple of 16 bytes.
void check_rows_on_16(const char* op, const char* name, const void* data, int64_t num_rows,
                      int64_t* stride);

}  // namespace milora
