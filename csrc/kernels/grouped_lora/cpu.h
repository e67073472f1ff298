// The CPU kernels of grouped_lora_, grouped_lora and its backward.
//
//   shrink   h = rg * A x               a unit of rows and ranks; rg: gates of the ranks, or 1
//   core     h = C h                    a unit of rows, after the shrink of all their ranks; where
//                                       the expert has a core
//   expand   y += g (s B h + u y + v)   a unit of rows and columns, after both for those rows
//
// tasks.h says which thread runs which unit when. All tables here are plain pointers, since these
// files are compiled once per instruction set and must not emit shared template code.
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/grouped_lora/schedule.h"

namespace milora {

struct LoraWork {
  const LoraJob* jobs;
  const int32_t* rows;      // token of each row
  const float* row_gates;   // gate of each row
  float* hidden;            // rg * A x, then C of that; per job [num_rows, rank]
  const float* rank_gates;  // [num_tokens, num_slices, max_rank] or null
  int64_t num_slices, max_rank;
  const void* x;  // [num_tokens, d_in]
  int64_t x_stride, d_in;
  const void* y[kMaxSlices];  // [num_tokens, d_out], read
  void* out[kMaxSlices];      // [num_tokens, d_out], written; may be y
  int64_t y_stride[kMaxSlices], out_stride[kMaxSlices];
  Dtype dtype;
};

constexpr int64_t kBackwardRows = 32;  // of a unit of backward_rows; even

struct LoraBackwardWork {
  const LoraJob* jobs;  // a: as given; bt: from transpose_b
  const int32_t* rows;
  const float* row_gates;
  // Per job at hidden_begin, in the form of the kernels' steps: one float or one pair of bf16.
  float* dx_coefs;  // g s Bt dy, [num_rows, steps of ranks]
  float* da_coefs;  // g s Bt dy, [steps of rows, rank]
  float* db_coefs;  // g s A x, [steps of rows, rank]
  float* row_dots;  // [rows]: s (Bt dy) . (A x), what each row adds to its gate's gradient
  const void* x;    // [num_tokens, d_in]
  const void* dy;   // [num_tokens, d_out]
  int64_t x_stride, dy_stride, d_in, d_out;
  void* dx;                // [num_tokens, d_in], added to; or null
  const LoraGrads* grads;  // [num_adapters] or null
  Dtype dtype;
  bool need_hidden;  // dx and dA need Bt dy alone, dB and dgates need A x too
};

struct GroupedLoraCpu {
  void (*shrink)(const LoraWork& work, const LoraUnit& unit);
  void (*core)(const LoraWork& work, const LoraUnit& unit);  // of all ranks, whatever unit says
  void (*expand)(const LoraWork& work, const LoraUnit& unit);
  // b [d_out, rank] -> bt [rank, d_out], columns [begin, end)
  void (*transpose_b)(const void* b, Dtype dtype, int64_t rank, int64_t d_out, int64_t begin,
                      int64_t end, void* bt);
  // Units of rows; then of rows and columns of x; of columns of x; of columns of dy.
  void (*backward_rows)(const LoraBackwardWork& work, const LoraUnit& unit);
  void (*backward_dx)(const LoraBackwardWork& work, const LoraUnit& unit);
  void (*backward_da)(const LoraBackwardWork& work, const LoraUnit& unit);
  void (*backward_db)(const LoraBackwardWork& work, const LoraUnit& unit);
};

#define MILORA_DECLARE(isa) MILORA_DECLARE_TABLE(isa, GroupedLoraCpu, kGroupedLoraCpu)
MILORA_FOR_EACH_ISA(MILORA_DECLARE)
#undef MILORA_DECLARE

inline const GroupedLoraCpu& grouped_lora_cpu() {
#define MILORA_CASE(isa) \
  case CpuIsa::isa:      \
    return isa::kGroupedLoraCpu;
  switch (cpu_isa()) { MILORA_FOR_EACH_ISA(MILORA_CASE) }
#undef MILORA_CASE
  return baseline::kGroupedLoraCpu;
}

}  // namespace milora
