// Runs CUDA kernels on a CPU. Each thread of a cluster of blocks is a fiber: it runs until it must
// wait (for a barrier, its warp, a copy), and goes on in its turn once that has come.
//
// What it can find: wrong indices (a vector load or a copy from outside of the tensors ends the
// process), wrong fragments, missing barriers and waits, deadlocks. For that, a warp runs as far
// ahead of the others as it can, and a block of the others of its cluster; memory begins as NaN,
// and what is asynchronous happens as late as it may. What it cannot: anything about time or the
// compiler, and what the hardware does differently from the PTX manual as read here.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "asynchronous.h"

namespace milora::emulator {

constexpr int kWarpSize = 32;

// Threads that wait for each other: a phase ends when all of `size` have come. One that has
// returned never comes.
struct Barrier {
  int size = 0, count = 0;
  uint64_t phase = 0;

  uint64_t arrive() {
    const uint64_t mine = phase;
    if (++count == size) {
      count = 0;
      ++phase;
    }
    return mine;
  }
};

struct Warp {
  Barrier barrier;
  struct Slot {
    uint8_t bytes[32];
  } slots[2][kWarpSize];  // of even and odd phases
};

struct Block {
  dim3 index;
  int running = 0;  // threads that have not returned
  Barrier barrier;
  Barrier named[16];
  std::vector<Warp> warps;
  std::vector<uint8_t> memory;
  uint8_t* shared = nullptr;
  std::map<const void*, CopyBarrier> copy_barriers;
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  jmp_buf state;
  int block = 0;  // of the cluster
  unsigned thread = 0;
  bool started = false, done = false;
  bool (*ready)(const void*) = nullptr;  // whether what it waits for has come
  const void* condition = nullptr;
  std::optional<uint64_t> cluster_phase;  // arrived in, and not yet waited for
  WorkGroups copies, products, stores;    // cp.async, wgmma, tensor stores
};

struct Range {
  const void* begin;
  int64_t bytes;
};

// Which block, warp and lane goes first. Any other number is the seed of shuffled turns.
enum Order { kAscending = 0, kDescending = 1 };

struct Machine {
  int order = kAscending;
  std::vector<Range> readable;  // memory that vector loads and copies may touch
  const std::function<void()>* kernel = nullptr;
  std::vector<Block> blocks;  // of the cluster that runs
  std::vector<Fiber> fibers;
  Barrier cluster;
  Fiber* current = nullptr;
  jmp_buf scheduler;
};
inline Machine machine;

inline Fiber& own_fiber() { return *machine.current; }
inline Block& own_block() { return machine.blocks[own_fiber().block]; }
inline Warp& own_warp() { return own_block().warps[threadIdx.x / kWarpSize]; }
inline int lane() { return static_cast<int>(threadIdx.x % kWarpSize); }

// ---- waiting ----

// Not swapcontext, which asks the kernel for the signal mask each time. Not inlined, since the
// caller's variables must be in memory or saved registers when it is left.
[[gnu::noinline]] inline void leave_fiber() {
  if (_setjmp(own_fiber().state) == 0) _longjmp(machine.scheduler, 1);
}

// The scheduler asks ready() itself, so that a thread is only gone on with when it can.
template <class Ready>
void wait_until(const Ready& ready) {
  if (ready()) return;
  own_fiber().condition = &ready;
  own_fiber().ready = [](const void* condition) {
    return (*static_cast<const Ready*>(condition))();
  };
  leave_fiber();
}

inline void wait_for(const Barrier& barrier, uint64_t phase) {
  wait_until([&] { return barrier.phase != phase; });
}
inline void meet(Barrier& barrier) { wait_for(barrier, barrier.arrive()); }

// What all lanes of a warp gave, by lane, until this lane meets them again: the slots are written
// anew in the phase after that.
template <class V>
struct Lanes {
  const Warp::Slot* slots;
  V operator[](int lane) const {
    V value;
    memcpy(&value, slots[lane].bytes, sizeof(V));
    return value;
  }
};

template <class V>
Lanes<V> exchange(const V& value) {
  static_assert(sizeof(V) <= sizeof(Warp::Slot));
  Warp& warp = own_warp();
  Warp::Slot* slots = warp.slots[warp.barrier.phase % 2];
  memcpy(slots[lane()].bytes, &value, sizeof(V));
  meet(warp.barrier);
  return {slots};
}

// ---- memory ----

inline void check_readable(const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) die("a read that is not on 16 bytes");
  const auto* begin = static_cast<const char*>(from);
  for (const Range& range : machine.readable) {
    const auto* first = static_cast<const char*>(range.begin);
    if (first <= begin && begin + bytes <= first + range.bytes) return;
  }
  if (bytes > 0) die("a read outside of the tensors");
}

}  // namespace milora::emulator
