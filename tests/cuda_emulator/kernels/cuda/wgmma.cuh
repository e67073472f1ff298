// csrc/kernels/cuda/wgmma.cuh in plain C++, after the PTX manual: barriers with several arrivals,
// tensor copies with the 128-byte swizzle, wgmma with descriptors. A wgmma computes when its thread
// waits for it, so that a stage which is given back too early shows.
#pragma once

#include <cuda.h>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/sm90.cuh"

namespace milora {
namespace emulator {

inline uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 3 & 0x70); }

constexpr int kBoxColumns = 64;
constexpr int kBoxRowBytes = 2 * kBoxColumns;

// `to` is on 1024 bytes, so that offsets from it are swizzled as addresses are.
inline void copy_box(uint8_t* to, const CUtensorMap& map, int64_t first_column, int64_t first_row) {
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < kBoxColumns; ++c) {
      const int64_t row = first_row + r, column = first_column + c;
      uint16_t value = 0;
      if (row < map.rows && column < map.columns) {
        memcpy(&value, map.data + row * map.row_bytes + column * 2, 2);
      }
      memcpy(to + swizzle_128(r * kBoxRowBytes + c * 2), &value, 2);
    }
  }
}

// Element (outer, k) of an operand: `outer` counts rows of a or columns of b.
template <class T>
float operand_element(uint64_t descriptor, bool runs_across, int outer, int k) {
  const auto field = [&](int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4;
  };
  const uint32_t start = field(0), across = field(16), group = field(32);
  const uint32_t at =
      runs_across ? start + outer / 64 * across + k / 8 * group + k % 8 * 128 + outer % 64 * 2
                  : start + outer / 8 * group + outer % 8 * 128 + k * 2;
  T value;
  memcpy(&value, own_block().shared + swizzle_128(at), 2);
  return to_float(value);
}

inline void store_box(const uint8_t* from, const CUtensorMap& map, int64_t first_column,
                      int64_t first_row) {
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < kBoxColumns; ++c) {
      const int64_t row = first_row + r, column = first_column + c;
      if (row >= map.rows || column >= map.columns) continue;
      memcpy(const_cast<uint8_t*>(map.data) + row * map.row_bytes + column * 2,
             from + swizzle_128(r * kBoxRowBytes + c * 2), 2);
    }
  }
}

}  // namespace emulator

inline void barrier_init_count(uint64_t* barrier, uint32_t arrivals) {
  emulator::init_copy_barrier(barrier, arrivals);
}
inline void barrier_arrive(uint64_t* barrier) { emulator::copy_barrier(barrier).arrive(); }

inline void tensor_load(void* to, const CUtensorMap* map, int32_t column, int32_t row,
                        uint64_t* barrier) {
  auto* target = static_cast<uint8_t*>(to);
  const int64_t bytes = map->box_rows * emulator::kBoxRowBytes;
  if (shared_address(to) % 1024 != 0) emulator::die("a tensor copy must go to 1024 bytes");
  memset(target, 0xff, bytes);  // NaN until it lands
  emulator::copy_barrier(barrier).copies.push_back(
      {bytes, [=, box = *map] { emulator::copy_box(target, box, column, row); }});
}

inline void tensor_store(const CUtensorMap* map, int32_t column, int32_t row, const void* from) {
  if (shared_address(from) % 1024 != 0) emulator::die("a tensor copy must come from 1024 bytes");
  emulator::own_fiber().stores.open.push_back([=, box = *map] {
    emulator::store_box(static_cast<const uint8_t*>(from), box, column, row);
  });
}
inline void commit_stores() { emulator::own_fiber().stores.commit(); }
template <int kPending>
void wait_stores_read() {
  emulator::own_fiber().stores.wait(kPending);
}

inline void publish_shared() {}

template <int kBarrier, int kThreads>
void named_barrier() {
  emulator::Barrier& barrier = emulator::own_block().named[kBarrier];
  barrier.size = kThreads;
  emulator::meet(barrier);
}

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

template <int kSums>
void hold(float (&)[kSums]) {}
inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::own_fiber().products.commit(); }
// Of a whole warp: no lane may go on, and give a stage back, while others still have to multiply.
template <int kPending>
void wgmma_wait() {
  emulator::own_fiber().products.wait(kPending);
  emulator::meet(emulator::own_warp().barrier);
}

template <class T, int kColumns, bool kAcross>
void wgmma(float (&sums)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate) {
  if (a >> 62 != 1 || b >> 62 != 1) emulator::die("wgmma: only the 128-byte swizzle is emulated");
  emulator::own_fiber().products.open.push_back([&sums, a, b, accumulate] {
    using emulator::operand_element;
    const int thread = static_cast<int>(threadIdx.x) % 128;
    float rows[2][16];
    for (int m = 0; m < 2; ++m) {
      for (int k = 0; k < 16; ++k) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * m;
        rows[m][k] = operand_element<T>(a, false, row, k);
      }
    }
    for (int j = 0; j < kColumns / 8; ++j) {
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * j + thread % 4 * 2 + i;
        float dots[2] = {};
        for (int k = 0; k < 16; ++k) {
          const float element = operand_element<T>(b, kAcross, column, k);
          for (int m = 0; m < 2; ++m) dots[m] += rows[m][k] * element;
        }
        for (int m = 0; m < 2; ++m) {
          float& sum = sums[4 * j + 2 * m + i];
          sum = (accumulate ? sum : 0.0f) + dots[m];
        }
      }
    }
  });
}

}  // namespace milora
