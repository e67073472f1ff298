// What a warp-specialised matrix kernel of sm_90a needs beside kernels/cuda/sm90.cuh: barriers with
// several arrivals, tensor copies, wgmma. Also emulated (see kernels/cuda/tensor_core.cuh).
#pragma once

#include <cuda.h>

#include <cstdint>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/sm90.cuh"

namespace milora {

__device__ __forceinline__ void barrier_init_count(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
#ifdef MILORA_SM90
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
#endif
}

// Copies the box of `map` at column `column` and row `row` to shared memory (on 1024 bytes, since
// the swizzle follows the address) and tells the barrier. One thread.
__device__ __forceinline__ void tensor_load(void* to, const CUtensorMap* map, int32_t column,
                                            int32_t row, uint64_t* barrier) {
#ifdef MILORA_SM90
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
#endif
}

// The other way: starts writing the box in shared memory to the matrix; what lies outside of the
// matrix is dropped. Stores of a thread form groups, as its cp.async do.
__device__ __forceinline__ void tensor_store(const CUtensorMap* map, int32_t column, int32_t row,
                                             const void* from) {
#ifdef MILORA_SM90
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(shared_address(from)), "r"(column), "r"(row)
      : "memory");
#endif
}
__device__ __forceinline__ void commit_stores() {
#ifdef MILORA_SM90
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}
// Waits until all but kPending of this thread's newest groups have read shared memory.
template <int kPending>
__device__ __forceinline__ void wait_stores_read() {
#ifdef MILORA_SM90
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}

// Ordinary accesses of this thread to shared memory come before those of wgmma and tensor copies,
// once a barrier orders them.
__device__ __forceinline__ void publish_shared() {
#ifdef MILORA_SM90
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

template <int kBarrier, int kThreads>
__device__ __forceinline__ void named_barrier() {
  // Not bar.sync, which wants each warp to stand together.
  asm volatile("barrier.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// Around wgmma: fence before the first that reads registers or accumulators written otherwise,
// commit after the last of a group, wait until at most kPending groups are under way.
__device__ __forceinline__ void wgmma_fence() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wgmma_commit() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Keeps the compiler from moving what it does with accumulators across a wait or a fence, which do
// not name them.
template <int kSums>
__device__ __forceinline__ void hold(float (&sums)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// CUTLASS's form of the instruction, by the number of columns.
template <class T, int kColumns, cute::SM90::GMMA::Major kMajor>
struct Wgmma;
#define MILORA_WGMMA(columns)                                                                      \
  template <cute::SM90::GMMA::Major kMajor>                                                        \
  struct Wgmma<__nv_bfloat16, columns, kMajor>                                                     \
      : cute::SM90::GMMA::MMA_64x##columns##x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::K,         \
                                                               kMajor> {};                         \
  template <cute::SM90::GMMA::Major kMajor>                                                        \
  struct Wgmma<__half, columns, kMajor>                                                            \
      : cute::SM90::GMMA::MMA_64x##columns##x16_F32F16F16_SS<cute::SM90::GMMA::Major::K, kMajor> { \
  };
MILORA_WGMMA(32)
MILORA_WGMMA(64)
MILORA_WGMMA(96)
MILORA_WGMMA(128)
MILORA_WGMMA(256)
#undef MILORA_WGMMA

// sums [64, kColumns] (+)= a [64, 16] b [16, kColumns], both from shared memory by descriptor.
// Thread t of the warpgroup holds rows t / 32 * 16 + t % 32 / 4 (sums[4 j], sums[4 j + 1]) and that
// + 8 (the other two), columns 8 j + 2 (t % 4) and the next. kAcross: b's rows run along the
// columns of the sums.
template <class T, int kColumns, bool kAcross>
__device__ __forceinline__ void wgmma(float (&sums)[kColumns / 2], uint64_t a, uint64_t b,
                                      bool accumulate) {
  using namespace cute::SM90::GMMA;
  const auto scale = accumulate ? ScaleOut::One : ScaleOut::Zero;
  [&]<size_t... i>(std::index_sequence<i...>) {
    Wgmma<T, kColumns, kAcross ? Major::MN : Major::K>::fma(a, b, sums[i]..., scale);
  }(std::make_index_sequence<kColumns / 2>{});
}

}  // namespace milora
