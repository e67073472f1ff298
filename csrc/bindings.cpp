// Op schemas and registration, nothing else. The contracts stand in milora/ops.py.
#include "common/macros.h"
#include "ops/ops.h"

STABLE_TORCH_LIBRARY(milora, m) {
  m.def(
      "grouped_lora_(Tensor(a!)[] y, Tensor x, Tensor pool, Tensor offsets, Tensor ranks, "
      "Tensor scales, Tensor gates, Tensor route_of, Tensor adapter_of, int[] experts, "
      "int path=0, Tensor? rank_gates=None) -> ()");
  m.def(
      "grouped_lora_prepare(Tensor[] y, Tensor x, Tensor pool, Tensor offsets, Tensor ranks, "
      "Tensor scales, Tensor gates, Tensor route_of, Tensor adapter_of, int[] experts, "
      "int path=0) -> Tensor");
  m.def(
      "fused_lora(Tensor x, Tensor w, Tensor? bias, Tensor pool, Tensor offsets, Tensor ranks, "
      "Tensor scales, Tensor gates, Tensor route_of, Tensor adapter_of, int expert) -> Tensor");
  m.def(
      "grouped_lora(Tensor y, Tensor x, Tensor[] a, Tensor[] b, float[] scales, Tensor gates, "
      "Tensor route_of, Tensor adapter_of) -> Tensor");
  m.def(
      "grouped_lora_add_(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, float[] scales, "
      "Tensor gates, Tensor route_of, Tensor adapter_of) -> ()");
  m.def(
      "grouped_lora_backward_(Tensor dy, Tensor x, Tensor[] a, Tensor[] b, float[] scales, "
      "Tensor gates, Tensor route_of, Tensor adapter_of, Tensor(a!)? dx, Tensor(b!)[] da, "
      "Tensor(c!)[] db, Tensor(d!)? dgates) -> ()");
  m.def(
      "prompt_router(Tensor h, Tensor spans, Tensor router_of, Tensor w_sa, Tensor w_r, "
      "Tensor coef, Tensor codes) -> (Tensor, Tensor, Tensor)");
  m.def(
      "prompt_router_pool(Tensor h, Tensor spans, Tensor router_of, Tensor pool, Tensor offsets, "
      "Tensor codes, int num_experts) -> (Tensor, Tensor, Tensor)");
  m.def(
      "prompt_router_backward(Tensor dprobs, Tensor dgates, Tensor dpooled, Tensor h, "
      "Tensor spans, Tensor router_of, Tensor w_sa, Tensor w_r, Tensor coef, Tensor codes, "
      "Tensor probs, Tensor pooled) -> (Tensor, Tensor, Tensor, Tensor)");
}

namespace {

// One host function per op serves every device: it checks, fills Params and dispatches.
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("grouped_lora_", TORCH_BOX(&milora::grouped_lora_pool));
  m.impl("grouped_lora_prepare", TORCH_BOX(&milora::grouped_lora_prepare));
  m.impl("fused_lora", TORCH_BOX(&milora::fused_lora));
  m.impl("grouped_lora", TORCH_BOX(&milora::grouped_lora));
  m.impl("grouped_lora_add_", TORCH_BOX(&milora::grouped_lora_add));
  m.impl("grouped_lora_backward_", TORCH_BOX(&milora::grouped_lora_backward));
  m.impl("prompt_router", TORCH_BOX(&milora::prompt_router));
  m.impl("prompt_router_pool", TORCH_BOX(&milora::prompt_router_pool));
  m.impl("prompt_router_backward", TORCH_BOX(&milora::prompt_router_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(milora, CPU, m) { register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(milora, CUDA, m) { register_ops(m); }

// The loader compares this with the Python package's version before it uses the library.
MILORA_EXPORT const char* milora_version() { return MILORA_VERSION; }

// Architectures of the CUDA kernels in here, "" without any. Said by this library and not by the
// pybind11 module, which another Python's build of the package does not have.
MILORA_EXPORT const char* milora_cuda_archs() { return MILORA_CUDA_ARCHS; }
