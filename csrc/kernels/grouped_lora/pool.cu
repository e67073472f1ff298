// grouped_lora_ on a GPU, any architecture:  y_s[t] += g (s B (A x_t) + u y_s[t] + v)     [eq. 1]
//
// One block per (token, slice). Phase 1: a warp per rank row computes A x into shared memory; phase
// 2: a thread per output column walks the ranks of Bt, whose rows are contiguous along d_out, and
// updates its y element. A token with gate 0 or without an adapter costs one block that reads three
// numbers. Nothing is read on the host, so the launch can be captured in a CUDA graph; an index out
// of range leaves the row untouched instead of reporting.
//
// Bytes: rank (d_in + d_out) itemsize per row, from L2 when rows share an adapter; FLOPs twice the
// elements. A row's sums are ordered by lane, then by a fixed tree: independent of other rows.
#include "kernels/cuda/device.cuh"
#include "kernels/grouped_lora/cuda.h"

namespace milora {
namespace {

constexpr int kThreads = 256;

// The stored row stride of a pool matrix, in elements.
template <class T>
__device__ __forceinline__ int64_t pool_stride(int64_t d) {
  constexpr int64_t kPerRow = 16 / sizeof(T);
  return (d + kPerRow - 1) / kPerRow * kPerRow;
}

__device__ __forceinline__ bool inside(int64_t offset, int64_t bytes, int64_t pool_bytes) {
  return offset >= 0 && offset % 16 == 0 && bytes <= pool_bytes && offset <= pool_bytes - bytes;
}

template <class T>
__global__ void __launch_bounds__(kThreads) pool_kernel(GroupedLoraPoolParams p) {
  __shared__ float hidden[kMaxRank];
  const int64_t token = blockIdx.x;
  const int slice = blockIdx.y;

  // Who serves this row: the whole block agrees, so it may leave early.
  const int32_t route = p.route_of[token];
  if (route < 0 || route >= p.num_routes) return;
  const int32_t adapter = p.adapter_of[route];
  if (adapter < 0 || adapter >= p.num_adapters) return;
  const int32_t expert = p.expert[slice];
  const float gate = p.gates[route * p.num_experts + expert];
  if (gate == 0.0f) return;
  const int64_t entry = adapter * p.num_experts + expert;
  const int32_t rank = p.ranks[entry];
  if (rank <= 0 || rank > kMaxRank) return;
  const int64_t d_out = p.d_out[slice];
  const int64_t a_stride = pool_stride<T>(p.d_in), bt_stride = pool_stride<T>(d_out);
  const int64_t* offset = p.offsets + entry * 4;
  if (!inside(offset[0], rank * a_stride * sizeof(T), p.pool_bytes)) return;
  if (!inside(offset[1], rank * bt_stride * sizeof(T), p.pool_bytes)) return;
  const T* a = reinterpret_cast<const T*>(p.pool + offset[0]);
  const T* bt = reinterpret_cast<const T*>(p.pool + offset[1]);
  const auto vector_at = [&](int64_t at) -> const float* {
    if (!inside(at, d_out * static_cast<int64_t>(sizeof(float)), p.pool_bytes)) return nullptr;
    return reinterpret_cast<const float*>(p.pool + at);
  };
  const float* u = vector_at(offset[2]);
  const float* v = vector_at(offset[3]);
  const float scale = p.scales[entry];

  // Phase 1, shrink.
  const T* x = static_cast<const T*>(p.x) + token * p.x_stride;
  for (int r = threadIdx.x / kWarp; r < rank; r += kThreads / kWarp) {
    const float sum = warp_dot(a + r * a_stride, x, p.d_in);
    if (threadIdx.x % kWarp == 0) hidden[r] = sum;
  }
  __syncthreads();

  // Phase 2, expand; one rounding at the end.
  T* y = static_cast<T*>(p.y[slice]) + token * p.y_stride[slice];
  for (int64_t c = threadIdx.x; c < d_out; c += kThreads) {
    float sum = 0;
    for (int r = 0; r < rank; ++r) sum = fmaf(hidden[r], to_float(bt[r * bt_stride + c]), sum);
    const float base = to_float(y[c]);
    float delta = scale * sum;
    if (u != nullptr) delta = fmaf(u[c], base, delta);
    if (v != nullptr) delta += v[c];
    y[c] = from_float<T>(fmaf(gate, delta, base));
  }
}

}  // namespace

int grouped_lora_pool_cuda(const GroupedLoraPoolParams& params, void* stream) {
  const dim3 grid(static_cast<unsigned>(params.num_tokens),
                  static_cast<unsigned>(params.num_slices));
  return dispatch_device_type(params.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    pool_kernel<T><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  });
}

}  // namespace milora
