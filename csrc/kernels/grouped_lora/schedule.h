// From routes to jobs: which rows each adapter serves in which slice.
//
// Runs of tokens with one route become the rows of their adapter, in token order, so that its
// weights are read once for all of them. tasks.h hands the jobs to threads.
#pragma once

#include <vector>

#include "kernels/grouped_lora/params.h"

namespace milora {

// One adapter's expert in one slice, with the rows that use it.
struct LoraJob {
  const void* a;   // [rank, d_in]
  const void* bt;  // [rank, d_out]
  int64_t a_stride, bt_stride;
  const float* u;    // [d_out] or null
  const float* v;    // [d_out] or null
  const void* core;  // [rank, rank] or null
  int64_t core_stride;
  float scale;
  int32_t rank;
  int32_t slice;
  int32_t adapter;
  int64_t row_begin, num_rows;  // into rows and row_gates
  int64_t hidden_begin;         // float offset into the scratch of A x, [num_rows, rank]
  int64_t d_out;
};

constexpr int64_t kUnitRows = 64;  // at most: enough to reuse weights from cache

// A piece of one job. Results do not depend on where jobs are cut.
struct LoraUnit {
  int32_t job;
  int32_t row_begin, row_end;  // within the job
  int32_t begin, end;          // ranks (shrink) or columns (expand)
};

struct LoraSchedule {
  std::vector<LoraJob> jobs;     // those of one adapter side by side
  std::vector<int32_t> rows;     // token of each row
  std::vector<float> row_gates;  // gate of each row, never 0
  int64_t hidden_size = 0;       // floats

  void clear();
};

// Rows of each adapter, grouped: the part that both ops share.
struct LoraGroup {
  int32_t adapter;
  int64_t begin, end;  // into tokens
};
struct LoraGroups {
  std::vector<LoraGroup> groups;
  std::vector<int32_t> tokens;
};

// Throws std::runtime_error (with op as prefix) on a route or adapter out of range.
void group_tokens(const char* op, const int32_t* route_of, const int32_t* adapter_of,
                  int64_t num_tokens, int64_t num_routes, int64_t num_adapters, LoraGroups* groups);

// Throws on a rank, offset or length that points outside the pool.
void schedule(const GroupedLoraPoolParams& params, LoraSchedule* out);

}  // namespace milora
