// Launches of the prompt router's backward.
#include "kernels/prompt_router/backward.cuh"

namespace milora {

int64_t prompt_router_backward_cuda_scratch(const PromptRouterParams& p) {
  RouterBackwardScratch scratch;
  return lay_out(p, nullptr, &scratch);
}

int prompt_router_backward_cuda(const PromptRouterBackwardParams& params, void* memory,
                                void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const PromptRouterParams& p = params.forward;
  RouterBackwardScratch scratch;
  lay_out(p, memory, &scratch);
  const auto prompts = static_cast<unsigned>(p.num_prompts);
  const auto chunks = static_cast<unsigned>(max_chunks(p));
  // At least one block of columns: dcoef has 12 even where d is smaller.
  const dim3 combine_grid(static_cast<unsigned>(p.num_routers),
                          static_cast<unsigned>((p.d + kRouterThreads - 1) / kRouterThreads));
  return dispatch_device_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool wide = in_vectors<T>(p);
    const auto dots = wide ? router_dots_kernel<T, kVecOf<T>> : router_dots_kernel<T, 1>;
    const auto scatter = wide ? router_scatter_kernel<T, kVecOf<T>> : router_scatter_kernel<T, 1>;
    router_head_backward_kernel<<<prompts, kRouterThreads, 0, stream>>>(params, scratch);
    dots<<<chunks, kRouterThreads, 0, stream>>>(p, scratch);
    router_weights_kernel<<<prompts, kRouterThreads, 0, stream>>>(p, scratch);
    scatter<<<chunks, kRouterThreads, 0, stream>>>(params, scratch);
    if (p.num_routers > 0) {
      router_combine_kernel<<<combine_grid, kRouterThreads, 0, stream>>>(params, scratch);
    }
  });
}

}  // namespace milora
