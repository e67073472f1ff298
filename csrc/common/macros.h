// Marks small maths that the CPU kernels, the CUDA kernels and the tests share.
#pragma once

#ifdef __CUDACC__
#define MILORA_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Internal linkage matters: the CPU kernel files are compiled once per instruction set, and a
// merged weak symbol could hand AVX-512 code to a machine that has only the baseline.
#define MILORA_HOST_DEVICE static inline __attribute__((always_inline))
#endif

// Functions that Python's loader (milora/_build.py) finds with ctypes.
#define MILORA_EXPORT extern "C" __attribute__((visibility("default")))
