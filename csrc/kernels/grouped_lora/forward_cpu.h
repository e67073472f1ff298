// Forward of the grouped low-rank update on a CPU:  y_t += g (s B C (rg * A x_t) + u y_t + v)
//
// Data flow: shrink reads a job's A and writes h = A x to float32 scratch (rows x rank, a few KB:
// it stays in cache); core multiplies C in there, for experts that have one; expand reads Bt and
// touches each y element once.
//
// Few rows (decode): 2 rank (d_in + d_out) multiply-adds on as many weights, so time is bytes of A
// and Bt over the bandwidth of memory. Both are walked eight rows at a time with the next eight
// prefetched in ascending order; with column blocks instead memory gives half of that.
// Many rows (prefill, training): bound by arithmetic. x goes through A in panels of 4 rows, Bt is
// repacked in L2, and 6 rows of y at a time go along it.
//
// Order of summation per output: lanes over d_in, then a fixed tree; the same along a row of C;
// then ranks in order. It does not depend on the rows beside it. Where the CPU multiplies bf16
// pairs, h is rounded to bf16 for every number of rows alike.
#pragma once

#include <cstring>

#include "kernels/cpu/axpy.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/grouped_lora/cpu.h"

namespace milora::MILORA_ISA {
namespace {

constexpr int64_t kPackRows = 12;  // below this packing Bt costs more than it saves

// h of a unit times the gates of its ranks, while it is in L1.
inline void gate_ranks(const LoraWork& work, const LoraUnit& unit) {
  const LoraJob& job = work.jobs[unit.job];
  for (int64_t i = unit.row_begin; i < unit.row_end; ++i) {
    const int64_t token = work.rows[job.row_begin + i];
    const float* gates = work.rank_gates + (token * work.num_slices + job.slice) * work.max_rank;
    float* hidden = work.hidden + job.hidden_begin + i * job.rank;
    for (int64_t k = unit.begin; k < unit.end; ++k) hidden[k] *= gates[k];
  }
}

template <class T>
void shrink_unit(const LoraWork& work, const LoraUnit& unit) {
  const LoraJob& job = work.jobs[unit.job];
  const T* x_rows[kUnitRows];
  const int64_t n = unit.row_end - unit.row_begin;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t token = work.rows[job.row_begin + unit.row_begin + i];
    x_rows[i] = static_cast<const T*>(work.x) + token * work.x_stride;
  }
  dot_rows(x_rows, n, static_cast<const T*>(job.a) + unit.begin * job.a_stride, job.a_stride,
           unit.end - unit.begin, work.d_in,
           work.hidden + job.hidden_begin + unit.row_begin * job.rank + unit.begin, job.rank);
  if (work.rank_gates != nullptr) gate_ranks(work, unit);
}

// h = C h in float32, in place: a few rows at a time leave their products aside. Where rows are
// many C stays in a near cache; where they are few it is rank / (d_in + d_out) of what A and Bt
// are.
template <class T>
void core_unit(const LoraWork& work, const LoraUnit& unit) {
  const LoraJob& job = work.jobs[unit.job];
  alignas(64) float products[kDotRows * kMaxRank];
  for (int64_t i = unit.row_begin; i < unit.row_end; i += kDotRows) {
    const int64_t n = unit.row_end - i < kDotRows ? unit.row_end - i : kDotRows;
    float* hidden = work.hidden + job.hidden_begin + i * job.rank;
    const float* rows[kDotRows];
    for (int64_t m = 0; m < n; ++m) rows[m] = hidden + m * job.rank;
    dot_rows(rows, n, static_cast<const T*>(job.core), job.core_stride, job.rank, job.rank,
             products, job.rank);
    std::memcpy(hidden, products, n * job.rank * sizeof(float));
  }
}

// `coef` [rows, steps] for the columns [unit.begin, unit.end) of Bt; update(row, column, h B, n).
template <class T, class Step, class Update>
void expand_few(const LoraJob& job, const LoraUnit& unit, const float* coef, int64_t coef_row,
                const Update& update) {
  const T* bt = static_cast<const T*>(job.bt) + unit.begin;
  const int64_t num_rows = unit.row_end - unit.row_begin;
  const auto rows = [&](auto count, int64_t m) {
    axpy_stream<decltype(count)::value, Step>(
        coef + m * coef_row, coef_row, job.rank, bt, job.bt_stride, unit.end - unit.begin,
        [&](int64_t i, int64_t c, Vec acc, int64_t n) { update(m + i, unit.begin + c, acc, n); });
  };
  int64_t m = 0;
  for (; m + 4 <= num_rows; m += 4) rows(std::integral_constant<int, 4>(), m);
  if (m + 2 <= num_rows) {
    rows(std::integral_constant<int, 2>(), m);
    m += 2;
  }
  if (m < num_rows) rows(std::integral_constant<int, 1>(), m);
}

template <class T, class Step, class Update>
void expand_many(const LoraJob& job, const LoraUnit& unit, const float* coef, int64_t coef_row,
                 const Update& update) {
  const T* bt = static_cast<const T*>(job.bt);
  alignas(64) float panel[kPanelFloats];
  const int64_t step = panel_cols<Step>(job.rank);
  for (int64_t c0 = unit.begin; c0 < unit.end; c0 += step) {
    const int64_t cols = unit.end - c0 < step ? unit.end - c0 : step;
    pack_panel<Step, T>([&](int64_t k) { return bt + k * job.bt_stride + c0; }, job.rank, cols,
                        panel);
    axpy_panel<Step>(coef, coef_row, 1, job.rank, panel, unit.row_end - unit.row_begin, cols,
                     [&](int64_t i, int64_t c, Vec acc, int64_t n)
                         MILORA_ALWAYS_INLINE { update(i, c0 + c, acc, n); });
  }
}

template <class T>
void expand_unit(const LoraWork& work, const LoraUnit& unit) {
  using Step = LoraStep<T>;
  const LoraJob& job = work.jobs[unit.job];
  const T* y = static_cast<const T*>(work.y[job.slice]);
  T* out = static_cast<T*>(work.out[job.slice]);
  const int64_t y_stride = work.y_stride[job.slice], out_stride = work.out_stride[job.slice];
  const int64_t num_rows = unit.row_end - unit.row_begin;
  const int32_t* tokens = work.rows + job.row_begin + unit.row_begin;
  const float* gates = work.row_gates + job.row_begin + unit.row_begin;
  const Vec scale = set1(job.scale);

  const float* coef = work.hidden + job.hidden_begin + unit.row_begin * job.rank;
  int64_t coef_row = job.rank;
  alignas(64) float packed[Step::kDepth == 1 ? 1 : kUnitRows * kMaxRank / 2];
  if constexpr (Step::kDepth != 1) {
    const int64_t steps = num_steps<Step>(job.rank);
    pack_coefs<Step>(coef, job.rank, 1, num_rows, job.rank, packed, steps, 1);
    coef = packed;
    coef_row = steps;
  }

  // One rounding to T, at the very end.
  const auto update = [&](int64_t row, int64_t c, Vec low_rank, int64_t n) MILORA_ALWAYS_INLINE {
    const int64_t token = tokens[row];
    const Vec base = load_upto(y + token * y_stride + c, n);
    Vec delta = mul(scale, low_rank);
    if (job.u != nullptr) delta = fma(load_upto(job.u + c, n), base, delta);
    if (job.v != nullptr) delta = add(delta, load_upto(job.v + c, n));
    store_upto(out + token * out_stride + c, fma(set1(gates[row]), delta, base), n);
  };
  if (num_rows < kPackRows) {
    expand_few<T, Step>(job, unit, coef, coef_row, update);
    return;
  }
  expand_many<T, Step>(job, unit, coef, coef_row, update);
}

void shrink(const LoraWork& work, const LoraUnit& unit) {
  MILORA_DISPATCH_DTYPE(work.dtype, T, { shrink_unit<T>(work, unit); })
}

void core(const LoraWork& work, const LoraUnit& unit) {
  MILORA_DISPATCH_DTYPE(work.dtype, T, { core_unit<T>(work, unit); })
}

void expand(const LoraWork& work, const LoraUnit& unit) {
  MILORA_DISPATCH_DTYPE(work.dtype, T, { expand_unit<T>(work, unit); })
}

void transpose_b(const void* b, Dtype dtype, int64_t rank, int64_t d_out, int64_t begin,
                 int64_t end, void* bt) {
  MILORA_DISPATCH_DTYPE(dtype, T, {
    for (int64_t o = begin; o < end; ++o) {
      const T* row = static_cast<const T*>(b) + o * rank;
      for (int64_t k = 0; k < rank; ++k) static_cast<T*>(bt)[k * d_out + o] = row[k];
    }
  })
}

}  // namespace
}  // namespace milora::MILORA_ISA
