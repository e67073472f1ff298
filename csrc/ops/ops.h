// The host functions behind the schemas in bindings.cpp.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "common/torch_shim.h"

namespace milora {

using Tensors = std::vector<Tensor>;

void grouped_lora_pool(const Tensors& y, const Tensor& x, const Tensor& pool, const Tensor& offsets,
                       const Tensor& ranks, const Tensor& scales, const Tensor& gates,
                       const Tensor& route_of, const Tensor& adapter_of,
                       const std::vector<int64_t>& experts, int64_t path,
                       const std::optional<Tensor>& rank_gates = std::nullopt);

// [bytes of what was checked] uint8 on the CPU, for milora_grouped_lora_run.
Tensor grouped_lora_prepare(const Tensors& y, const Tensor& x, const Tensor& pool,
                            const Tensor& offsets, const Tensor& ranks, const Tensor& scales,
                            const Tensor& gates, const Tensor& route_of, const Tensor& adapter_of,
                            const std::vector<int64_t>& experts, int64_t path);

Tensor fused_lora(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                  const Tensor& pool, const Tensor& offsets, const Tensor& ranks,
                  const Tensor& scales, const Tensor& gates, const Tensor& route_of,
                  const Tensor& adapter_of, int64_t expert);

Tensor grouped_lora(const Tensor& y, const Tensor& x, const Tensors& a, const Tensors& b,
                    const std::vector<double>& scales, const Tensor& gates, const Tensor& route_of,
                    const Tensor& adapter_of);

void grouped_lora_add(const Tensor& y, const Tensor& x, const Tensors& a, const Tensors& b,
                      const std::vector<double>& scales, const Tensor& gates,
                      const Tensor& route_of, const Tensor& adapter_of);

void grouped_lora_backward(const Tensor& dy, const Tensor& x, const Tensors& a, const Tensors& b,
                           const std::vector<double>& scales, const Tensor& gates,
                           const Tensor& route_of, const Tensor& adapter_of,
                           const std::optional<Tensor>& dx, const Tensors& da, const Tensors& db,
                           const std::optional<Tensor>& dgates);

std::tuple<Tensor, Tensor, Tensor> prompt_router(const Tensor& h, const Tensor& spans,
                                                 const Tensor& router_of, const Tensor& w_sa,
                                                 const Tensor& w_r, const Tensor& coef,
                                                 const Tensor& codes);

std::tuple<Tensor, Tensor, Tensor> prompt_router_pool(const Tensor& h, const Tensor& spans,
                                                      const Tensor& router_of, const Tensor& pool,
                                                      const Tensor& offsets, const Tensor& codes,
                                                      int64_t num_experts);

std::tuple<Tensor, Tensor, Tensor, Tensor> prompt_router_backward(
    const Tensor& dprobs, const Tensor& dgates, const Tensor& dpooled, const Tensor& h,
    const Tensor& spans, const Tensor& router_of, const Tensor& w_sa, const Tensor& w_r,
    const Tensor& coef, const Tensor& codes, const Tensor& probs, const Tensor& pooled);

}  // namespace milora
