// grouped_lora's backward on the emulator, for tests/test_emulated_train.py (ctypes).
#include "driver.h"
#include "kernels/grouped_lora/sm80/expand.cuh"
#include "kernels/grouped_lora/sm80/plan.cuh"
#include "kernels/grouped_lora/sm80/shrink.cuh"
#include "kernels/grouped_lora/train/memory.h"
#include "kernels/grouped_lora/train/pack.cuh"
#include "kernels/grouped_lora/train/reduce.cuh"

namespace milora {
namespace {

using namespace train;

constexpr unsigned kBlocks = 2;

template <class T>
void shrink(const GroupedLoraPoolParams& p, const prefill::Workspace& work) {
  emulator::launch(1, prefill::kPlanThreads, 0,
                   [&] { prefill::plan_kernel<T, prefill::kTileRows, false>(p, work); });
  emulator::launch(kBlocks, prefill::kThreads, prefill::kShrinkBytes,
                   [&] { prefill::shrink_kernel<T>(p, work); });
}

template <class T, bool kForB>
void reduce(const GroupedLoraBackwardParams& p, const BackwardMemory& memory,
            const GradTable& table) {
  const int64_t coefs_width = memory.forward.partials.width;
  constexpr int64_t kItems = prefill::kRowItems<T>;
  const int64_t width = kForB ? p.d_out : p.d_in;
  const int max_rank = *std::max_element(table.ranks, table.ranks + table.count);
  const dim3 grid(static_cast<unsigned>(ceil_div(width, kItems)),
                  static_cast<unsigned>(table.count),
                  static_cast<unsigned>(ceil_div(max_rank, kItems)));
  emulator::launch(grid, prefill::kThreads, kReduceBytes, [&] {
    reduce_kernel<T, kForB>(table, memory.forward,
                            kForB ? memory.coefs.hidden : memory.coefs.grad_hidden, coefs_width,
                            kForB ? p.dy : p.x, kForB ? p.dy_stride : p.x_stride, width);
  });
}

template <class T>
void backward(const GroupedLoraBackwardParams& p, const BackwardMemory& memory) {
  const GroupedLoraPoolParams forward = pool_params(p, memory.pool);
  const GroupedLoraPoolParams reverse = reverse_params(p, memory.pool);
  int64_t pool_at = 0;
  const PackTable table =
      make_pack_table(p.adapters, p.num_adapters, 0, p.d_in, p.d_out, p.dtype, &pool_at);
  emulator::launch({kBlocks, static_cast<unsigned>(table.count)}, kPackThreads, 0,
                   [&] { pack_kernel<T>(table, memory.pool, p.d_in, p.d_out); });
  shrink<T>(reverse, memory.reverse);
  const auto units = static_cast<int>(ceil_div(p.d_in, prefill::kUnitColumns));
  emulator::launch(kBlocks, prefill::kThreads, prefill::expand_bytes(sizeof(T)),
                   [&] { prefill::expand_kernel<T>(reverse, memory.reverse, units); });
  shrink<T>(forward, memory.forward);
  emulator::launch(kBlocks, kFinishThreads, 0, [&] {
    finish_kernel<T>(forward, p.d_out, memory.forward, memory.reverse.partials, memory.coefs);
  });
  const GradTable grads = make_grad_table(p.adapters, p.grads, p.num_adapters, 0);
  reduce<T, false>(p, memory, grads);
  reduce<T, true>(p, memory, grads);
  emulator::launch(static_cast<unsigned>(p.num_routes), kWarp, 0, [&] {
    gate_kernel(memory.coefs.row_dots, p.gates, p.route_of, p.adapter_of, p.num_tokens,
                p.num_adapters, p.dgates);
  });
}

}  // namespace
}  // namespace milora

MILORA_EXPORT int64_t params_bytes() { return sizeof(milora::GroupedLoraBackwardParams); }

// Of at most kTableSize adapters. Outputs start as zeros.
MILORA_EXPORT void train_backward(const milora::GroupedLoraBackwardParams* params, int order) {
  using namespace milora;
  const GroupedLoraBackwardParams& p = *params;
  BackwardMemory parts;
  emulator::Memory memory(lay_out(p, nullptr, &parts));
  lay_out(p, memory.data(), &parts);
  emulator::start(order,
                  {memory.range(), emulator::rows(p.x, p.num_tokens, p.x_stride, p.d_in, p.dtype),
                   emulator::rows(p.dy, p.num_tokens, p.dy_stride, p.d_out, p.dtype),
                   emulator::rows(p.dx, p.num_tokens, p.d_in, p.d_in, p.dtype)});
  dispatch_device_type(
      p.dtype, [&](auto* type) { backward<std::remove_pointer_t<decltype(type)>>(p, parts); });
}
