// csrc/kernels/cuda/sm90.cuh on a CPU. A copy lands as late as it may: at the wait for its barrier;
// until then its target holds NaN, so that reading early shows.
#pragma once

#include <cuda_runtime.h>

#define MILORA_SM90 1

namespace milora {

inline void* dynamic_shared() { return simt::own_block().shared; }

inline int cluster_rank() { return simt::machine.current->block; }

inline void cluster_arrive() {
  simt::Fiber& fiber = *simt::machine.current;
  if (fiber.cluster_phase == simt::machine.cluster.phase) simt::fail("a second cluster_arrive");
  fiber.cluster_phase = simt::machine.cluster.phase;
  ++simt::machine.cluster.count;
  simt::release_if_full(simt::machine.cluster);
}
inline void cluster_wait() {
  if (simt::machine.current->cluster_phase < 0) simt::fail("cluster_wait without an arrive");
  while (simt::machine.cluster.phase == simt::machine.current->cluster_phase) simt::yield();
}

inline float read_remote(const float* pointer, int rank) {
  const char* own = simt::own_block().shared;
  float value;
  memcpy(&value, simt::machine.blocks[rank].shared + (reinterpret_cast<const char*>(pointer) - own),
         sizeof(value));
  return value;
}

inline simt::CopyBarrier& copy_barrier(uint64_t* barrier) {
  simt::CopyBarrier& found = simt::own_block().copy_barriers[barrier];
  if (!found.ready) simt::fail("a barrier that was not initialised");
  return found;
}
inline void barrier_init(uint64_t* barrier) {
  simt::own_block().copy_barriers[barrier].ready = true;
}
inline void barrier_init_fence() {}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  simt::CopyBarrier& b = copy_barrier(barrier);
  if (b.armed) simt::fail("barrier_expect twice in a phase");
  b.armed = true;
  b.expected = bytes;
}
inline void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  simt::CopyBarrier& b = copy_barrier(barrier);
  if (bytes % 16 != 0 || bytes == 0 || reinterpret_cast<uintptr_t>(to) % 16 != 0) {
    simt::fail("a bulk copy that is not in units of 16 bytes");
  }
  simt::check_readable(from, bytes);
  memset(to, 0xff, bytes);
  b.copies.push_back({to, from, bytes});
  b.issued += bytes;
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  simt::CopyBarrier& b = copy_barrier(barrier);
  while ((b.phases & 1) == parity) {
    if (!b.armed || b.issued != b.expected) {
      simt::yield();
      continue;
    }
    for (const auto& copy : b.copies) memcpy(copy.to, copy.from, copy.bytes);
    b.copies.clear();
    b.issued = 0;
    b.armed = false;
    ++b.phases;
    simt::machine.progress = true;
  }
}

}  // namespace milora
