// The instructions that matrix kernels are made of, one function each: asynchronous 16-byte copies,
// ldmatrix, mma. sm_80 and newer.
//
// tests/cuda_emulator holds a file of this name with the same functions in plain C++, so that
// kernels written with them also run, thread by thread, on a CPU.
#pragma once

#include "kernels/cuda/device.cuh"

namespace milora {

// The block's dynamic shared memory.
__device__ __forceinline__ uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts the copy of 16 bytes, of which those from `bytes` on (0 to 16) arrive as zeros and are not
// read. Both addresses are multiples of 16, also where nothing is read.
__device__ __forceinline__ void copy_16_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's newest groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements. Lane 8 i + r gives the address of row r (16 bytes) of
// matrix i; lane l receives elements (l / 4, 2 (l % 4)) and the next of each.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(smem_address(row))
               : "memory");
}

// The same, each matrix transposed: lane l receives (2 (l % 4), l / 4) and the one below.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(smem_address(row))
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8], float32 sums. Lane l holds
//   a: rows l / 4 (a[0], a[2]) and l / 4 + 8 (a[1], a[3]); columns 2 (l % 4) + {0, 1}, + 8 in
//   a[2..3] b: rows 2 (l % 4) + {0, 1}, + 8 in b1; column l / 4 c: rows l / 4 (c[0..1]) and l / 4 +
//   8 (c[2..3]); columns 2 (l % 4) + {0, 1}
template <class T>
__device__ __forceinline__ void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1);
template <>
__device__ __forceinline__ void multiply_16x8x16<__nv_bfloat16>(float (&c)[4],
                                                                const uint32_t (&a)[4], uint32_t b0,
                                                                uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_16x8x16<__half>(float (&c)[4], const uint32_t (&a)[4],
                                                         uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace milora
