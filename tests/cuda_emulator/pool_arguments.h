// grouped_lora_'s arguments as tests/cuda_emulation.py passes them.
#pragma once

#include "kernels/grouped_lora/params.h"

namespace milora {

struct PoolArguments {
  // num_tokens, num_routes, num_experts, num_adapters, num_slices, d_in, x_stride, pool_bytes,
  // dtype, max_rank
  const int64_t* sizes;
  void* const* y;
  const int64_t *y_stride, *d_out, *experts;
  const void* x;
  const uint8_t* pool;
  const int64_t* offsets;
  const int32_t* ranks;
  const float *scales, *gates;
  const int32_t *route_of, *adapter_of;
  const float* rank_gates;  // null: none

  GroupedLoraPoolParams params() const {
    GroupedLoraPoolParams p{};
    p.num_tokens = sizes[0];
    p.num_routes = sizes[1];
    p.num_experts = sizes[2];
    p.num_adapters = sizes[3];
    p.num_slices = sizes[4];
    p.d_in = sizes[5];
    p.x_stride = sizes[6];
    p.pool_bytes = sizes[7];
    p.dtype = static_cast<Dtype>(sizes[8]);
    for (int s = 0; s < p.num_slices; ++s) {
      p.y[s] = y[s];
      p.y_stride[s] = y_stride[s];
      p.d_out[s] = d_out[s];
      p.expert[s] = static_cast<int32_t>(experts[s]);
    }
    p.x = x;
    p.pool = pool;
    p.offsets = offsets;
    p.ranks = ranks;
    p.scales = scales;
    p.gates = gates;
    p.route_of = route_of;
    p.adapter_of = adapter_of;
    p.rank_gates = rank_gates;
    p.max_rank = sizes[9];
    return p;
  }
};

}  // namespace milora
