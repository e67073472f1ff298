// grouped_lora and its backward on a GPU, any architecture:  out_t = y_t + g s B (A x_t)
//
// Forward and the per-token part of the backward take one block a token. With G = Bt dy_t and
// h = A x_t the backward then reduces over tokens:
//   dA[r] = sum_t (g s G_r) x_t     dB[:, r] = sum_t (g s h_r) dy_t     dgate = sum_t s G . h
// A thread owns one column (dA, dB) or a warp one route (dgates) and walks the tokens in order: no
// atomics, the same bits every time. Scratch keeps g s h, g s G and s G.h per token.
//
// The table of adapters travels as a kernel argument, kTableSize adapters a launch, because a copy
// from host memory would neither be asynchronous nor capturable.
#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/grouped_lora/cuda.h"

namespace milora {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTableSize = 64;
constexpr int kRanksPerLane = kMaxRank / kWarp;
constexpr int kReduceColumns = 128;
constexpr int kReduceRanks = 8;

struct Routes {
  const float* gates;
  const int32_t* route_of;
  const int32_t* adapter_of;
  int64_t num_routes, num_adapters;
};

struct Table {
  LoraWeights weights[kTableSize];
  LoraGrads grads[kTableSize];
  int32_t first, count;  // adapters [first, first + count)
};

struct Scratch {
  float* hidden;       // [num_tokens, max_rank] g s A x
  float* grad_hidden;  // [num_tokens, max_rank] g s Bt dy
  float* row_dots;     // [num_tokens] s (Bt dy) . (A x)
  int64_t max_rank;
};

// The token's adapter, or -1 where it is left alone.
__device__ __forceinline__ int32_t adapter_of_token(const Routes& routes, int64_t token,
                                                    float* gate) {
  const int32_t route = routes.route_of[token];
  if (route < 0 || route >= routes.num_routes) return -1;
  *gate = routes.gates[route];
  if (*gate == 0.0f) return -1;
  const int32_t adapter = routes.adapter_of[route];
  return adapter < routes.num_adapters ? adapter : -1;
}

template <class T>
__device__ __forceinline__ void shrink(const T* a, const T* x, int32_t rank, int64_t d_in,
                                       float* hidden) {
  for (int r = threadIdx.x / kWarp; r < rank; r += kWarps) {
    const float sum = warp_dot(a + r * d_in, x, d_in);
    if (threadIdx.x % kWarp == 0) hidden[r] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(GroupedLoraParams p, Routes routes, const __grid_constant__ Table table) {
  __shared__ float hidden[kMaxRank];
  const int64_t token = blockIdx.x;
  const T* y = static_cast<const T*>(p.y) + token * p.y_stride;
  T* out = static_cast<T*>(p.out) + token * p.d_out;
  float gate = 0;
  const int32_t adapter = adapter_of_token(routes, token, &gate);
  if (adapter < 0) {
    if (table.first > 0) return;  // copied by the first launch
    for (int64_t c = threadIdx.x; c < p.d_out; c += kThreads) out[c] = y[c];
    return;
  }
  if (adapter < table.first || adapter >= table.first + table.count) return;
  const LoraWeights& weights = table.weights[adapter - table.first];
  shrink(static_cast<const T*>(weights.a), static_cast<const T*>(p.x) + token * p.x_stride,
         weights.rank, p.d_in, hidden);
  __syncthreads();
  for (int64_t c = threadIdx.x; c < p.d_out; c += kThreads) {
    const T* b = static_cast<const T*>(weights.b) + c * weights.rank;
    float sum = 0;
    for (int r = 0; r < weights.rank; ++r) sum = fmaf(hidden[r], to_float(b[r]), sum);
    out[c] = from_float<T>(fmaf(gate, weights.scale * sum, to_float(y[c])));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    backward_token_kernel(GroupedLoraBackwardParams p, Routes routes, Scratch scratch,
                          const __grid_constant__ Table table) {
  __shared__ float hidden[kMaxRank];
  __shared__ float grad_hidden[kMaxRank];
  __shared__ float partial[kWarps][kMaxRank];
  __shared__ float sums[kWarps];
  const int64_t token = blockIdx.x;
  float gate = 0;
  const int32_t adapter = adapter_of_token(routes, token, &gate);
  if (adapter < table.first || adapter >= table.first + table.count) return;
  const LoraWeights& weights = table.weights[adapter - table.first];
  const int rank = weights.rank;
  const T* a = static_cast<const T*>(weights.a);
  const T* b = static_cast<const T*>(weights.b);
  const T* dy = static_cast<const T*>(p.dy) + token * p.dy_stride;

  // Phase 1: h = A x, G = Bt dy. B is [d_out, rank]: lanes along the ranks, warps along d_out.
  shrink(a, static_cast<const T*>(p.x) + token * p.x_stride, rank, p.d_in, hidden);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float sum[kRanksPerLane] = {};
  for (int64_t o = warp; o < p.d_out; o += kWarps) {
    const float grad = to_float(dy[o]);
#pragma unroll
    for (int i = 0; i < kRanksPerLane; ++i) {
      const int r = lane + i * kWarp;
      if (r < rank) sum[i] = fmaf(to_float(b[o * rank + r]), grad, sum[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kRanksPerLane; ++i) partial[warp][lane + i * kWarp] = sum[i];
  __syncthreads();
  for (int r = threadIdx.x; r < rank; r += kThreads) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += partial[w][r];
    grad_hidden[r] = total;
  }
  __syncthreads();

  // Phase 2: what the reductions over tokens need.
  const float factor = gate * weights.scale;
  float dot = 0;
  for (int r = threadIdx.x; r < rank; r += kThreads) {
    dot = fmaf(grad_hidden[r], hidden[r], dot);
    scratch.hidden[token * scratch.max_rank + r] = factor * hidden[r];
    scratch.grad_hidden[token * scratch.max_rank + r] = factor * grad_hidden[r];
  }
  dot = block_sum<kThreads>(dot, sums);
  if (threadIdx.x == 0) scratch.row_dots[token] = dot * weights.scale;

  // Phase 3: dx.
  if (p.dx == nullptr) return;
  T* dx = static_cast<T*>(p.dx) + token * p.d_in;
  for (int64_t c = threadIdx.x; c < p.d_in; c += kThreads) {
    float total = 0;
    for (int r = 0; r < rank; ++r) {
      total = fmaf(factor * grad_hidden[r], to_float(a[r * p.d_in + c]), total);
    }
    dx[c] = from_float<T>(total);
  }
}

// kForB: dB [d_out, rank] from dy and hidden; else dA [rank, d_in] from x and grad_hidden.
template <class T, bool kForB>
__global__ void __launch_bounds__(kReduceColumns)
    backward_weight_kernel(GroupedLoraBackwardParams p, Routes routes, Scratch scratch,
                           const __grid_constant__ Table table) {
  const int index = blockIdx.y;
  const int32_t adapter = table.first + index;
  const int rank = table.weights[index].rank;
  const int first_rank = blockIdx.z * kReduceRanks;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kReduceColumns + threadIdx.x;
  const int64_t width = kForB ? p.d_out : p.d_in;
  if (first_rank >= rank || column >= width) return;
  const T* data = static_cast<const T*>(kForB ? p.dy : p.x) + column;
  const int64_t stride = kForB ? p.dy_stride : p.x_stride;
  const float* coef = (kForB ? scratch.hidden : scratch.grad_hidden) + first_rank;
  const int count = min(kReduceRanks, rank - first_rank);

  float sum[kReduceRanks] = {};
  for (int64_t token = 0; token < p.num_tokens; ++token) {
    float gate;
    if (adapter_of_token(routes, token, &gate) != adapter) continue;
    const float value = to_float(data[token * stride]);
#pragma unroll
    for (int i = 0; i < kReduceRanks; ++i) {
      if (i < count) sum[i] = fmaf(coef[token * scratch.max_rank + i], value, sum[i]);
    }
  }
  T* out = static_cast<T*>(kForB ? table.grads[index].db : table.grads[index].da);
#pragma unroll
  for (int i = 0; i < kReduceRanks; ++i) {
    if (i >= count) continue;
    const int64_t at = kForB ? column * rank + first_rank + i : (first_rank + i) * width + column;
    out[at] = from_float<T>(sum[i]);
  }
}

__global__ void __launch_bounds__(kWarp)
    backward_gate_kernel(GroupedLoraBackwardParams p, Routes routes, Scratch scratch) {
  const int32_t route = static_cast<int32_t>(blockIdx.x);
  float sum = 0;
  for (int64_t token = threadIdx.x; token < p.num_tokens; token += kWarp) {
    float gate;
    if (routes.route_of[token] != route || adapter_of_token(routes, token, &gate) < 0) continue;
    sum += scratch.row_dots[token];
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) p.dgates[route] = sum;
}

int64_t max_rank(const LoraWeights* adapters, int64_t num_adapters) {
  int64_t rank = 1;
  for (int64_t i = 0; i < num_adapters; ++i) rank = std::max<int64_t>(rank, adapters[i].rank);
  return rank;
}

Table make_table(const LoraWeights* adapters, const LoraGrads* grads, int64_t num_adapters,
                 int64_t first) {
  Table table{};
  table.first = static_cast<int32_t>(first);
  table.count = static_cast<int32_t>(std::min<int64_t>(kTableSize, num_adapters - first));
  for (int32_t i = 0; i < table.count; ++i) {
    table.weights[i] = adapters[first + i];
    if (grads != nullptr) table.grads[i] = grads[first + i];
  }
  return table;
}

unsigned ceil_div(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

}  // namespace

int64_t grouped_lora_cuda_scratch(const GroupedLoraParams&) { return 0; }

int grouped_lora_cuda(const GroupedLoraParams& p, void*, void* stream) {
  const Routes routes{p.gates, p.route_of, p.adapter_of, p.num_routes, p.num_adapters};
  return dispatch_device_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    // At least one launch: it copies the rows that no adapter serves.
    for (int64_t first = 0; first == 0 || first < p.num_adapters; first += kTableSize) {
      const Table table = make_table(p.adapters, nullptr, p.num_adapters, first);
      forward_kernel<T>
          <<<static_cast<unsigned>(p.num_tokens), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
              p, routes, table);
    }
  });
}

int64_t grouped_lora_backward_cuda_scratch(const GroupedLoraBackwardParams& p) {
  return p.num_tokens * (2 * max_rank(p.adapters, p.num_adapters) + 1) *
         static_cast<int64_t>(sizeof(float));
}

int grouped_lora_backward_cuda(const GroupedLoraBackwardParams& p, void* memory, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const Routes routes{p.gates, p.route_of, p.adapter_of, p.num_routes, p.num_adapters};
  Scratch scratch{};
  scratch.max_rank = max_rank(p.adapters, p.num_adapters);
  scratch.hidden = static_cast<float*>(memory);
  scratch.grad_hidden = scratch.hidden + p.num_tokens * scratch.max_rank;
  scratch.row_dots = scratch.grad_hidden + p.num_tokens * scratch.max_rank;
  return dispatch_device_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const unsigned rank_blocks = ceil_div(scratch.max_rank, kReduceRanks);
    for (int64_t first = 0; first < p.num_adapters; first += kTableSize) {
      const Table table = make_table(p.adapters, p.grads, p.num_adapters, first);
      backward_token_kernel<T>
          <<<static_cast<unsigned>(p.num_tokens), kThreads, 0, stream>>>(p, routes, scratch, table);
      if (p.grads == nullptr) continue;
      const auto adapters = static_cast<unsigned>(table.count);
      const dim3 grid_a(ceil_div(p.d_in, kReduceColumns), adapters, rank_blocks);
      backward_weight_kernel<T, false>
          <<<grid_a, kReduceColumns, 0, stream>>>(p, routes, scratch, table);
      const dim3 grid_b(ceil_div(p.d_out, kReduceColumns), adapters, rank_blocks);
      backward_weight_kernel<T, true>
          <<<grid_b, kReduceColumns, 0, stream>>>(p, routes, scratch, table);
    }
    if (p.dgates != nullptr && p.num_routes > 0) {
      backward_gate_kernel<<<static_cast<unsigned>(p.num_routes), kWarp, 0, stream>>>(p, routes,
                                                                                      scratch);
    }
  });
}

}  // namespace milora
