// The launches under csrc/ on the emulator (ctypes). Each returns its cudaError_t.
#include "driver.h"
#include "host.h"
#include "kernels/grouped_lora/cuda.h"
#include "kernels/grouped_lora/decode/decode.h"
#include "kernels/grouped_lora/fused.h"
#include "kernels/grouped_lora/prefill.h"
#include "kernels/prompt_router/cuda.h"

namespace emulator = milora::emulator;

// By the names that Python gives them.
MILORA_EXPORT int64_t bytes_of_PoolParams() { return sizeof(milora::GroupedLoraPoolParams); }
MILORA_EXPORT int64_t bytes_of_TrainParams() { return sizeof(milora::GroupedLoraParams); }
MILORA_EXPORT int64_t bytes_of_TrainBackwardParams() {
  return sizeof(milora::GroupedLoraBackwardParams);
}
MILORA_EXPORT int64_t bytes_of_RouterParams() { return sizeof(milora::PromptRouterParams); }
MILORA_EXPORT int64_t bytes_of_RouterBackwardParams() {
  return sizeof(milora::PromptRouterBackwardParams);
}

MILORA_EXPORT void set_device(int major, int minor, int processors, int clusters) {
  emulator::device = {major, minor, processors, clusters};
}

MILORA_EXPORT int decode(const milora::GroupedLoraPoolParams* p, int order) {
  emulator::Memory memory(milora::grouped_lora_decode_workspace(*p));
  emulator::start(order, *p, {memory.range()});
  return milora::grouped_lora_decode_cuda(*p, memory.data(), nullptr);
}

MILORA_EXPORT int prefill(const milora::GroupedLoraPoolParams* p, int wgmma, int order) {
  emulator::Memory memory(milora::grouped_lora_prefill_workspace(*p));
  emulator::start(order, *p, {memory.range()});
  return wgmma ? milora::grouped_lora_prefill_wgmma_cuda(*p, memory.data(), nullptr)
               : milora::grouped_lora_prefill_cuda(*p, memory.data(), nullptr);
}

MILORA_EXPORT int fused_lora(const milora::GroupedLoraPoolParams* lora, const void* w,
                             int64_t w_stride, const void* bias, int order) {
  const milora::FusedLoraParams p{*lora, w, w_stride, bias};
  emulator::Memory memory(milora::fused_lora_workspace(p));
  emulator::start(order, p.lora, {memory.range()});
  return milora::fused_lora_cuda(p, memory.data(), nullptr);
}

MILORA_EXPORT int train_backward(const milora::GroupedLoraBackwardParams* params, int order) {
  const milora::GroupedLoraBackwardParams& p = *params;
  emulator::Memory memory(milora::grouped_lora_backward_cuda_scratch(p));
  emulator::start(order,
                  {memory.range(), emulator::rows(p.x, p.num_tokens, p.x_stride, p.d_in, p.dtype),
                   emulator::rows(p.dy, p.num_tokens, p.dy_stride, p.d_out, p.dtype),
                   emulator::rows(p.dx, p.num_tokens, p.d_in, p.d_in, p.dtype)});
  return milora::grouped_lora_backward_cuda(p, memory.data(), nullptr);
}

MILORA_EXPORT int train_forward(const milora::GroupedLoraParams* params, int order) {
  const milora::GroupedLoraParams& p = *params;
  emulator::Memory memory(milora::grouped_lora_cuda_scratch(p));
  emulator::start(order,
                  {memory.range(), emulator::rows(p.x, p.num_tokens, p.x_stride, p.d_in, p.dtype),
                   emulator::rows(p.y, p.num_tokens, p.y_stride, p.d_out, p.dtype),
                   emulator::rows(p.out, p.num_tokens, p.d_out, p.d_out, p.dtype)});
  return milora::grouped_lora_cuda(p, memory.data(), nullptr);
}

namespace {

void start_router(int order, const milora::PromptRouterParams& p, emulator::Memory& memory) {
  const int64_t w_sa = p.w_sa == nullptr ? 0 : p.num_routers * p.d * sizeof(float);
  emulator::start(order, {emulator::rows(p.h, p.num_tokens, p.h_stride, p.d, p.dtype),
                          {p.w_sa, w_sa},
                          {p.pool, p.pool_bytes},
                          memory.range()});
}

}  // namespace

MILORA_EXPORT int router_forward(const milora::PromptRouterParams* p, int order) {
  emulator::Memory memory(milora::prompt_router_cuda_scratch(*p));
  start_router(order, *p, memory);
  return milora::prompt_router_cuda(*p, memory.data(), nullptr);
}

MILORA_EXPORT int router_backward(const milora::PromptRouterBackwardParams* p, int order) {
  emulator::Memory memory(milora::prompt_router_backward_cuda_scratch(p->forward));
  start_router(order, p->forward, memory);
  return milora::prompt_router_backward_cuda(*p, memory.data(), nullptr);
}
