// Backward of the grouped low-rank update on a CPU. With G = Bt dy_t and h = A x_t:
//
//   dx_t = g s At G           dgate = sum_t s G . h
//   dA   = sum_t (g s G) x_t  dBt   = sum_t (g s h) dy_t
//
// Rows first (G, h and their product; h is computed again rather than kept from the forward: it
// costs one of five products and saves tokens x rank floats per module), then dx over columns of
// A, then dA and dB by strips of 64 columns: a strip's owner walks all rows of the adapter in
// order, in blocks of 64 rows repacked as float32 in L1, so the sum does not depend on the number
// of threads and needs no atomics.
#pragma once

#include "kernels/cpu/axpy.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/grouped_lora/cpu.h"
#include "kernels/grouped_lora/forward_cpu.h"

namespace milora::MILORA_ISA {
namespace {

constexpr int64_t kReduceRows = 64;

template <class T>
void backward_rows_unit(const LoraBackwardWork& work, const LoraUnit& unit) {
  const LoraJob& job = work.jobs[unit.job];
  const int64_t n = unit.row_end - unit.row_begin;
  const int64_t first_row = job.row_begin + unit.row_begin;
  const int64_t at = job.hidden_begin + unit.row_begin * job.rank;
  const T* dy_rows[kUnitRows];
  const T* x_rows[kUnitRows];
  for (int64_t i = 0; i < n; ++i) {
    const int64_t token = work.rows[first_row + i];
    dy_rows[i] = static_cast<const T*>(work.dy) + token * work.dy_stride;
    x_rows[i] = static_cast<const T*>(work.x) + token * work.x_stride;
  }
  float* grad_hidden = work.grad_hidden + at;
  dot_rows(dy_rows, n, static_cast<const T*>(job.bt), job.bt_stride, job.rank, work.d_out,
           grad_hidden, job.rank);
  float* hidden = work.hidden + at;
  if (work.need_hidden) {
    dot_rows(x_rows, n, static_cast<const T*>(job.a), job.a_stride, job.rank, work.d_in, hidden,
             job.rank);
  }
  for (int64_t i = 0; i < n; ++i) {
    const float factor = work.row_gates[first_row + i] * job.scale;
    float dot = 0;
    for (int64_t k = i * job.rank; k < (i + 1) * job.rank; ++k) {
      if (work.need_hidden) {
        dot += grad_hidden[k] * hidden[k];
        hidden[k] *= factor;
      }
      grad_hidden[k] *= factor;
    }
    work.row_dots[first_row + i] = dot * job.scale;
  }
}

template <class T>
void backward_dx_unit(const LoraBackwardWork& work, const LoraUnit& unit) {
  const LoraJob& job = work.jobs[unit.job];
  const T* a = static_cast<const T*>(job.a);
  T* dx = static_cast<T*>(work.dx);
  const float* coef = work.grad_hidden + job.hidden_begin + unit.row_begin * job.rank;
  alignas(64) float panel[kPanelFloats];
  const int64_t step = panel_cols<FmaStep<T>>(job.rank);
  for (int64_t c0 = unit.begin; c0 < unit.end; c0 += step) {
    const int64_t cols = unit.end - c0 < step ? unit.end - c0 : step;
    pack_panel<FmaStep<T>, T>([&](int64_t k) { return a + k * job.a_stride + c0; }, job.rank, cols,
                              panel);
    axpy_panel<FmaStep<T>>(coef, job.rank, 1, job.rank, panel, unit.row_end - unit.row_begin, cols,
                           [&](int64_t i, int64_t c, Vec acc, int64_t n) MILORA_ALWAYS_INLINE {
                             const int64_t token = work.rows[job.row_begin + unit.row_begin + i];
                             store_upto(dx + token * work.d_in + c0 + c, acc, n);
                           });
  }
}

// sums[rank][kStrip] = sum over the job's rows of coef[row][rank] * rows_of(row)[c0 + ...]
template <class T>
void reduce_rows(const LoraBackwardWork& work, const LoraJob& job, const float* coef,
                 const void* data, int64_t stride, int64_t c0, int64_t cols, float* sums) {
  alignas(64) float strip[kReduceRows * kStrip];
  for (int64_t i = 0; i < job.rank * kStrip; ++i) sums[i] = 0;
  for (int64_t t0 = 0; t0 < job.num_rows; t0 += kReduceRows) {
    const int64_t n = job.num_rows - t0 < kReduceRows ? job.num_rows - t0 : kReduceRows;
    pack_panel<FmaStep<T>, T>(
        [&](int64_t t) {
          return static_cast<const T*>(data) + work.rows[job.row_begin + t0 + t] * stride + c0;
        },
        n, cols, strip);
    axpy_panel<FmaStep<T>>(coef + t0 * job.rank, 1, job.rank, n, strip, job.rank, cols,
                           [&](int64_t k, int64_t c, Vec acc, int64_t) MILORA_ALWAYS_INLINE {
                             float* sum_at = sums + k * kStrip + c;
                             store(sum_at, add(load(sum_at), acc));
                           });
  }
}

template <class T>
void backward_da_unit(const LoraBackwardWork& work, const LoraUnit& unit) {
  const LoraJob& job = work.jobs[unit.job];
  alignas(64) float sums[kMaxRank * kStrip];
  const int64_t cols = unit.end - unit.begin;
  reduce_rows<T>(work, job, work.grad_hidden + job.hidden_begin, work.x, work.x_stride, unit.begin,
                 cols, sums);
  T* da = static_cast<T*>(work.grads[job.adapter].da) + unit.begin;
  for (int64_t k = 0; k < job.rank; ++k) {
    for (int64_t c = 0; c < cols; c += kLanes) {
      store_upto(da + k * work.d_in + c, load(sums + k * kStrip + c), cols - c);
    }
  }
}

template <class T>
void backward_db_unit(const LoraBackwardWork& work, const LoraUnit& unit) {
  const LoraJob& job = work.jobs[unit.job];
  alignas(64) float sums[kMaxRank * kStrip];
  const int64_t cols = unit.end - unit.begin;
  reduce_rows<T>(work, job, work.hidden + job.hidden_begin, work.dy, work.dy_stride, unit.begin,
                 cols, sums);
  T* db = static_cast<T*>(work.grads[job.adapter].db) + unit.begin * job.rank;
  for (int64_t c = 0; c < cols; ++c) {
    for (int64_t k = 0; k < job.rank; k += kLanes) {
      const int64_t n = job.rank - k < kLanes ? job.rank - k : kLanes;
      alignas(64) float lanes[kLanes] = {};
      for (int64_t i = 0; i < n; ++i) lanes[i] = sums[(k + i) * kStrip + c];
      store_upto(db + c * job.rank + k, load(lanes), n);
    }
  }
}

void backward_rows(const LoraBackwardWork& work, int64_t begin, int64_t end) {
  MILORA_DISPATCH_DTYPE(work.dtype, T, {
    for (int64_t i = begin; i < end; ++i) backward_rows_unit<T>(work, work.row_units[i]);
  })
}
void backward_dx(const LoraBackwardWork& work, int64_t begin, int64_t end) {
  MILORA_DISPATCH_DTYPE(work.dtype, T, {
    for (int64_t i = begin; i < end; ++i) backward_dx_unit<T>(work, work.dx_units[i]);
  })
}
void backward_da(const LoraBackwardWork& work, int64_t begin, int64_t end) {
  MILORA_DISPATCH_DTYPE(work.dtype, T, {
    for (int64_t i = begin; i < end; ++i) backward_da_unit<T>(work, work.da_units[i]);
  })
}
void backward_db(const LoraBackwardWork& work, int64_t begin, int64_t end) {
  MILORA_DISPATCH_DTYPE(work.dtype, T, {
    for (int64_t i = begin; i < end; ++i) backward_db_unit<T>(work, work.db_units[i]);
  })
}

}  // namespace
}  // namespace milora::MILORA_ISA
