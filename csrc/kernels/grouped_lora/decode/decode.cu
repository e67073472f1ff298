// Launches of the decode kernels: one cluster launch on sm90 and sm100, two launches elsewhere.
#include <algorithm>
#include <atomic>

#include "kernels/grouped_lora/decode/cluster.cuh"
#include "kernels/grouped_lora/decode/decode.h"
#include "kernels/grouped_lora/decode/split.cuh"

namespace milora {
namespace {

constexpr int kMaxDevices = 64;

struct Device {
  int index = 0, major = 0, processors = 0;

  bool by_clusters() const { return MILORA_DECODE_BY_CLUSTERS(major); }
};

cudaError_t current_device(Device* device) {
  cudaError_t error = cudaGetDevice(&device->index);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&device->major, cudaDevAttrComputeCapabilityMajor, device->index);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&device->processors, cudaDevAttrMultiProcessorCount, device->index);
}

// No more workers than items can exist, nor than the chip holds at once.
unsigned num_workers(const GroupedLoraPoolParams& p, int64_t fit) {
  return static_cast<unsigned>(std::clamp<int64_t>(p.num_tokens * p.num_slices, 1, fit));
}

cudaLaunchConfig_t cluster_config(cudaLaunchAttribute* cluster, unsigned workers,
                                  cudaStream_t stream) {
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim.x = kLoraSplits;
  cluster->val.clusterDim.y = cluster->val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(workers * kLoraSplits);
  config.blockDim = dim3(kDecodeThreads);
  config.dynamicSmemBytes = sizeof(ClusterShared);
  config.stream = stream;
  config.attrs = cluster;
  config.numAttrs = 1;
  return config;
}

// How many clusters the device holds at once; asked once per device, by whichever thread comes
// first, together with the permission for that much shared memory.
template <class T>
cudaError_t clusters_that_fit(const Device& device, int* clusters) {
  static std::atomic<int> known[kMaxDevices];
  std::atomic<int>& own = known[device.index % kMaxDevices];
  *clusters = own.load(std::memory_order_acquire);
  if (*clusters > 0) return cudaSuccess;
  // Code for an older architecture, compiled by the driver for this one, would do nothing at all.
  cudaFuncAttributes code;
  cudaError_t error = cudaFuncGetAttributes(&code, decode_cluster_kernel<T>);
  if (error != cudaSuccess) return error;
  if (code.ptxVersion < 90) return cudaErrorNoKernelImageForDevice;
  error =
      cudaFuncSetAttribute(decode_cluster_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(sizeof(ClusterShared)));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = cluster_config(&cluster, 1, nullptr);
  error = cudaOccupancyMaxActiveClusters(clusters, decode_cluster_kernel<T>, &config);
  if (error != cudaSuccess) return error;
  if (*clusters < 1) return cudaErrorLaunchOutOfResources;
  own.store(*clusters, std::memory_order_release);
  return cudaSuccess;
}

template <class T>
cudaError_t launch_cluster(const GroupedLoraPoolParams& p, const Device& device,
                           cudaStream_t stream) {
  int fit = 0;
  const cudaError_t error = clusters_that_fit<T>(device, &fit);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = cluster_config(&cluster, num_workers(p, fit), stream);
  return cudaLaunchKernelEx(&config, decode_cluster_kernel<T>, p);
}

// Tokens [begin, begin + kSlabTokens) of a call.
template <class T>
GroupedLoraPoolParams slab_of(GroupedLoraPoolParams p, int64_t begin) {
  p.x = static_cast<const T*>(p.x) + begin * p.x_stride;
  for (int64_t s = 0; s < p.num_slices; ++s) {
    p.y[s] = static_cast<T*>(p.y[s]) + begin * p.y_stride[s];
  }
  p.route_of += begin;
  if (p.rank_gates != nullptr) p.rank_gates = rank_gates_at(p, begin, 0);
  p.num_tokens = std::min<int64_t>(p.num_tokens - begin, kSlabTokens);
  return p;
}

template <class T>
cudaError_t launch_split(const GroupedLoraPoolParams& params, const Device& device, float* sums,
                         cudaStream_t stream) {
  // Two blocks a multiprocessor are sure to fit.
  const int64_t fit = std::max(1, 2 * device.processors / kLoraSplits);
  for (int64_t begin = 0; begin < params.num_tokens; begin += kSlabTokens) {
    const GroupedLoraPoolParams p = slab_of<T>(params, begin);
    const unsigned blocks = num_workers(p, fit) * kLoraSplits;
    decode_split_kernel<T, false><<<blocks, kDecodeThreads, 0, stream>>>(p, sums);
    decode_split_kernel<T, true><<<blocks, kDecodeThreads, 0, stream>>>(p, sums);
  }
  return cudaSuccess;
}

}  // namespace

int64_t grouped_lora_decode_workspace(const GroupedLoraPoolParams& p) {
  Device device;
  if (current_device(&device) == cudaSuccess && device.by_clusters()) return 0;
  GroupedLoraPoolParams slab = p;
  const int64_t tokens = std::min<int64_t>(p.num_tokens, kSlabTokens);
  return split_sums_at(slab, tokens, 0) * static_cast<int64_t>(sizeof(float));
}

int grouped_lora_decode_cuda(const GroupedLoraPoolParams& params, void* workspace, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  Device device;
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return static_cast<int>(error);
  const int launched = dispatch_device_type(params.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    error = device.by_clusters()
                ? launch_cluster<T>(params, device, stream)
                : launch_split<T>(params, device, static_cast<float*>(workspace), stream);
  });
  return error != cudaSuccess ? static_cast<int>(error) : launched;
}

}  // namespace milora
