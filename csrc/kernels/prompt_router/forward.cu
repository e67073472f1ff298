// Launches of the prompt router's forward: partials of all chunks, then the prompts' heads.
#include "kernels/prompt_router/head.cuh"

namespace milora {
namespace {

// One code for each number of 16-byte vectors that a thread has of a row; powers of two only, since
// each costs compile time.
template <class T>
void launch_pool(const PromptRouterParams& p, const RouterPartials& partials, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(max_chunks(p));
  const auto launch = [&](auto* kernel) {
    kernel<<<blocks, kRouterThreads, 0, stream>>>(p, partials);
  };
  constexpr int64_t kBlockColumns = kRouterThreads * kVecOf<T>;  // 2048 of 16 bits
  if (!in_vectors<T>(p) || p.d > 8 * kBlockColumns) {
    launch(router_pool_any_kernel<T>);
  } else if (p.d <= kBlockColumns) {
    launch(router_pool_kernel<T, 1>);
  } else if (p.d <= 2 * kBlockColumns) {
    launch(router_pool_kernel<T, 2>);
  } else if (p.d <= 4 * kBlockColumns) {
    launch(router_pool_kernel<T, 4>);
  } else {
    launch(router_pool_kernel<T, 8>);
  }
}

}  // namespace

int64_t prompt_router_cuda_scratch(const PromptRouterParams& p) {
  RouterPartials partials;
  return lay_out(p, nullptr, &partials);
}

int prompt_router_cuda(const PromptRouterParams& p, void* scratch, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  RouterPartials partials;
  lay_out(p, scratch, &partials);
  const dim3 heads(static_cast<unsigned>(p.num_prompts),
                   static_cast<unsigned>((p.d + kRouterThreads - 1) / kRouterThreads));
  return dispatch_device_type(p.dtype, [&](auto* type) {
    launch_pool<std::remove_pointer_t<decltype(type)>>(p, partials, stream);
    router_head_kernel<<<heads, kRouterThreads, 0, stream>>>(p, partials);
  });
}

}  // namespace milora
