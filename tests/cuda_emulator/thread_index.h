// Where the thread that runs stands, in CUDA's words, and how the emulator gives up.
#pragma once

#include <stdio.h>
#include <stdlib.h>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace milora::emulator {

[[noreturn]] inline void die(const char* what) {
  fprintf(stderr, "cuda_emulator: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  abort();
}

}  // namespace milora::emulator
