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

// Ordinary writes of this thread to shared memory become visible to wgmma, once a barrier orders
// them.
__device__ __forceinline__ void publish_to_wgmma() {
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
__device__ __forceinline__ void hold(float (&sums)[128]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// sums [64, 256] (+)= a [64, 16] b [16, 256], both from shared memory by descriptor. Thread t of
// the warpgroup holds rows t / 32 * 16 + t % 32 / 4 (sums[4 j], sums[4 j + 1]) and that + 8 (the
// other two), columns 8 j + 2 (t % 4) and the next. kAcross: b's rows run along the 256 columns.
template <class T, bool kAcross>
__device__ __forceinline__ void wgmma_64x256x16(float (&sums)[128], uint64_t a, uint64_t b,
                                                bool accumulate) {
  using namespace cute::SM90::GMMA;
  constexpr Major kMajor = kAcross ? Major::MN : Major::K;
  const auto scale = accumulate ? ScaleOut::One : ScaleOut::Zero;
  [&]<size_t... i>(std::index_sequence<i...>) {
    if constexpr (std::is_same_v<T, __half>) {
      MMA_64x256x16_F32F16F16_SS<Major::K, kMajor>::fma(a, b, sums[i]..., scale);
    } else {
      MMA_64x256x16_F32BF16BF16_SS<Major::K, kMajor>::fma(a, b, sums[i]..., scale);
    }
  }(std::make_index_sequence<128>{});
}

}  // namespace milora
