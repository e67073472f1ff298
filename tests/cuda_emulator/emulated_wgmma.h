// The functions of kernels/cuda/wgmma.cuh (and those of sm90.cuh that go with them) in plain C++,
// after the PTX manual: barriers with phases, tensor copies with the 128-byte swizzle, wgmma with
// descriptors. A tensor copy arrives when somebody waits for its barrier; a wgmma computes when its
// warp waits for it, so that a stage which is given back too early shows.
#pragma once

#include <map>

#include "cuda.h"
#include "emulator.h"

namespace milora {
namespace emulator {

struct TensorCopy {
  uint8_t* target;
  CUtensorMap map;
  int64_t column, row;
};
struct Barrier {
  uint32_t arrivals = 0, pending = 0, phases = 0;
  int64_t bytes = 0;
  std::deque<TensorCopy> copies;
};
struct Asynchronous {
  std::map<const void*, Barrier> barriers;
  std::vector<std::vector<std::function<void()>>> open;
  std::vector<std::deque<std::vector<std::function<void()>>>> groups;
  std::vector<uint64_t> named_meetings;
};
inline Asynchronous asynchronous;  // of the block that runs

inline void start_asynchronous() {
  asynchronous = {};
  asynchronous.open.resize(block.fibers.size());
  asynchronous.groups.resize(block.fibers.size());
  asynchronous.named_meetings.resize(block.fibers.size());
}
inline const bool asynchronous_starts =
    (block.start_hooks.push_back(start_asynchronous), !block.start_hooks.empty());

inline Barrier& barrier_at(const void* at) {
  const auto found = asynchronous.barriers.find(at);
  if (found == asynchronous.barriers.end()) die("a barrier was used before its initialisation");
  return found->second;
}

inline void end_phase_if_complete(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    ++barrier.phases;
    barrier.pending = barrier.arrivals;
  }
}

inline uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 3 & 0x70); }

constexpr int kBoxColumns = 64;

inline void deliver(Barrier& barrier) {
  for (; !barrier.copies.empty(); barrier.copies.pop_front()) {
    const TensorCopy& copy = barrier.copies.front();
    const auto base = static_cast<uint32_t>(copy.target - shared_memory());
    for (int r = 0; r < copy.map.box_rows; ++r) {
      for (int c = 0; c < kBoxColumns; ++c) {
        const int64_t row = copy.row + r, column = copy.column + c;
        uint16_t value = 0;
        if (row < copy.map.rows && column < copy.map.columns) {
          std::memcpy(&value, copy.map.data + row * copy.map.row_bytes + column * 2, 2);
        }
        std::memcpy(shared_memory() + swizzle_128(base + r * 128 + c * 2), &value, 2);
      }
    }
    barrier.bytes -= copy.map.box_rows * 128;
  }
  end_phase_if_complete(barrier);
}

// Element (outer, k) of an operand: `outer` counts rows of a or columns of b.
template <class T>
float operand_element(uint64_t descriptor, bool runs_across, int outer, int k) {
  const auto field = [&](int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4;
  };
  const uint32_t start = field(0), across = field(16), group = field(32);
  if (descriptor >> 62 != 1) die("wgmma: only the 128-byte swizzle is emulated");
  const uint32_t at =
      runs_across ? start + outer / 64 * across + k / 8 * group + k % 8 * 128 + outer % 64 * 2
                  : start + outer / 8 * group + outer % 8 * 128 + k * 2;
  T value;
  std::memcpy(&value, shared_memory() + swizzle_128(at), 2);
  return to_float(value);
}

}  // namespace emulator

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - emulator::shared_memory());
}

inline void barrier_init_count(uint64_t* barrier, uint32_t arrivals) {
  emulator::Barrier& at = emulator::asynchronous.barriers[barrier];
  at.arrivals = at.pending = arrivals;
}
inline void barrier_init_fence() {}
inline void barrier_arrive(uint64_t* barrier) {
  emulator::Barrier& at = emulator::barrier_at(barrier);
  if (at.pending == 0) emulator::die("more arrivals at a barrier than it counts");
  --at.pending;
  emulator::end_phase_if_complete(at);
}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  emulator::Barrier& at = emulator::barrier_at(barrier);
  at.bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  emulator::wait_until([&] {
    emulator::Barrier& at = emulator::barrier_at(barrier);
    if (!at.copies.empty()) emulator::deliver(at);
    return at.phases % 2 != parity;
  });
}

inline void tensor_load(void* to, const CUtensorMap* map, int32_t column, int32_t row,
                        uint64_t* barrier) {
  if (shared_address(to) % 1024 != 0) emulator::die("a tensor copy must go to 1024 bytes");
  std::memset(to, 0xff, map->box_rows * 128);
  emulator::barrier_at(barrier).copies.push_back({static_cast<uint8_t*>(to), *map, column, row});
}

inline void publish_to_wgmma() {}

// All kThreads that use the barrier meet; they are taken to be the first ones of the block.
template <int kBarrier, int kThreads>
inline void named_barrier() {
  auto& meetings = emulator::asynchronous.named_meetings;
  const uint64_t mine = ++meetings[emulator::block.current];
  emulator::wait_until([&] {
    for (int i = 0; i < kThreads; ++i) {
      if (meetings[i] < mine) return false;
    }
    return true;
  });
}

template <int kRegisters>
inline void give_registers() {}
template <int kRegisters>
inline void take_registers() {}

inline void hold(float (&)[128]) {}
inline void wgmma_fence() {}
inline void wgmma_commit() {
  auto& open = emulator::asynchronous.open[emulator::block.current];
  emulator::asynchronous.groups[emulator::block.current].push_back(std::move(open));
  open.clear();
}
template <int kPending>
inline void wgmma_wait() {
  auto& groups = emulator::asynchronous.groups[emulator::block.current];
  for (; groups.size() > kPending; groups.pop_front()) {
    for (const auto& product : groups.front()) product();
  }
}

template <class T, bool kAcross>
inline void wgmma_64x256x16(float (&sums)[128], uint64_t a, uint64_t b, bool accumulate) {
  const int thread = emulator::block.current % 128;
  emulator::asynchronous.open[emulator::block.current].push_back([&sums, thread, a, b, accumulate] {
    using emulator::operand_element;
    float rows[2][16];
    for (int m = 0; m < 2; ++m) {
      for (int k = 0; k < 16; ++k) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * m;
        rows[m][k] = operand_element<T>(a, false, row, k);
      }
    }
    for (int j = 0; j < 32; ++j) {
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
