#include "kernels/grouped_lora/tasks.h"

#include <algorithm>
#include <thread>

namespace milora {
namespace {

// Costs are in bytes read from memory: a core multiplies about two bf16 or f32 weights by a row in
// the time that a byte takes.
constexpr int64_t kParallelCost = 128 * 1024;  // 5 us: about what it takes to wake a thread
constexpr int64_t kSplitCost = 32 * 1024;
constexpr int64_t kFewRows = 16;   // more are cut by rows
constexpr int64_t kRankStep = 8;   // rows of A that are read together
constexpr int64_t kColStep = 128;  // columns
constexpr int kSpins = 2000;       // some microseconds, before the core is given to others

int64_t cost_of(const LoraJob& job, int64_t d_in, int64_t num_rows, Dtype dtype) {
  const int64_t per_weight = std::max(element_size(dtype), num_rows / 2);
  return job.rank * (d_in + job.d_out) * per_weight;
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void wait_for(std::atomic_ref<int32_t> left) {
  for (int i = 0; left.load(std::memory_order_acquire) != 0; ++i) {
    if (i < kSpins) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace

int64_t LoraTasks::cut(const LoraSchedule& schedule, int64_t d_in, Dtype dtype,
                       int64_t max_threads) {
  const auto& jobs = schedule.jobs;
  const auto num_jobs = static_cast<int32_t>(jobs.size());
  tasks.clear();
  next.store(0, std::memory_order_relaxed);
  shrinks_left.assign(jobs.size(), 0);
  int64_t remaining = 0;
  for (const LoraJob& job : jobs) remaining += cost_of(job, d_in, job.num_rows, dtype);
  const int64_t threads = remaining < kParallelCost ? 1 : max_threads;

  const auto whole = [&](int32_t job, int32_t job_end, int64_t row_begin, int64_t row_end) {
    tasks.push_back({LoraTaskKind::kWhole, job, job_end, static_cast<int32_t>(row_begin),
                     static_cast<int32_t>(row_end), 0, 0});
  };
  const auto split = [&](int32_t job, LoraTaskKind kind, int64_t extent, int64_t step) {
    const int64_t share = (extent + 2 * threads - 1) / (2 * threads);
    step = (share + step - 1) / step * step;
    for (int64_t begin = 0; begin < extent; begin += step) {
      tasks.push_back({kind, job, job + 1, 0, static_cast<int32_t>(jobs[job].num_rows),
                       static_cast<int32_t>(begin),
                       static_cast<int32_t>(std::min(begin + step, extent))});
      shrinks_left[job] += kind == LoraTaskKind::kShrink;
    }
    shrinks_left[job] += kind == LoraTaskKind::kShrink && jobs[job].core != nullptr;
  };

  for (int32_t first = 0; first < num_jobs;) {
    int32_t last = first;
    int64_t num_rows = 0;
    for (; last < num_jobs && jobs[last].adapter == jobs[first].adapter; ++last) {
      num_rows = std::max(num_rows, jobs[last].num_rows);
    }
    if (num_rows >= kFewRows) {
      // By rows, all slices of an adapter together: they share x. Smaller towards the end.
      for (int64_t row = 0; row < num_rows;) {
        int64_t rows = kUnitRows, cost = 0;
        for (;; rows /= 2) {
          cost = 0;
          for (int32_t j = first; j < last; ++j) cost += cost_of(jobs[j], d_in, rows, dtype);
          if (rows <= kFewRows || threads == 1 || cost * 2 * threads <= remaining) break;
        }
        whole(first, last, row, row + rows);
        remaining -= cost;
        row += rows;
      }
    } else {
      for (int32_t j = first; j < last; ++j) {
        const int64_t cost = cost_of(jobs[j], d_in, jobs[j].num_rows, dtype);
        remaining -= cost;
        if (cost < kSplitCost || remaining >= cost * (threads - 1)) {
          whole(j, j + 1, 0, jobs[j].num_rows);
        } else {
          split(j, LoraTaskKind::kShrink, jobs[j].rank, kRankStep);
          split(j, LoraTaskKind::kExpand, jobs[j].d_out, kColStep);
        }
      }
    }
    first = last;
  }
  return std::min<int64_t>(threads, static_cast<int64_t>(tasks.size()));
}

void LoraTasks::run(const LoraWork& work) {
  const GroupedLoraCpu& kernels = grouped_lora_cpu();
  const auto count = static_cast<int64_t>(tasks.size());
  for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
       i = next.fetch_add(1, std::memory_order_relaxed)) {
    const LoraTask& task = tasks[i];
    const auto unit_of = [&](int32_t job, int64_t extent) {
      const auto rows = static_cast<int32_t>(work.jobs[job].num_rows);
      return LoraUnit{job, task.row_begin, std::min(task.row_end, rows), 0,
                      static_cast<int32_t>(extent)};
    };
    switch (task.kind) {
      case LoraTaskKind::kWhole:
        for (int32_t j = task.job; j < task.job_end; ++j) {
          const LoraUnit unit = unit_of(j, work.jobs[j].rank);
          if (unit.row_begin >= unit.row_end) continue;
          kernels.shrink(work, unit);
          if (work.jobs[j].core != nullptr) kernels.core(work, unit);
        }
        for (int32_t j = task.job; j < task.job_end; ++j) {
          const LoraUnit unit = unit_of(j, work.jobs[j].d_out);
          if (unit.row_begin < unit.row_end) kernels.expand(work, unit);
        }
        break;
      case LoraTaskKind::kShrink: {
        kernels.shrink(work, {task.job, task.row_begin, task.row_end, task.begin, task.end});
        // Acquire: whoever runs the core reads what the other threads have written.
        std::atomic_ref left(shrinks_left[task.job]);
        const bool core_is_left = left.fetch_sub(1, std::memory_order_acq_rel) == 2;
        if (core_is_left && work.jobs[task.job].core != nullptr) {
          kernels.core(work, unit_of(task.job, work.jobs[task.job].rank));
          left.fetch_sub(1, std::memory_order_release);
        }
        break;
      }
      case LoraTaskKind::kExpand:
        wait_for(std::atomic_ref(shrinks_left[task.job]));
        kernels.expand(work, {task.job, task.row_begin, task.row_end, task.begin, task.end});
        break;
    }
  }
}

}  // namespace milora
