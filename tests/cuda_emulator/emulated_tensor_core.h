// The functions of kernels/cuda/tensor_core.cuh in plain C++, after the PTX manual's tables of
// fragments.
#pragma once

#include "emulator.h"

namespace milora {

inline uint8_t* shared_memory() { return emulator::shared_memory(); }

inline void copy_16_async(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(global) % 16 != 0)
    emulator::die("cp.async needs addresses on 16 bytes");
  auto* target = static_cast<uint8_t*>(shared);
  std::memset(target, 0xff, 16);  // NaN until it is waited for
  emulator::block.fibers[emulator::block.current].open.push_back(
      {target, static_cast<const uint8_t*>(global), bytes});
}

inline void commit_copies() {
  auto& fiber = emulator::block.fibers[emulator::block.current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

template <int kPending>
inline void wait_copies() {
  auto& groups = emulator::block.fibers[emulator::block.current].groups;
  for (; groups.size() > kPending; groups.pop_front()) {
    for (const auto& copy : groups.front()) {
      std::memset(copy.target, 0, 16);
      std::memcpy(copy.target, copy.source, copy.bytes);
    }
  }
}

namespace emulator {

inline uint16_t element(const uint8_t* row, int column) {
  uint16_t value;
  std::memcpy(&value, row + 2 * column, 2);
  return value;
}

inline void load_matrices(uint32_t (&m)[4], const void* row, bool transposed) {
  const auto rows = exchange(static_cast<const uint8_t*>(row));
  const int high = lane() / 4, low = lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const uint8_t* const* matrix = &rows[8 * i];
    const uint32_t one = transposed ? element(matrix[low], high) : element(matrix[high], low);
    const uint32_t two =
        transposed ? element(matrix[low + 1], high) : element(matrix[high], low + 1);
    m[i] = one | two << 16;
  }
}

template <class T>
float half_of(uint32_t pair, int i) {
  T value;
  value.bits = static_cast<uint16_t>(pair >> 16 * i);
  return to_float(value);
}

struct Fragments {
  uint32_t a[4], b[2];
};

}  // namespace emulator

inline void load_matrices(uint32_t (&m)[4], const void* row) {
  emulator::load_matrices(m, row, false);
}
inline void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  emulator::load_matrices(m, row, true);
}

template <class T>
inline void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using emulator::half_of;
  const auto lanes = emulator::exchange(emulator::Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = emulator::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const auto& of_a = lanes[row % 8 * 4 + k % 8 / 2];
      const auto& of_b = lanes[column * 4 + k % 8 / 2];
      sum += half_of<T>(of_a.a[row / 8 + k / 8 * 2], k % 2) * half_of<T>(of_b.b[k / 8], k % 2);
    }
    c[i] += sum;
  }
}

}  // namespace milora
