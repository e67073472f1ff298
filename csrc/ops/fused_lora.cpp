// milora::fused_lora: y[t] = y0 + g (scale B C A x[t] + u y0 + v), y0 = W x[t] + bias, in one
// product.
#include <array>

#include "common/cuda_runtime.h"
#include "kernels/grouped_lora/fused.h"
#include "ops/ops.h"
#include "ops/pool_params.h"

namespace milora {
namespace {

constexpr const char* kOp = "fused_lora";

// torch's own product. The CPU has no fused kernel: its two passes cost no launch, and y stays in
// cache between them for decode.
Tensor linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(w), from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

void check_base(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias) {
  check(x.dim() >= 1, kOp, "x must have at least one dimension, got a scalar");
  check_shape(kOp, "w", w, {-1, x.size(x.dim() - 1)}, "[d_out, d_in]");
  check_dtype(kOp, "w", w, x.scalar_type());
  check_same_device(kOp, "w", w, x);
  if (!bias.has_value()) return;
  check_shape(kOp, "bias", *bias, {w.size(0)}, "[d_out]");
  check_dtype(kOp, "bias", *bias, x.scalar_type());
  check_same_device(kOp, "bias", *bias, x);
  check_contiguous(kOp, "bias", *bias);
}

void run_fused_cuda(const Tensor& x, FusedLoraParams p) {
  check_wgmma(kOp, x, "call linear and grouped_lora_");
  check_rows_on_16(kOp, "x", p.lora.x, p.lora.num_tokens, &p.lora.x_stride);
  check_rows_on_16(kOp, "w", p.w, p.lora.d_out[0], &p.w_stride);
  Tensor workspace = torch::stable::new_empty(x, {fused_lora_workspace(p)}, ScalarType::Byte);
  run_cuda(kOp, x.get_device_index(),
           [&](void* stream) { return fused_lora_cuda(p, workspace.mutable_data_ptr(), stream); });
}

}  // namespace

Tensor fused_lora(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                  const Tensor& pool, const Tensor& offsets, const Tensor& ranks,
                  const Tensor& scales, const Tensor& gates, const Tensor& route_of,
                  const Tensor& adapter_of, int64_t expert) {
  check_base(x, w, bias);
  if (!x.is_cuda()) {
    Tensor y = linear(x, w, bias);
    pool_params(kOp, {y}, x, pool, offsets, ranks, scales, gates, route_of, adapter_of, {expert});
    // In place, on the product that nobody else has seen.
    grouped_lora_pool({y}, x, pool, offsets, ranks, scales, gates, route_of, adapter_of, {expert},
                      kPrefillPath);
    return y;
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = w.size(0);
  Tensor y = torch::stable::new_empty(x, sizes);
  FusedLoraParams p{};
  p.lora =
      pool_params(kOp, {y}, x, pool, offsets, ranks, scales, gates, route_of, adapter_of, {expert});
  p.w = w.const_data_ptr();
  p.w_stride = row_stride(kOp, "w", w);
  p.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  if (y.numel() > 0) run_fused_cuda(x, p);
  return y;
}

}  // namespace milora
