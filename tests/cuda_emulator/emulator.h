// Runs CUDA kernels on a CPU, thread by thread: every thread of a block is a fiber, which runs
// until it meets a barrier (__syncthreads) or an exchange of its warp (shuffles, ldmatrix, mma),
// where it lets the others go on.
//
// What it can find: wrong indices (build with -fsanitize=address to see those outside of memory),
// wrong fragments, missing barriers and waits. For that it starts blocks and threads in ascending
// or descending order, fills shared memory with NaN first, and an asynchronous copy poisons its
// target until it is waited for, when it is done. What it cannot: anything about time, and what the
// hardware does differently from the manual as read here.
#pragma once

#include <ucontext.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

namespace milora::emulator {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 128 * 1024;

struct Copy {
  uint8_t* target;
  const uint8_t* source;
  int bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  uint64_t block_meetings = 0, warp_meetings = 0;
  std::vector<Copy> open;                // copies of the group under construction
  std::deque<std::vector<Copy>> groups;  // committed
};

struct Warp {
  std::array<std::array<uint8_t, 64>, kWarpSize> slots[2];  // of even and odd exchanges
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  int current = 0;
  ucontext_t scheduler;
  const std::function<void()>* kernel = nullptr;
  std::vector<void (*)()> start_hooks;  // run before each block
  int64_t progress = 0;                 // waits that ended
};
inline Block block;

inline int lane() { return block.current % kWarpSize; }
inline uint8_t* shared_memory() {
  auto at = reinterpret_cast<uintptr_t>(block.shared.data());
  return reinterpret_cast<uint8_t*>((at + 1023) / 1024 * 1024);
}

inline void let_others_go_on() {
  Fiber& fiber = block.fibers[block.current];
  swapcontext(&fiber.context, &block.scheduler);
}

template <class Ready>
void wait_until(const Ready& ready) {
  while (!ready()) let_others_go_on();
  ++block.progress;
}

[[noreturn]] inline void die(const char* what) {
  std::fprintf(stderr, "cuda_emulator: %s (block %u, thread %d)\n", what, blockIdx.x,
               block.current);
  std::abort();
}

// All threads of the block that have not returned.
inline void meet_block() {
  const uint64_t mine = ++block.fibers[block.current].block_meetings;
  wait_until([&] {
    for (const Fiber& fiber : block.fibers) {
      if (fiber.block_meetings < mine) {
        if (fiber.done) die("a thread returned before a barrier that others wait at");
        return false;
      }
    }
    return true;
  });
}

// Every lane gives a value and sees those of all lanes.
template <class V>
std::array<V, kWarpSize> exchange(const V& value) {
  static_assert(sizeof(V) <= 64);
  const int first = block.current / kWarpSize * kWarpSize;
  const uint64_t mine = ++block.fibers[block.current].warp_meetings;
  // A lane can be at most one exchange ahead of another, so two sets of slots do.
  auto& slots = block.warps[block.current / kWarpSize].slots[mine % 2];
  std::memcpy(slots[lane()].data(), &value, sizeof(V));
  wait_until([&] {
    for (int i = 0; i < kWarpSize; ++i) {
      const Fiber& fiber = block.fibers[first + i];
      if (fiber.warp_meetings < mine) {
        if (fiber.done) die("a thread returned before an exchange that its warp waits at");
        return false;
      }
    }
    return true;
  });
  std::array<V, kWarpSize> values;
  for (int i = 0; i < kWarpSize; ++i) std::memcpy(&values[i], slots[i].data(), sizeof(V));
  return values;
}

inline void run_fiber() {
  (*block.kernel)();
  block.fibers[block.current].done = true;
  let_others_go_on();
}

inline void run_block(int threads, int64_t shared_bytes, bool descending,
                      const std::function<void()>& kernel) {
  block.kernel = &kernel;
  block.fibers = std::vector<Fiber>(threads);
  block.warps = std::vector<Warp>(threads / kWarpSize);
  block.shared.assign(shared_bytes + 1024, 0xff);
  for (const auto hook : block.start_hooks) hook();
  for (Fiber& fiber : block.fibers) {
    fiber.stack.reset(new char[kStackBytes]);  // not cleared: most of it is never touched
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (int left = threads; left > 0;) {
    left = 0;
    const int64_t progress = block.progress;
    bool ended = false;
    for (int i = 0; i < threads; ++i) {
      block.current = descending ? threads - 1 - i : i;
      Fiber& fiber = block.fibers[block.current];
      if (fiber.done) continue;
      threadIdx.x = static_cast<unsigned>(block.current);
      swapcontext(&block.scheduler, &fiber.context);
      left += !fiber.done;
      ended = ended || fiber.done;
    }
    if (!ended && progress == block.progress) die("all threads wait");
  }
}

// kernel() is called once for every thread of every block.
inline void launch(unsigned blocks, int threads, int64_t shared_bytes, bool descending,
                   const std::function<void()>& kernel) {
  gridDim = {blocks, 1, 1};
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx = {descending ? blocks - 1 - i : i, 0, 0};
    run_block(threads, shared_bytes, descending, kernel);
  }
}

}  // namespace milora::emulator
