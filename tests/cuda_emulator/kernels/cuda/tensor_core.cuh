// csrc/kernels/cuda/tensor_core.cuh in plain C++, after the PTX manual's tables of fragments.
#pragma once

#include "kernels/cuda/device.cuh"

namespace milora {

inline uint8_t* shared_memory() { return emulator::own_block().shared; }

inline void copy_16_async(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) emulator::die("cp.async to no 16 bytes");
  emulator::check_readable(global, bytes);
  memset(shared, 0xff, 16);  // NaN until it is waited for
  emulator::own_fiber().copies.open.push_back([=] {
    memset(shared, 0, 16);
    memcpy(shared, global, bytes);
  });
}
inline void commit_copies() { emulator::own_fiber().copies.commit(); }
template <int kPending>
void wait_copies() {
  emulator::own_fiber().copies.wait(kPending);
}

namespace emulator {

inline void load_matrices(uint32_t (&m)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) die("ldmatrix of a row that is not on 16 bytes");
  const auto rows = exchange(static_cast<const uint16_t*>(row));
  const int high = lane() / 4, low = lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const int first = 8 * i;  // the lane that gave the matrix's row 0
    const uint32_t one = transposed ? rows[first + low][high] : rows[first + high][low];
    const uint32_t two = transposed ? rows[first + low + 1][high] : rows[first + high][low + 1];
    m[i] = one | two << 16;
  }
}

struct Fragments {
  uint32_t a[4], b[2];
};

template <class T>
float half_of(uint32_t pair, int i) {
  return to_float(T{static_cast<uint16_t>(pair >> 16 * i)});
}

}  // namespace emulator

inline void load_matrices(uint32_t (&m)[4], const void* row) {
  emulator::load_matrices(m, row, false);
}
inline void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  emulator::load_matrices(m, row, true);
}

template <class T>
void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using emulator::half_of;
  const auto lanes = emulator::exchange(emulator::Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int row = emulator::lane() / 4, column = emulator::lane() % 4 * 2;
  float sums[4] = {};
  for (int k = 0; k < 16; ++k) {
    // Lane 4 r + k % 8 / 2 holds element k of a's rows r and r + 8, and of b's column r.
    const emulator::Fragments of_a = lanes[row * 4 + k % 8 / 2];
    for (int i = 0; i < 4; ++i) {
      const emulator::Fragments of_b = lanes[(column + i % 2) * 4 + k % 8 / 2];
      sums[i] += half_of<T>(of_a.a[i / 2 + k / 8 * 2], k % 2) * half_of<T>(of_b.b[k / 8], k % 2);
    }
  }
  for (int i = 0; i < 4; ++i) c[i] += sums[i];
}

}  // namespace milora
