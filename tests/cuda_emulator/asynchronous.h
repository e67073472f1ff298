// What a thread starts now and waits for later. It happens when it is waited for, which is as late
// as it may be.
#pragma once

#include <stdint.h>

#include <functional>
#include <vector>

#include "thread_index.h"

namespace milora::emulator {

using Work = std::function<void()>;

// A thread's own work in groups, which end in the order they were committed in: cp.async,
// wgmma, tensor stores.
struct WorkGroups {
  std::vector<Work> open;
  std::vector<std::vector<Work>> committed;

  bool idle() const { return open.empty() && committed.empty(); }
  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }
  // Until at most `pending` groups are under way.
  void wait(size_t pending) {
    if (committed.size() <= pending) return;
    const auto end = committed.end() - static_cast<ptrdiff_t>(pending);
    for (auto group = committed.begin(); group != end; ++group) {
      for (const Work& work : *group) work();
    }
    committed.erase(committed.begin(), end);
  }
};

// A barrier in shared memory (mbarrier): its phase ends when `arrivals` threads have arrived and
// the copies have brought the bytes that were announced.
struct CopyBarrier {
  struct Copy {
    int64_t bytes;
    Work land;
  };
  uint32_t arrivals = 0, pending = 0;
  uint64_t phases = 0;
  int64_t bytes = 0;  // still to come; negative if they come before they are announced
  std::vector<Copy> copies;

  void arrive() {
    if (pending == 0) die("more arrivals at a barrier than it counts");
    --pending;
    end_phase_if_complete();
  }
  // Whether the phase of this parity has ended; copies land if that is what it takes.
  bool has_ended(uint32_t parity) {
    if (phases % 2 != parity) return true;
    for (const Copy& copy : copies) {
      copy.land();
      bytes -= copy.bytes;
    }
    copies.clear();
    end_phase_if_complete();
    return phases % 2 != parity;
  }

 private:
  void end_phase_if_complete() {
    if (pending > 0 || bytes != 0) return;
    ++phases;
    pending = arrivals;
  }
};

}  // namespace milora::emulator
