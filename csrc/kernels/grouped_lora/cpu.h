// The CPU kernels of grouped_lora_, grouped_lora and its backward.
//
//   shrink   h = A x                    a unit of rows and ranks
//   expand   y += g (s B h + u y + v)   a unit of rows and columns, after the shrink of those rows
//
// tasks.h says which thread runs which unit when. All tables here are plain pointers, since these
// files are compiled once per instruction set and must not emit shared template code.
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/grouped_lora/schedule.h"

namespace milora {

struct LoraWork {
  const LoraJob* jobs;
  const int32_t* rows;     // token of each row
  const float* row_gates;  // gate of each row
  float* hidden;           // A x, per job [num_rows, rank]
  const void* x;           // [num_tokens, d_in]
  int64_t x_stride, d_in;
  const void* y[kMaxSlices];  // [num_tokens, d_out], read
  void* out[kMaxSlices];      // [num_tokens, d_out], written; may be y
  int64_t y_stride[kMaxSlices], out_stride[kMaxSlices];
  Dtype dtype;
};

struct LoraBackwardWork {
  const LoraJob* jobs;  // a: as given; bt: from transpose_b
  const LoraUnit* row_units;
  const LoraUnit* dx_units;
  const LoraUnit* da_units;
  const LoraUnit* db_units;
  const int32_t* rows;
  const float* row_gates;
  float* hidden;       // per job [num_rows, rank]: A x, then g s A x
  float* grad_hidden;  // per job [num_rows, rank]: g s Bt dy
  float* row_dots;     // [rows]: s (Bt dy) . (A x), what each row adds to its gate's gradient
  const void* x;       // [num_tokens, d_in]
  const void* dy;      // [num_tokens, d_out]
  int64_t x_stride, dy_stride, d_in, d_out;
  void* dx;                // [num_tokens, d_in] or null
  const LoraGrads* grads;  // [num_adapters] or null
  Dtype dtype;
  bool need_hidden;  // dA needs grad_hidden alone, dB and dgates need hidden too
};

struct GroupedLoraCpu {
  void (*shrink)(const LoraWork& work, const LoraUnit& unit);
  void (*expand)(const LoraWork& work, const LoraUnit& unit);
  // b [d_out, rank] -> bt [rank, d_out], columns [begin, end)
  void (*transpose_b)(const void* b, Dtype dtype, int64_t rank, int64_t d_out, int64_t begin,
                      int64_t end, void* bt);
  void (*backward_rows)(const LoraBackwardWork& work, int64_t begin, int64_t end);
  void (*backward_dx)(const LoraBackwardWork& work, int64_t begin, int64_t end);
  void (*backward_da)(const LoraBackwardWork& work, int64_t begin, int64_t end);
  void (*backward_db)(const LoraBackwardWork& work, int64_t begin, int64_t end);
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
