// Forward of the grouped low-rank update on a CPU:  y_t += g (s B (A x_t) + u y_t + v)   [eq. 1]
//
// Data flow: shrink reads a job's A once per 32 rows and writes h = A x to float32 scratch
// (num_rows x rank, a few KB: it stays in cache); expand reads Bt once per 96 rows and touches
// each y element once. With one row per adapter (decode) the work is 2 rank (d_in + d_out)
// multiply-adds on rank (d_in + d_out) weights: bound by reading A and B, so both are read in
// their own dtype along contiguous runs. With many rows (prefill, training) Bt is repacked 64
// columns at a time as float32 in L1 and reused.
//
// Order of summation per output: lanes over d_in, then a fixed tree; then ranks in order. It does
// not depend on the rows beside it.
#pragma once

#include "kernels/cpu/blocks.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/grouped_lora/cpu.h"

namespace milora::MILORA_ISA {
namespace {

constexpr int64_t kPackRows = 12;     // below this packing Bt costs more than it saves
constexpr int64_t kRowPointers = 32;  // rows of a shrink unit at most (schedule.cpp)

template <class T>
void shrink_unit(const LoraWork& work, const LoraUnit& unit) {
  const LoraJob& job = work.jobs[unit.job];
  const T* x_rows[kRowPointers];
  const int64_t n = unit.row_end - unit.row_begin;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t token = work.rows[job.row_begin + unit.row_begin + i];
    x_rows[i] = static_cast<const T*>(work.x) + token * work.x_stride;
  }
  dot_rows(x_rows, n, static_cast<const T*>(job.a) + unit.begin * job.a_stride, job.a_stride,
           unit.end - unit.begin, work.d_in,
           work.hidden + job.hidden_begin + unit.row_begin * job.rank + unit.begin, job.rank);
}

template <class T>
void expand_unit(const LoraWork& work, const LoraUnit& unit) {
  const LoraJob& job = work.jobs[unit.job];
  const T* y = static_cast<const T*>(work.y[job.slice]);
  T* out = static_cast<T*>(work.out[job.slice]);
  const float* hidden = work.hidden + job.hidden_begin + unit.row_begin * job.rank;
  const int64_t first_row = job.row_begin + unit.row_begin;
  const Vec scale = set1(job.scale);

  // One rounding to T, at the very end.
  const auto update = [&](int64_t row, int64_t c, Vec low_rank, int64_t n) {
    const int64_t token = work.rows[first_row + row];
    const Vec base = load_upto(y + token * work.y_stride[job.slice] + c, n);
    Vec delta = mul(scale, low_rank);
    if (job.u != nullptr) delta = fma(load_upto(job.u + c, n), base, delta);
    if (job.v != nullptr) delta = add(delta, load_upto(job.v + c, n));
    store_upto(out + token * work.out_stride[job.slice] + c,
               fma(set1(work.row_gates[first_row + row]), delta, base), n);
  };

  const T* bt = static_cast<const T*>(job.bt);
  const int64_t num_rows = unit.row_end - unit.row_begin;
  if (num_rows < kPackRows) {
    for (int64_t i = 0; i < num_rows; ++i) {
      axpy_row(hidden + i * job.rank, 1, job.rank, bt + unit.begin, job.bt_stride,
               unit.end - unit.begin,
               [&](int64_t c, Vec acc, int64_t n) { update(i, unit.begin + c, acc, n); });
    }
    return;
  }
  alignas(64) float strip[kMaxRank * kStrip];
  for (int64_t c0 = unit.begin; c0 < unit.end; c0 += kStrip) {
    const int64_t cols = unit.end - c0 < kStrip ? unit.end - c0 : kStrip;
    pack_strip<T>([&](int64_t k) { return bt + k * job.bt_stride + c0; }, job.rank, cols, strip);
    axpy_strip(hidden, job.rank, 1, job.rank, strip, num_rows, cols,
               [&](int64_t i, int64_t c, Vec acc, int64_t n) { update(i, c0 + c, acc, n); });
  }
}

void shrink(const LoraWork& work, int64_t begin, int64_t end) {
  MILORA_DISPATCH_DTYPE(work.dtype, T, {
    for (int64_t i = begin; i < end; ++i) shrink_unit<T>(work, work.shrink_units[i]);
  })
}

void expand(const LoraWork& work, int64_t begin, int64_t end) {
  MILORA_DISPATCH_DTYPE(work.dtype, T, {
    for (int64_t i = begin; i < end; ++i) expand_unit<T>(work, work.expand_units[i]);
  })
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
