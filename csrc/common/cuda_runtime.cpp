// The one place that talks to libtorch_cuda. The library does not link to it, so that the same file
// loads next to a CPU-only torch; the stream getter is looked up in the copy that torch has loaded.
#include "common/cuda_runtime.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

namespace milora {
namespace {

using GetStream = int32_t (*)(int32_t device_index, void** stream);

GetStream find_get_stream() {
  // RTLD_NOLOAD: never load a second copy. RTLD_DEFAULT would not see it, since Python opens its
  // extensions with local symbols.
  void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  check(library != nullptr, "milora",
        "torch must be built with CUDA, got one without "
        "libtorch_cuda.so");
  void* symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
  check(symbol != nullptr, "milora",
        "torch must be 2.10 or newer, got one without "
        "aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<GetStream>(symbol);
}

}  // namespace

void* current_cuda_stream(int32_t device_index) {
  static const GetStream get_stream = find_get_stream();
  void* stream = nullptr;
  check(get_stream(device_index, &stream) == 0, "milora",
        "torch must give the current CUDA stream, got an error for device ", device_index);
  return stream;
}

const char* take_cuda_error(int error) {
  cudaGetLastError();
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace milora
