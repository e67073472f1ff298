// The decode kernels of grouped_lora_, run by the stand-in for CUDA; called by test_cuda_emulation.
#include "kernels/grouped_lora/decode/cluster.cuh"
#include "kernels/grouped_lora/decode/split.cuh"
#include "run.h"

using namespace milora;

extern "C" int64_t params_bytes() { return sizeof(milora::GroupedLoraPoolParams); }

// The cluster form, or the two launches of the split form with sums full of NaN.
extern "C" void decode(const milora::GroupedLoraPoolParams* params, int clusters, unsigned workers,
                       int order) {
  const auto& p = *params;
  simt::machine.order = order;
  simt::machine.readable = {
      simt::range(p.pool, p.pool_bytes),
      simt::range(p.x, ((p.num_tokens - 1) * p.x_stride + p.d_in) * element_size(p.dtype))};
  simt::with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (clusters) {
      simt::launch(workers * kLoraSplits, 1, kLoraSplits, kDecodeThreads, sizeof(ClusterShared),
                   [&] { decode_cluster_kernel<T>(p); });
      return;
    }
    std::vector<float> sums(split_sums_at(p, p.num_tokens, 0), NAN);
    simt::launch(workers * kLoraSplits, 1, 1, kDecodeThreads, 0,
                 [&] { decode_split_kernel<T, false>(p, sums.data()); });
    simt::launch(workers * kLoraSplits, 1, 1, kDecodeThreads, 0,
                 [&] { decode_split_kernel<T, true>(p, sums.data()); });
  });
}
