// The prompt router's kernels on the emulator, for tests/test_emulated_router.py (ctypes).
#include "driver.h"
#include "kernels/prompt_router/backward.cuh"
#include "kernels/prompt_router/head.cuh"

namespace milora {
namespace {

void start(int order, const PromptRouterParams& p) {
  const int64_t w_sa = p.w_sa == nullptr ? 0 : p.num_routers * p.d * sizeof(float);
  emulator::start(order, {emulator::rows(p.h, p.num_tokens, p.h_stride, p.d, p.dtype),
                          {p.w_sa, w_sa},
                          {p.pool, p.pool_bytes}});
}

unsigned column_blocks(const PromptRouterParams& p) {
  return static_cast<unsigned>((p.d + kRouterThreads - 1) / kRouterThreads);
}

// `any` for rows that are not whole vectors, else the code for so many vectors a thread.
template <class T>
void pool(const PromptRouterParams& p, const RouterPartials& partials) {
  const auto launch = [&](auto* kernel) {
    emulator::launch(static_cast<unsigned>(max_chunks(p)), kRouterThreads, 0,
                     [&] { kernel(p, partials); });
  };
  constexpr int64_t kBlockColumns = kRouterThreads * kVecOf<T>;
  if (!in_vectors<T>(p) || p.d > 8 * kBlockColumns) return launch(router_pool_any_kernel<T>);
  if (p.d <= kBlockColumns) return launch(router_pool_kernel<T, 1>);
  if (p.d <= 2 * kBlockColumns) return launch(router_pool_kernel<T, 2>);
  if (p.d <= 4 * kBlockColumns) return launch(router_pool_kernel<T, 4>);
  launch(router_pool_kernel<T, 8>);
}

template <class T, int kWidth>
void backward(const PromptRouterBackwardParams& params, const RouterBackwardScratch& scratch) {
  const PromptRouterParams& p = params.forward;
  const auto prompts = static_cast<unsigned>(p.num_prompts);
  const auto chunks = static_cast<unsigned>(max_chunks(p));
  const dim3 combine(static_cast<unsigned>(p.num_routers), column_blocks(p));
  const auto launch = [](dim3 grid, const auto& kernel) {
    emulator::launch(grid, kRouterThreads, 0, kernel);
  };
  launch(prompts, [&] { router_head_backward_kernel(params, scratch); });
  launch(chunks, [&] { router_dots_kernel<T, kWidth>(p, scratch); });
  launch(prompts, [&] { router_weights_kernel(p, scratch); });
  launch(chunks, [&] { router_scatter_kernel<T, kWidth>(params, scratch); });
  launch(combine, [&] { router_combine_kernel(params, scratch); });
}

}  // namespace
}  // namespace milora

MILORA_EXPORT int64_t params_bytes() { return sizeof(milora::PromptRouterParams); }

MILORA_EXPORT void router_forward(const milora::PromptRouterParams* params, int order) {
  using namespace milora;
  const PromptRouterParams& p = *params;
  RouterPartials partials;
  emulator::Memory memory(lay_out(p, nullptr, &partials));
  lay_out(p, memory.data(), &partials);
  start(order, p);
  dispatch_device_type(
      p.dtype, [&](auto* type) { pool<std::remove_pointer_t<decltype(type)>>(p, partials); });
  emulator::launch({static_cast<unsigned>(p.num_prompts), column_blocks(p)}, kRouterThreads, 0,
                   [&] { router_head_kernel(p, partials); });
}

MILORA_EXPORT void router_backward(const milora::PromptRouterBackwardParams* params, int order) {
  using namespace milora;
  const PromptRouterParams& p = params->forward;
  RouterBackwardScratch scratch;
  emulator::Memory memory(lay_out(p, nullptr, &scratch));
  lay_out(p, memory.data(), &scratch);
  start(order, p);
  dispatch_device_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (in_vectors<T>(p)) {
      backward<T, kVecOf<T>>(*params, scratch);
    } else {
      backward<T, 1>(*params, scratch);
    }
  });
}
