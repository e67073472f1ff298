// The workspaces of grouped_lora and its backward, and the Params of the prefill kernels they call.
#pragma once

#include <algorithm>

#include "kernels/grouped_lora/train/config.h"

namespace milora::train {

template <class P>  // GroupedLoraParams or GroupedLoraBackwardParams
inline GroupedLoraPoolParams pool_params(const P& p, const PackedPool& pool) {
  GroupedLoraPoolParams out{};
  out.x = p.x;
  out.x_stride = p.x_stride;
  out.d_in = p.d_in;
  out.d_out[0] = p.d_out;
  out.pool = pool.bytes;
  out.pool_bytes = pool.num_bytes;
  out.offsets = pool.offsets;
  out.ranks = pool.ranks;
  out.scales = pool.scales;
  out.gates = p.gates;
  out.route_of = p.route_of;
  out.adapter_of = p.adapter_of;
  out.num_tokens = p.num_tokens;
  out.num_routes = p.num_routes;
  out.num_adapters = p.num_adapters;
  out.num_experts = out.num_slices = 1;
  for (int64_t i = 0; i < p.num_adapters; ++i) {
    out.max_rank = std::max<int64_t>(out.max_rank, p.adapters[i].rank);
  }
  out.dtype = p.dtype;
  return out;
}

// dy takes the way of x, dx that of y.
inline GroupedLoraPoolParams reverse_params(const GroupedLoraBackwardParams& p,
                                            const PackedPool& pool) {
  GroupedLoraPoolParams out = pool_params(p, pool);
  out.x = p.dy;
  out.x_stride = p.dy_stride;
  out.d_in = p.d_out;
  out.y[0] = p.dx;
  out.y_stride[0] = out.d_out[0] = p.d_in;
  out.offsets = pool.reverse;
  return out;
}

struct ForwardMemory {
  PackedPool pool;
  prefill::Workspace work;
};
inline int64_t lay_out(const GroupedLoraParams& p, void* memory, ForwardMemory* out) {
  Cutter cutter{static_cast<char*>(memory)};
  out->pool = lay_out_pool(p.adapters, p.num_adapters, p.d_in, p.d_out, p.dtype, &cutter);
  const GroupedLoraPoolParams forward = pool_params(p, out->pool);
  return cutter.size + prefill::lay_out(forward, cutter.rest(), false, &out->work);
}

struct BackwardMemory {
  PackedPool pool;
  TokenCoefs coefs;
  prefill::Workspace forward, reverse;
};
inline int64_t lay_out(const GroupedLoraBackwardParams& p, void* memory, BackwardMemory* out) {
  Cutter cutter{static_cast<char*>(memory)};
  out->pool = lay_out_pool(p.adapters, p.num_adapters, p.d_in, p.d_out, p.dtype, &cutter);
  const int64_t width = prefill::partial_width(pool_params(p, out->pool));
  out->coefs = lay_out_coefs(p.num_tokens, width, p.dtype, &cutter);
  for (const bool forward : {true, false}) {
    const GroupedLoraPoolParams params =
        forward ? pool_params(p, out->pool) : reverse_params(p, out->pool);
    prefill::Workspace* work = forward ? &out->forward : &out->reverse;
    cutter.size += prefill::lay_out(params, cutter.rest(), false, work);
  }
  return cutter.size;
}

}  // namespace milora::train
