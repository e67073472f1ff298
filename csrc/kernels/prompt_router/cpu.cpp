// Compiled once per instruction set: CMake defines MILORA_ISA as the namespace.
#include "kernels/prompt_router/cpu.h"

#include "kernels/prompt_router/backward_cpu.h"
#include "kernels/prompt_router/forward_cpu.h"

namespace milora::MILORA_ISA {

const PromptRouterCpu kPromptRouterCpu = {
    .pool = pool,
    .head = head,
    .head_backward = head_backward,
    .dots = dots,
    .weights = weights,
    .scatter = scatter,
    .combine = combine,
};

}  // namespace milora::MILORA_ISA
