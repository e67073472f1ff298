// grouped_lora_'s decode kernels on the emulator, for tests/test_emulated_decode.py (ctypes).
#include "driver.h"
#include "kernels/grouped_lora/decode/cluster.cuh"
#include "kernels/grouped_lora/decode/split.cuh"

MILORA_EXPORT int64_t params_bytes() { return sizeof(milora::GroupedLoraPoolParams); }

// The cluster form, or the two launches of the split form.
MILORA_EXPORT void decode(const milora::GroupedLoraPoolParams* params, int clusters,
                          unsigned workers, int order) {
  using namespace milora;
  const GroupedLoraPoolParams& p = *params;
  const unsigned blocks = workers * kLoraSplits;
  emulator::start(order, p);
  dispatch_device_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (clusters) {
      return emulator::launch(
          blocks, kDecodeThreads, sizeof(ClusterShared), [&] { decode_cluster_kernel<T>(p); },
          kLoraSplits);
    }
    emulator::Memory memory(split_sums_at(p, p.num_tokens, 0) * sizeof(float));
    auto* sums = static_cast<float*>(memory.data());
    emulator::launch(blocks, kDecodeThreads, 0, [&] { decode_split_kernel<T, false>(p, sums); });
    emulator::launch(blocks, kDecodeThreads, 0, [&] { decode_split_kernel<T, true>(p, sums); });
  });
}
