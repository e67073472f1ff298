// From jobs to threads: tasks in a fixed order, handed out by one counter in one parallel region.
//
// A task is a whole piece of work (shrink, core, then expand, of some rows) wherever there are
// enough of them; then threads never wait for each other. Only what would leave threads idle at the
// end is cut finer, into shrink tasks by ranks and expand tasks by columns. An expand task waits
// until its job's shrink tasks are done; the thread that ends the last of these multiplies by the
// core, if the expert has one. That is safe with any number of threads: those stand before it in
// the order, so some running thread has each of them in hand.
#pragma once

#include <atomic>
#include <vector>

#include "kernels/grouped_lora/cpu.h"

namespace milora {

enum class LoraTaskKind : int32_t { kWhole, kShrink, kExpand };

struct LoraTask {
  LoraTaskKind kind;
  int32_t job, job_end;        // kWhole: several jobs of one adapter, which share x
  int32_t row_begin, row_end;  // within each job, cut at its rows
  int32_t begin, end;          // ranks (kShrink) or columns (kExpand)
};

struct LoraTasks {
  std::vector<LoraTask> tasks;
  std::vector<int32_t> shrinks_left;  // per job; a core counts as the last of them
  std::atomic<int64_t> next{0};

  // Cuts the schedule's jobs for at most max_threads threads. Returns how many should call run: 1
  // where waking the others takes longer than the work.
  int64_t cut(const LoraSchedule& schedule, int64_t d_in, Dtype dtype, int64_t max_threads);

  // Takes tasks until none is left.
  void run(const LoraWork& work);
};

}  // namespace milora
