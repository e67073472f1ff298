// The few instructions of sm90 that the kernels use, one function each: clusters, distributed
// shared memory, barriers in shared memory, bulk copies. On older architectures nothing calls them,
// and they compile to nothing.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MILORA_SM90 1
#endif

namespace milora {

// The kernel's dynamic shared memory, at the same address in every block of a cluster.
__device__ __forceinline__ void* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank = 0;
#ifdef MILORA_SM90
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

// What a block's threads wrote before arriving is seen by those of the cluster after waiting.
// All threads of all blocks arrive and wait in turns. Not the .aligned forms: those need the warp
// to stand together, which a branch before may have changed.
__device__ __forceinline__ void cluster_arrive() {
#ifdef MILORA_SM90
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
// Without a fence, which the release costs (of the whole GPU, says the SASS): where the other
// blocks must only know that this thread has gone on.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#ifdef MILORA_SM90
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#ifdef MILORA_SM90
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// *pointer as block `rank` of the cluster has it in its shared memory.
__device__ __forceinline__ float read_remote(const float* pointer, int rank) {
  float value = 0;
#ifdef MILORA_SM90
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_address(pointer)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
#endif
  return value;
}

// A barrier that one thread arrives at, with the number of bytes that copies will bring. Its phases
// are numbered from 0; a wait names the parity of the phase that must have ended.
__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
#ifdef MILORA_SM90
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
#endif
}
// After barrier_init, in the same thread, before __syncthreads: makes it known to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
#ifdef MILORA_SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
#ifdef MILORA_SM90
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
#ifdef MILORA_SM90
  uint32_t done = 0;
  while (done == 0) {  // try_wait sleeps for a while itself
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
#endif
}

// Copies bytes (a multiple of 16, both ends on 16) from global to this block's shared memory, and
// tells the barrier.
__device__ __forceinline__ void bulk_load(void* to, const void* from, uint32_t bytes,
                                          uint64_t* barrier) {
#ifdef MILORA_SM90
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}

}  // namespace milora
