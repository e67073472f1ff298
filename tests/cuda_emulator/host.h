// The CUDA runtime as the launches under csrc/ see it: a launch runs its kernel on the emulator at
// once, if a GPU of the described kind would take it. Force-included into the launches' sources,
// whose kernel<<<...>>>(...) tests/cuda_emulation.py writes as calls.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <map>

#include "launch.h"

using cudaStream_t = void*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  int ptxVersion;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
constexpr unsigned long long cudaEnableDefault = 0;

namespace milora::emulator {

struct Device {
  int major = 9, minor = 0, processors = 2, clusters = 2;
  size_t shared_bytes() const {  // that one block may have
    if (major == 9 || major == 10) return 227 << 10;
    return major == 8 && minor == 0 ? 163 << 10 : 99 << 10;
  }
};
inline Device device;
inline std::map<const void*, size_t> shared_limits;  // asked for, by kernel

template <class F>
const void* key(F* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

inline cudaError_t check_launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                                unsigned cluster) {
  const auto limit = shared_limits.find(kernel);
  const size_t threads = size_t{block.x} * block.y * block.z;
  const bool fits = grid.x >= 1 && grid.x < 1u << 31 && grid.y >= 1 && grid.y < 1u << 16 &&
                    grid.z >= 1 && grid.z < 1u << 16 && threads >= 1 && threads <= 1024 &&
                    cluster >= 1 && cluster <= 8 && grid.x % cluster == 0;
  if (!fits) return cudaErrorInvalidConfiguration;
  if (cluster > 1 && device.major < 9) return cudaErrorInvalidConfiguration;
  const size_t asked = limit == shared_limits.end() ? 48 << 10 : limit->second;
  const size_t most = std::min(asked, device.shared_bytes());
  return shared_bytes <= most ? cudaSuccess : cudaErrorInvalidValue;
}

// kernel<<<grid, block, shared_bytes, stream>>>(...)
inline void run_kernel(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                       const std::function<void()>& call, unsigned cluster = 1) {
  const cudaError_t error = check_launch(kernel, grid, block, shared_bytes, cluster);
  if (error != cudaSuccess) {
    last_error = error;
    return;
  }
  launch(grid, static_cast<int>(block.x), shared_bytes, call, cluster);
}

}  // namespace milora::emulator

inline cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const milora::emulator::Device& device = milora::emulator::device;
  *value = attribute == cudaDevAttrMultiProcessorCount      ? device.processors
           : attribute == cudaDevAttrComputeCapabilityMajor ? device.major
                                                            : device.minor;
  return cudaSuccess;
}
template <class F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > milora::emulator::device.shared_bytes()) {
    return cudaErrorInvalidValue;
  }
  milora::emulator::shared_limits[milora::emulator::key(kernel)] = bytes;
  return cudaSuccess;
}
template <class F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
template <class F>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, F* kernel,
                                           const cudaLaunchConfig_t* config) {
  *clusters = milora::emulator::device.clusters;
  return milora::emulator::check_launch(milora::emulator::key(kernel), config->gridDim,
                                        config->blockDim, config->dynamicSmemBytes,
                                        config->attrs->val.clusterDim.x);
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... a) {
  milora::emulator::run_kernel(
      milora::emulator::key(kernel), config->gridDim, config->blockDim, config->dynamicSmemBytes,
      config->stream, [&] { kernel(a...); }, config->attrs->val.clusterDim.x);
  return cudaGetLastError();
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  if (strcmp(name, "cuTensorMapEncodeTiled") != 0) return cudaErrorInvalidValue;
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
