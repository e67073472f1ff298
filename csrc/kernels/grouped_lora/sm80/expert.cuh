// One expert of the pool, as kernels read it from the tables.
#pragma once

#include "kernels/cuda/device.cuh"
#include "kernels/grouped_lora/params.h"

namespace milora::prefill {

// Bytes from row to row of a pool matrix with d columns.
template <class T>
__device__ __forceinline__ int64_t pool_row_bytes(int64_t d) {
  return (d * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
}

__device__ __forceinline__ bool inside(int64_t offset, int64_t bytes, int64_t pool_bytes) {
  return offset >= 0 && offset % 16 == 0 && bytes <= pool_bytes && offset <= pool_bytes - bytes;
}

// Whether slice `slice` changes rows of this route: a gate that is not 0 and an expert that lies in
// the pool. The plan asks this once; the kernels after it trust its tiles and jobs.
template <class T>
__device__ __forceinline__ bool is_active(const GroupedLoraPoolParams& p, int32_t route,
                                          int32_t adapter, int slice) {
  const int32_t expert = p.expert[slice];
  if (p.gates[route * p.num_experts + expert] == 0.0f) return false;
  const int64_t entry = adapter * p.num_experts + expert;
  const int32_t rank = p.ranks[entry];
  if (rank <= 0 || rank > most_ranks(p)) return false;
  const int64_t* offset = offsets_at(p, entry);
  return inside(offset[kPartA], rank * pool_row_bytes<T>(p.d_in), p.pool_bytes) &&
         inside(offset[kPartBt], rank * pool_row_bytes<T>(p.d_out[slice]), p.pool_bytes) &&
         (offset[kPartCore] < 0 ||
          inside(offset[kPartCore], rank * pool_row_bytes<T>(rank), p.pool_bytes));
}

// u or v, or null where the adapter has none.
__device__ __forceinline__ const float* output_vector(const GroupedLoraPoolParams& p,
                                                      int64_t offset, int64_t d_out) {
  if (!inside(offset, d_out * static_cast<int64_t>(sizeof(float)), p.pool_bytes)) return nullptr;
  return reinterpret_cast<const float*>(p.pool + offset);
}

}  // namespace milora::prefill
