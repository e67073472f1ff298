// grouped_lora's backward on the emulator, for tests/test_cuda_emulation.py (ctypes).
#define MILORA_EMULATE
#include "cuda_runtime.h"
// above: the words that the kernels are written in
#include "kernels/grouped_lora/sm80/expand.cuh"
#include "kernels/grouped_lora/sm80/plan.cuh"
#include "kernels/grouped_lora/sm80/shrink.cuh"
#include "kernels/grouped_lora/train/memory.h"
#include "kernels/grouped_lora/train/pack.cuh"
#include "kernels/grouped_lora/train/reduce.cuh"

namespace milora {
namespace {

using namespace train;

template <class T>
void shrink(const GroupedLoraPoolParams& p, const prefill::Workspace& work, bool descending) {
  emulator::launch(1, prefill::kPlanThreads, 0, descending,
                   [&] { prefill::plan_kernel<T, false>(p, work); });
  emulator::launch(2, prefill::kThreads, prefill::kShrinkBytes, descending,
                   [&] { prefill::shrink_kernel<T>(p, work); });
}

template <class T, bool kForB>
void reduce(const GroupedLoraBackwardParams& p, const BackwardMemory& memory,
            const GradTable& table, bool descending) {
  constexpr int64_t kItems = prefill::kRowItems<T>;
  const int64_t width = kForB ? p.d_out : p.d_in;
  for (int adapter = 0; adapter < table.count; ++adapter) {
    for (int rank = 0; rank < table.ranks[adapter]; rank += kItems) {
      emulator::launch(static_cast<unsigned>(ceil_div(width, kItems)), prefill::kThreads,
                       kReduceBytes, descending, [&] {
                         blockIdx.y = static_cast<unsigned>(adapter);
                         blockIdx.z = static_cast<unsigned>(rank / kItems);
                         reduce_kernel<T, kForB>(
                             table, memory.forward,
                             kForB ? memory.coefs.hidden : memory.coefs.grad_hidden,
                             kForB ? p.dy : p.x, kForB ? p.dy_stride : p.x_stride, width);
                       });
    }
  }
}

template <class T>
void run(const GroupedLoraBackwardParams& p, bool descending) {
  BackwardMemory memory;
  std::vector<uint8_t> bytes(lay_out(p, nullptr, &memory) + 256, 0xff);  // NaN
  auto base = reinterpret_cast<uintptr_t>(bytes.data());
  lay_out(p, reinterpret_cast<void*>((base + 255) / 256 * 256), &memory);
  const GroupedLoraPoolParams forward = pool_params(p, memory.pool);
  const GroupedLoraPoolParams reverse = reverse_params(p, memory.pool);
  int64_t pool_at = 0;
  const PackTable table =
      make_pack_table(p.adapters, p.num_adapters, 0, p.d_in, p.d_out, p.dtype, &pool_at);
  for (int adapter = 0; adapter < table.count; ++adapter) {
    emulator::launch(2, kPackThreads, 0, descending, [&] {
      blockIdx.y = static_cast<unsigned>(adapter);
      pack_kernel<T>(table, memory.pool, p.d_in, p.d_out);
    });
  }
  shrink<T>(reverse, memory.reverse, descending);
  const auto units = static_cast<int>(ceil_div(p.d_in, prefill::kUnitColumns));
  emulator::launch(2, prefill::kThreads, prefill::expand_bytes(sizeof(T)), descending,
                   [&] { prefill::expand_kernel<T>(reverse, memory.reverse, units); });
  shrink<T>(forward, memory.forward, descending);
  emulator::launch(2, kFinishThreads, 0, descending, [&] {
    finish_kernel<T>(forward, p.d_out, memory.forward, memory.reverse.partials, memory.coefs);
  });
  const GradTable grads = make_grad_table(p.adapters, p.grads, p.num_adapters, 0);
  reduce<T, false>(p, memory, grads, descending);
  reduce<T, true>(p, memory, grads, descending);
  emulator::launch(static_cast<unsigned>(p.num_routes), kWarp, 0, descending, [&] {
    gate_kernel(memory.coefs.row_dots, p.gates, p.route_of, p.adapter_of, p.num_tokens,
                p.num_adapters, p.dgates);
  });
}

}  // namespace
}  // namespace milora

// One adapter per entry of `ranks`, at most 64. Outputs start as zeros.
extern "C" void emulate_backward(const int64_t* sizes, const void* dy, const void* x,
                                 void* const* a, void* const* b, const int64_t* ranks,
                                 const float* scales, const float* gates, const int32_t* route_of,
                                 const int32_t* adapter_of, void* dx, void* const* da,
                                 void* const* db, float* dgates, int descending) {
  using namespace milora;
  GroupedLoraBackwardParams p{};
  p.num_tokens = sizes[0];
  p.num_routes = sizes[1];
  p.num_adapters = sizes[2];
  p.d_in = sizes[3];
  p.d_out = sizes[4];
  p.x_stride = sizes[5];
  p.dy_stride = sizes[6];
  p.dtype = static_cast<Dtype>(sizes[7]);
  std::vector<LoraWeights> weights;
  std::vector<LoraGrads> grads;
  for (int64_t i = 0; i < p.num_adapters; ++i) {
    weights.push_back({a[i], b[i], static_cast<int32_t>(ranks[i]), scales[i]});
    grads.push_back({da[i], db[i]});
  }
  p.dy = dy;
  p.x = x;
  p.adapters = weights.data();
  p.gates = gates;
  p.route_of = route_of;
  p.adapter_of = adapter_of;
  p.dx = dx;
  p.grads = grads.data();
  p.dgates = dgates;
  switch (p.dtype) {
    case Dtype::kFloat32:
      return run<float>(p, descending != 0);
    case Dtype::kBFloat16:
      return run<__nv_bfloat16>(p, descending != 0);
    case Dtype::kFloat16:
      return run<__half>(p, descending != 0);
  }
}
