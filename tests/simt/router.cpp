// The prompt router's kernels, run by the stand-in for CUDA; called by test_cuda_on_cpu.py.
#include "kernels/prompt_router/backward.cuh"
#include "kernels/prompt_router/head.cuh"
#include "run.h"

namespace {

using namespace milora;

// `any` for rows that are not whole vectors, else the code for `each` vectors a thread.
template <class T>
void pool(const PromptRouterParams& p, const RouterPartials& partials) {
  const auto run = [&](auto* kernel) {
    simt::launch(static_cast<unsigned>(max_chunks(p)), 1, 1, kRouterThreads, 0,
                 [&] { kernel(p, partials); });
  };
  constexpr int64_t kBlockColumns = kRouterThreads * kVecOf<T>;
  if (!in_vectors<T>(p) || p.d > 8 * kBlockColumns) return run(router_pool_any_kernel<T>);
  if (p.d <= kBlockColumns) return run(router_pool_kernel<T, 1>);
  if (p.d <= 2 * kBlockColumns) return run(router_pool_kernel<T, 2>);
  if (p.d <= 4 * kBlockColumns) return run(router_pool_kernel<T, 4>);
  run(router_pool_kernel<T, 8>);
}

unsigned columns(const PromptRouterParams& p) {
  return static_cast<unsigned>((p.d + kRouterThreads - 1) / kRouterThreads);
}

template <class T, int kWidth>
void backward(const PromptRouterBackwardParams& params, const RouterBackwardScratch& scratch) {
  const PromptRouterParams& p = params.forward;
  const auto prompts = static_cast<unsigned>(p.num_prompts);
  const auto chunks = static_cast<unsigned>(max_chunks(p));
  const auto run = [](unsigned x, unsigned y, auto kernel) {
    simt::launch(x, y, 1, kRouterThreads, 0, kernel);
  };
  run(prompts, 1, [&] { router_head_backward_kernel(params, scratch); });
  run(chunks, 1, [&] { router_dots_kernel<T, kWidth>(p, scratch); });
  run(prompts, 1, [&] { router_weights_kernel(p, scratch); });
  run(chunks, 1, [&] { router_scatter_kernel<T, kWidth>(params, scratch); });
  run(static_cast<unsigned>(p.num_routers), columns(p),
      [&] { router_combine_kernel(params, scratch); });
}

void readable(const PromptRouterParams& p) {
  const int64_t rows = p.num_tokens > 0 ? (p.num_tokens - 1) * p.h_stride + p.d : 0;
  simt::machine.readable = {simt::range(p.h, rows * element_size(p.dtype)),
                            simt::range(p.w_sa, p.w_sa == nullptr ? 0 : p.num_routers * p.d * 4),
                            simt::range(p.pool, p.pool_bytes)};
}

}  // namespace

extern "C" int64_t params_bytes() { return sizeof(milora::PromptRouterParams); }

extern "C" void router_forward(const milora::PromptRouterParams* params, int order) {
  const auto& p = *params;
  simt::machine.order = order;
  readable(p);
  const int64_t chunks = max_chunks(p);
  std::vector<float> vectors(chunks * p.d + 4, NAN), maxima(chunks, NAN), sums(chunks, NAN);
  std::vector<int32_t> arrived(p.num_prompts, 12345);
  auto* aligned =
      reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(vectors.data()) + 15) & ~uintptr_t{15});
  const RouterPartials partials{aligned, maxima.data(), sums.data(), arrived.data()};
  simt::with_type(p.dtype,
                  [&](auto* type) { pool<std::remove_pointer_t<decltype(type)>>(p, partials); });
  simt::launch(static_cast<unsigned>(p.num_prompts), columns(p), 1, kRouterThreads, 0,
               [&] { router_head_kernel(p, partials); });
}

extern "C" void router_backward(const milora::PromptRouterBackwardParams* params, int order) {
  const auto& p = params->forward;
  simt::machine.order = order;
  readable(p);
  const int64_t rows = p.num_prompts * p.d;
  std::vector<float> dvector(rows + 4, NAN), activated(rows, NAN), scores(p.num_tokens, NAN);
  std::vector<float> dlogits(p.num_prompts * p.num_experts, NAN), dots(p.num_tokens, NAN);
  std::vector<float> dcoef(p.num_prompts * kNumCoefs, NAN), dw_sa(max_chunks(p) * p.d, NAN);
  std::vector<int32_t> argmax(rows, -7);
  const RouterBackwardScratch scratch{dvector.data(), activated.data(), dlogits.data(),
                                      dcoef.data(),   scores.data(),    dots.data(),
                                      dw_sa.data(),   argmax.data()};
  simt::with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (in_vectors<T>(p)) {
      backward<T, kVecOf<T>>(*params, scratch);
    } else {
      backward<T, 1>(*params, scratch);
    }
  });
}
