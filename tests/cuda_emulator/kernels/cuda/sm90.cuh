// csrc/kernels/cuda/sm90.cuh in plain C++: clusters, barriers in shared memory, bulk copies.
#pragma once

#include <cuda_runtime.h>

#define MILORA_SM90 1

namespace milora {

inline void* dynamic_shared() { return emulator::own_block().shared; }

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - emulator::own_block().shared);
}

inline int cluster_rank() { return emulator::own_fiber().block; }

inline void cluster_arrive() {
  auto& phase = emulator::own_fiber().cluster_phase;
  if (phase) emulator::die("cluster_arrive twice without a wait");
  phase = emulator::machine.cluster.arrive();
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
  auto& phase = emulator::own_fiber().cluster_phase;
  if (!phase) emulator::die("cluster_wait without an arrive");
  emulator::wait_for(emulator::machine.cluster, *phase);
  phase.reset();
}

inline float read_remote(const float* pointer, int rank) {
  const emulator::Block& owner = emulator::machine.blocks[rank];
  if (owner.running == 0) emulator::die("shared memory of a block that has ended is read");
  float value;
  memcpy(&value, owner.shared + shared_address(pointer), sizeof(value));
  return value;
}

namespace emulator {

inline CopyBarrier& copy_barrier(const uint64_t* barrier) {
  const auto found = own_block().copy_barriers.find(barrier);
  if (found == own_block().copy_barriers.end()) die("a barrier that was not initialised");
  return found->second;
}

inline void init_copy_barrier(const uint64_t* barrier, uint32_t arrivals) {
  CopyBarrier& made = own_block().copy_barriers[barrier];
  made.arrivals = made.pending = arrivals;
}

}  // namespace emulator

inline void barrier_init(uint64_t* barrier) { emulator::init_copy_barrier(barrier, 1); }
inline void barrier_init_fence() {}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  emulator::CopyBarrier& at = emulator::copy_barrier(barrier);
  at.bytes += bytes;
  at.arrive();
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  emulator::CopyBarrier& at = emulator::copy_barrier(barrier);
  emulator::wait_until([&] { return at.has_ended(parity); });
}

inline void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(to) % 16 != 0) {
    emulator::die("a bulk copy that is not in units of 16 bytes");
  }
  emulator::check_readable(from, bytes);
  memset(to, 0xff, bytes);  // NaN until it lands
  emulator::copy_barrier(barrier).copies.push_back({bytes, [=] { memcpy(to, from, bytes); }});
}

}  // namespace milora
