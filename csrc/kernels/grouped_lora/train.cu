// grouped_lora and its backward on a GPU:  out_t = y_t + g s B (A x_t)
//
// Training runs on the kernels of prefill (sm80/): the adapters of the call are packed as a pool,
// then
//   forward   out = y unless it is y; plan, shrink of x by A, expand by B^T into out
//   backward  shrink of x by A (h), shrink of dy by B^T (G), expand of G by A into dx, which is
//             added to; then the sums over tokens of train/reduce.cuh
// The backward of dx is the forward with A and B^T exchanged, so nothing of it is written twice.
//
// Floor of the backward, a token of an active slice at d = d_in = d_out, 16 bits: x and dy read
// twice (once by the shrink, once by the sums), dx written: 10 d bytes; FLOPs 10 rank d, 3 at rank
// 32 for every 100 that an H100 does while those bytes arrive. Tokens with gate 0 cost nothing but
// the copy of y. No atomics, every sum in a fixed order.
#include <algorithm>

#include "kernels/grouped_lora/cuda.h"
#include "kernels/grouped_lora/sm80/expand.cuh"
#include "kernels/grouped_lora/sm80/launch.h"
#include "kernels/grouped_lora/train/memory.h"
#include "kernels/grouped_lora/train/pack.cuh"
#include "kernels/grouped_lora/train/reduce.cuh"

namespace milora {
namespace {

using namespace train;

template <class T>
void launch_pack(const LoraWeights* adapters, int64_t num_adapters, int64_t d_in, int64_t d_out,
                 Dtype dtype, const PackedPool& pool, cudaStream_t stream) {
  constexpr int kBlocks = 32;  // an adapter; a few microseconds at rank 32, d 4096
  int64_t pool_at = 0;
  for (int64_t first = 0; first < num_adapters; first += kTableSize) {
    const PackTable table =
        make_pack_table(adapters, num_adapters, first, d_in, d_out, dtype, &pool_at);
    const dim3 grid(kBlocks, static_cast<unsigned>(table.count));
    pack_kernel<T><<<grid, kPackThreads, 0, stream>>>(table, pool, d_in, d_out);
  }
}

template <class T>
cudaError_t forward(const GroupedLoraParams& p, const ForwardMemory& memory, cudaStream_t stream) {
  constexpr int64_t kMostRows = 65535;  // of a grid in y; the kernel strides over the rest
  if (p.out != p.y) {
    const int64_t pieces = ceil_div(p.d_out * static_cast<int64_t>(sizeof(T)), 16);
    const dim3 copy_grid(static_cast<unsigned>(ceil_div(pieces, kPackThreads)),
                         static_cast<unsigned>(std::min(p.num_tokens, kMostRows)));
    copy_rows_kernel<T><<<copy_grid, kPackThreads, 0, stream>>>(
        static_cast<T*>(p.out), static_cast<const T*>(p.y), p.y_stride, p.num_tokens, p.d_out);
  }
  if (p.num_adapters == 0 || p.num_routes == 0) return cudaGetLastError();
  GroupedLoraPoolParams params = pool_params(p, memory.pool);
  params.y[0] = p.out;
  params.y_stride[0] = p.d_out;
  int processors = 0;
  cudaError_t error = prefill::count_processors(&processors);
  if (error != cudaSuccess) return error;
  launch_pack<T>(p.adapters, p.num_adapters, p.d_in, p.d_out, p.dtype, memory.pool, stream);
  error = prefill::launch_shrink<T>(params, memory.work, processors, stream);
  if (error != cudaSuccess) return error;
  return prefill::launch_expand<T>(params, memory.work, processors, stream);
}

template <class T, bool kForB>
void launch_reduce(const GroupedLoraBackwardParams& p, const BackwardMemory& memory,
                   const GradTable& table, int64_t coefs_width, cudaStream_t stream) {
  constexpr int64_t kItems = prefill::kRowItems<T>;
  const int64_t width = kForB ? p.d_out : p.d_in;
  const int max_rank = *std::max_element(table.ranks, table.ranks + table.count);
  const dim3 grid(static_cast<unsigned>(ceil_div(width, kItems)),
                  static_cast<unsigned>(table.count),
                  static_cast<unsigned>(ceil_div(max_rank, kItems)));
  reduce_kernel<T, kForB><<<grid, prefill::kThreads, kReduceBytes, stream>>>(
      table, memory.forward, kForB ? memory.coefs.hidden : memory.coefs.grad_hidden, coefs_width,
      kForB ? p.dy : p.x, kForB ? p.dy_stride : p.x_stride, width);
}

template <class T>
cudaError_t backward(const GroupedLoraBackwardParams& p, const BackwardMemory& memory,
                     cudaStream_t stream) {
  const GroupedLoraPoolParams forward = pool_params(p, memory.pool);
  const GroupedLoraPoolParams reverse = reverse_params(p, memory.pool);
  const bool need_hidden = p.grads != nullptr || p.dgates != nullptr;
  int processors = 0;
  cudaError_t error = prefill::count_processors(&processors);
  if (error != cudaSuccess) return error;
  launch_pack<T>(p.adapters, p.num_adapters, p.d_in, p.d_out, p.dtype, memory.pool, stream);
  error = prefill::launch_shrink<T>(reverse, memory.reverse, processors, stream);
  if (error == cudaSuccess && p.dx != nullptr) {
    error = prefill::launch_expand<T>(reverse, memory.reverse, processors, stream);
  }
  if (error == cudaSuccess && need_hidden) {
    error = prefill::launch_shrink<T>(forward, memory.forward, processors, stream);
  }
  if (error != cudaSuccess || !need_hidden) return error;
  finish_kernel<T>
      <<<prefill::persistent_grid(p.num_tokens, processors, 8), kFinishThreads, 0, stream>>>(
          forward, p.d_out, memory.forward, memory.reverse.partials, memory.coefs);
  for (int64_t first = 0; p.grads != nullptr && first < p.num_adapters; first += kTableSize) {
    const GradTable table = make_grad_table(p.adapters, p.grads, p.num_adapters, first);
    launch_reduce<T, false>(p, memory, table, memory.forward.partials.width, stream);
    launch_reduce<T, true>(p, memory, table, memory.forward.partials.width, stream);
  }
  if (p.dgates != nullptr) {
    gate_kernel<<<static_cast<unsigned>(p.num_routes), kWarp, 0, stream>>>(
        memory.coefs.row_dots, p.gates, p.route_of, p.adapter_of, p.num_tokens, p.num_adapters,
        p.dgates);
  }
  return cudaGetLastError();
}

// Calls f with a null pointer of the device type of `dtype`; f returns a cudaError_t.
template <class F>
int with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(static_cast<float*>(nullptr));
    case Dtype::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case Dtype::kFloat16:
      return f(static_cast<__half*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t grouped_lora_cuda_scratch(const GroupedLoraParams& p) {
  ForwardMemory memory;
  return lay_out(p, nullptr, &memory);
}

int grouped_lora_cuda(const GroupedLoraParams& p, void* scratch, void* stream) {
  ForwardMemory memory;
  lay_out(p, scratch, &memory);
  return with_type(p.dtype, [&](auto* type) {
    return forward<std::remove_pointer_t<decltype(type)>>(p, memory,
                                                          static_cast<cudaStream_t>(stream));
  });
}

int64_t grouped_lora_backward_cuda_scratch(const GroupedLoraBackwardParams& p) {
  BackwardMemory memory;
  return lay_out(p, nullptr, &memory);
}

int grouped_lora_backward_cuda(const GroupedLoraBackwardParams& p, void* scratch, void* stream) {
  // The op has set every gradient to zero.
  if (p.num_tokens == 0 || p.num_adapters == 0 || p.num_routes == 0 || p.d_out == 0) {
    return cudaSuccess;
  }
  BackwardMemory memory;
  lay_out(p, scratch, &memory);
  return with_type(p.dtype, [&](auto* type) {
    return backward<std::remove_pointer_t<decltype(type)>>(p, memory,
                                                           static_cast<cudaStream_t>(stream));
  });
}

}  // namespace milora
