// How an op reaches CUDA, if the library was built with it: torch's stream of a device, and one
// message for what goes wrong. No CUDA header here: CPU builds compile this too.
#pragma once

#include <cstdint>

#include "common/torch_shim.h"

namespace milora {

#ifdef MILORA_CUDA
// torch's current stream (a cudaStream_t) on a device.
void* current_cuda_stream(int32_t device_index);
// The text of an error, which the next launch shall not report again.
const char* take_cuda_error(int error);

// Makes a device current and calls launch(stream), which returns a cudaError_t as int.
template <class Launch>
void run_cuda(const char* op, int32_t device, const Launch& launch) {
  torch::stable::accelerator::DeviceGuard guard(device);
  const int error = launch(current_cuda_stream(device));
  check(error == 0, op, "the CUDA launch must succeed, got ", take_cuda_error(error));
}
#else
template <class Launch>
[[noreturn]] void run_cuda(const char* op, int32_t, const Launch&) {
  fail(op,
       "tensors must be on the CPU, because this milora was built without CUDA, got CUDA "
       "tensors; rebuild with MILORA_CUDA=1");
}
#endif

}  // namespace milora
