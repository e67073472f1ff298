// The CUDA that milora's kernels use, on a CPU: one fiber per thread, switched at barriers and warp
// operations. It checks what a GPU would do with the kernels' indices, barriers and copies; it says
// nothing about speed. Threads run in a chosen order, so that a missing barrier changes a result.
// Found before the real headers by the include path; the kernels' sources are compiled unchanged.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
} __attribute__((aligned(16)));
struct float4 {
  float x, y, z, w;
} __attribute__((aligned(16)));
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace simt {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 96 << 10;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "simt: %s\n", what);
  abort();
}

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Everything that some threads wait for together: released when all of `size` have come.
struct Barrier {
  int size = 0, count = 0;
  long phase = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[kWarpSize];
};

// A barrier in shared memory and the copies that report to it.
struct CopyBarrier {
  struct Copy {
    void* to;
    const void* from;
    uint32_t bytes;
  };
  bool ready = false, armed = false;
  uint32_t expected = 0, issued = 0, phases = 0;
  std::vector<Copy> copies;
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> memory;
  char* shared = nullptr;
  std::map<const void*, CopyBarrier> copy_barriers;
};

struct Fiber {
  ucontext_t context;
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  Index thread, block_index;
  int block = 0;  // of the cluster
  bool started = false, done = false;
  long cluster_phase = -1;
};

struct Range {
  const char* begin;
  const char* end;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;  // of the cluster that runs
  Barrier cluster;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  std::function<void()> kernel;
  bool progress = false;
  int order = 0;                // 0 forwards, 1 backwards, else shuffled with this seed
  std::vector<Range> readable;  // memory that vector loads and copies may touch
};
inline Machine machine;

}  // namespace simt

inline simt::Index threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

inline void yield() {
  if (_setjmp(machine.current->state) == 0) _longjmp(machine.scheduler, 1);
}

inline void release_if_full(Barrier& barrier) {
  if (barrier.count < barrier.size || barrier.size == 0) return;
  barrier.count = 0;
  ++barrier.phase;
  machine.progress = true;
}

inline void arrive_and_wait(Barrier& barrier) {
  const long phase = barrier.phase;
  ++barrier.count;
  release_if_full(barrier);
  while (barrier.phase == phase) yield();
}

inline Block& own_block() { return machine.blocks[machine.current->block]; }
inline Warp& own_warp() { return own_block().warps[threadIdx.x / kWarpSize]; }

inline void fiber_main() {
  machine.kernel();
  Fiber& fiber = *machine.current;
  fiber.done = machine.progress = true;
  // A thread that has left counts as one that has come, as on a GPU.
  for (Barrier* barrier : {&own_block().barrier, &own_warp().barrier, &machine.cluster}) {
    --barrier->size;
    release_if_full(*barrier);
  }
  _longjmp(machine.scheduler, 1);
}

inline void resume(Fiber& fiber) {
  machine.current = &fiber;
  threadIdx = fiber.thread;
  blockIdx = fiber.block_index;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  setcontext(&fiber.context);
}

inline void run_cluster(unsigned first_block, unsigned y, unsigned blocks, unsigned threads,
                        size_t shared_bytes) {
  Machine& m = machine;
  m.blocks.clear();
  m.blocks.resize(blocks);
  for (Block& block : m.blocks) {
    block.barrier.size = static_cast<int>(threads);
    block.warps.resize(threads / kWarpSize);
    for (Warp& warp : block.warps) warp.barrier.size = kWarpSize;
    block.memory.reset(new char[shared_bytes + 128]);
    block.shared = block.memory.get() + (-reinterpret_cast<uintptr_t>(block.memory.get()) & 127);
    memset(block.shared, 0xff, shared_bytes);  // NaN
  }
  m.cluster = Barrier{static_cast<int>(blocks * threads), 0, 0};
  m.fibers.resize(blocks * threads);
  std::vector<Fiber*> queue;
  for (unsigned i = 0; i < blocks * threads; ++i) {
    Fiber& fiber = m.fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    fiber.thread = {i % threads, 0, 0};
    fiber.block_index = {first_block + i / threads, y, 0};
    fiber.block = static_cast<int>(i / threads);
    fiber.started = fiber.done = false;
    fiber.cluster_phase = -1;
    queue.push_back(&fiber);
  }
  if (m.order == 1) std::reverse(queue.begin(), queue.end());
  std::mt19937 random(m.order);
  while (!queue.empty()) {
    if (m.order > 1) std::shuffle(queue.begin(), queue.end(), random);
    m.progress = false;
    for (Fiber* fiber : queue) resume(*fiber);
    const size_t before = queue.size();
    queue.erase(std::remove_if(queue.begin(), queue.end(), [](Fiber* f) { return f->done; }),
                queue.end());
    if (!m.progress && queue.size() == before) fail("deadlock: threads wait at different barriers");
  }
}

// Runs the grid cluster by cluster; `grid` is a multiple of `cluster`.
inline void launch(unsigned grid, unsigned grid_y, unsigned cluster, unsigned threads,
                   size_t shared_bytes, std::function<void()> kernel) {
  gridDim = {grid, grid_y, 1};
  blockDim = {threads, 1, 1};
  machine.kernel = std::move(kernel);
  for (unsigned y = 0; y < grid_y; ++y) {
    for (unsigned first = 0; first < grid; first += cluster) {
      run_cluster(first, y, cluster, threads, shared_bytes);
    }
  }
}

inline void check_readable(const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("a vector load that is not on 16 bytes");
  const char* begin = static_cast<const char*>(from);
  for (const Range& range : machine.readable) {
    if (range.begin <= begin && begin + bytes <= range.end) return;
  }
  fail("a vector load outside of the tensors");
}

template <class T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

// Every lane's value, by lane, between two barriers of the warp.
template <class T, class Read>
auto exchange(T value, const Read& read) {
  Warp& warp = own_warp();
  warp.slots[threadIdx.x % kWarpSize] = to_bits(value);
  arrive_and_wait(warp.barrier);
  const auto result = read(warp.slots);
  arrive_and_wait(own_warp().barrier);
  return result;
}

template <class T>
T from_slot(uint64_t slot) {
  T value;
  memcpy(&value, &slot, sizeof(T));
  return value;
}

}  // namespace simt

inline void __syncthreads() { simt::arrive_and_wait(simt::own_block().barrier); }
inline void __syncwarp() { simt::arrive_and_wait(simt::own_warp().barrier); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int lane = threadIdx.x % simt::kWarpSize;
  return simt::exchange(value, [&](uint64_t* s) { return simt::from_slot<T>(s[lane ^ mask]); });
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = threadIdx.x % simt::kWarpSize;
  const int from = lane < delta ? lane : lane - delta;
  return simt::exchange(value, [&](uint64_t* s) { return simt::from_slot<T>(s[from]); });
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return simt::exchange(value, [&](uint64_t* s) { return simt::from_slot<T>(s[from]); });
}
inline uint32_t __ballot_sync(unsigned, int predicate) {
  return simt::exchange(predicate != 0, [](uint64_t* s) {
    uint32_t bits = 0;
    for (int i = 0; i < simt::kWarpSize; ++i) bits |= static_cast<uint32_t>(s[i] != 0) << i;
    return bits;
  });
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline float __uint_as_float(uint32_t bits) { return simt::from_slot<float>(bits); }
inline uint32_t __float_as_uint(float value) { return static_cast<uint32_t>(simt::to_bits(value)); }
inline uint4 __ldg(const uint4* from) {
  simt::check_readable(from, sizeof(uint4));
  return *from;
}
template <class T>
void __stwb(T* to, T value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T) != 0) simt::fail("a vector store off its place");
  *to = value;
}
template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}
template <class T>
T atomicMin(T* to, T value) {
  const T before = *to;
  *to = value < before ? value : before;
  return before;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline int cudaGetLastError() { return 0; }
