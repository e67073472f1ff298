// Launching a kernel on the emulator: who runs when.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "emulator.h"

namespace milora::emulator {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kSharedAlignment = 1024;

inline void run_fiber() {
  (*machine.kernel)();
  if (!own_fiber().stores.idle()) die("tensor stores that their thread did not wait for");
  own_fiber().done = true;
  --own_block().running;
  _longjmp(machine.scheduler, 1);
}

[[gnu::noinline]] inline void resume(Fiber& fiber) {
  machine.current = &fiber;
  threadIdx = {fiber.thread};
  blockIdx = machine.blocks[fiber.block].index;
  fiber.ready = nullptr;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber.stack.get();
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, run_fiber, 0);
  setcontext(&start);
}

inline void start_block(Block& block, dim3 index, int threads, size_t shared_bytes) {
  block.index = index;
  block.running = block.barrier.size = threads;
  block.warps.resize(threads / kWarpSize);
  for (Warp& warp : block.warps) warp.barrier.size = kWarpSize;
  block.memory.assign(shared_bytes + kSharedAlignment, 0xff);  // NaN
  const auto at = reinterpret_cast<uintptr_t>(block.memory.data());
  block.shared = block.memory.data() + (-at % kSharedAlignment);
}

inline void start_fiber(Fiber& fiber, int block, unsigned thread) {
  std::unique_ptr<char[]> stack = std::move(fiber.stack);
  if (stack == nullptr) stack.reset(new char[kStackBytes]);  // not cleared: most is never touched
  fiber = {};
  fiber.stack = std::move(stack);
  fiber.block = block;
  fiber.thread = thread;
}

// Lets a thread go on if it can.
inline bool take_turn(Fiber& fiber) {
  if (fiber.done || (fiber.ready != nullptr && !fiber.ready(fiber.condition))) return false;
  resume(fiber);
  return true;
}

// Runs `size` parts, again and again until none of them goes on; returns whether any did.
template <class RunPart>
bool run_parts(int size, const RunPart& run_part) {
  bool any = false;
  for (bool progress = true; progress; any |= progress) {
    progress = false;
    for (int i = 0; i < size; ++i) {
      progress |= run_part(machine.order == kDescending ? size - 1 - i : i);
    }
  }
  return any;
}

inline void run_ahead(int blocks, int threads) {
  run_parts(blocks, [&](int block) {
    return run_parts(threads / kWarpSize, [&](int warp) {
      Fiber* fibers = &machine.fibers[block * threads + warp * kWarpSize];
      return run_parts(kWarpSize, [&](int lane) { return take_turn(fibers[lane]); });
    });
  });
}

inline void run_shuffled(std::mt19937& random, int num_fibers) {
  std::vector<int> turns(num_fibers);
  std::iota(turns.begin(), turns.end(), 0);
  run_parts(1, [&](int) {
    std::shuffle(turns.begin(), turns.end(), random);
    bool progress = false;
    for (const int i : turns) progress |= take_turn(machine.fibers[i]);
    return progress;
  });
}

inline void run_cluster(const std::vector<dim3>& indices, int threads, size_t shared_bytes,
                        std::mt19937& random) {
  Machine& m = machine;
  const int blocks = static_cast<int>(indices.size()), num_fibers = blocks * threads;
  m.blocks = std::vector<Block>(blocks);
  m.cluster = {num_fibers};
  m.fibers.resize(std::max<size_t>(m.fibers.size(), num_fibers));  // stacks are used again
  for (int b = 0; b < blocks; ++b) {
    start_block(m.blocks[b], indices[b], threads, shared_bytes);
    for (int t = 0; t < threads; ++t) start_fiber(m.fibers[b * threads + t], b, t);
  }
  if (m.order <= kDescending) {
    run_ahead(blocks, threads);
  } else {
    run_shuffled(random, num_fibers);
  }
  for (const Block& block : m.blocks) {
    if (block.running > 0) die("deadlock: every thread waits");
  }
}

// Calls kernel() once for every thread of the grid, cluster by cluster (of blocks along x).
inline void launch(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& kernel,
                   unsigned cluster = 1) {
  gridDim = grid;
  blockDim = {static_cast<unsigned>(threads)};
  machine.kernel = &kernel;
  std::vector<std::vector<dim3>> clusters;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        if (x % cluster == 0) clusters.emplace_back();
        clusters.back().push_back({x, y, z});
      }
    }
  }
  std::mt19937 random(machine.order);
  if (machine.order == kDescending) std::reverse(clusters.begin(), clusters.end());
  if (machine.order > kDescending) std::shuffle(clusters.begin(), clusters.end(), random);
  for (const auto& indices : clusters) run_cluster(indices, threads, shared_bytes, random);
}

}  // namespace milora::emulator
