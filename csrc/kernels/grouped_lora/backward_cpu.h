// Backward of the grouped low-rank update on a CPU. With G = Bt dy_t and h = A x_t:
//
//   dx_t += g s At G          dgate = sum_t s G . h
//   dA   = sum_t (g s G) x_t  dBt   = sum_t (g s h) dy_t
//
// Rows first: G, h and their product (h is computed again rather than kept from the forward: it
// costs one of five products and saves tokens x rank floats per module). They leave g s G and g s h
// behind as the coefficients of what follows, rounded to bf16 pairs where the CPU multiplies those.
// Then dx by rows, dA and dB by columns, in any order: the owner of some columns walks all rows of
// the adapter, in blocks of 64 repacked in L2, so the sum does not depend on the number of threads
// and needs no atomics.
#pragma once

#include "kernels/cpu/axpy.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/grouped_lora/cpu.h"
#include "kernels/grouped_lora/forward_cpu.h"

namespace milora::MILORA_ISA {
namespace {

constexpr int64_t kReduceRows = 64;
static_assert(kReduceRows % 2 == 0 && kBackwardRows % 2 == 0, "pairs of rows stay in one block");

template <class T>
void backward_rows_unit(const LoraBackwardWork& work, const LoraUnit& unit) {
  using Step = LoraStep<T>;
  const LoraJob& job = work.jobs[unit.job];
  const int64_t rank = job.rank, n = unit.row_end - unit.row_begin;
  const int64_t first_row = job.row_begin + unit.row_begin;
  const T* dy_rows[kBackwardRows];
  const T* x_rows[kBackwardRows];
  for (int64_t i = 0; i < n; ++i) {
    const int64_t token = work.rows[first_row + i];
    dy_rows[i] = static_cast<const T*>(work.dy) + token * work.dy_stride;
    x_rows[i] = static_cast<const T*>(work.x) + token * work.x_stride;
  }
  alignas(64) float grad_hidden[kBackwardRows * kMaxRank];
  alignas(64) float hidden[kBackwardRows * kMaxRank];
  dot_rows(dy_rows, n, static_cast<const T*>(job.bt), job.bt_stride, rank, work.d_out, grad_hidden,
           rank);
  if (work.need_hidden) {
    dot_rows(x_rows, n, static_cast<const T*>(job.a), job.a_stride, rank, work.d_in, hidden, rank);
  }
  for (int64_t i = 0; i < n; ++i) {
    const float factor = work.row_gates[first_row + i] * job.scale;
    float dot = 0;
    for (int64_t k = i * rank; k < (i + 1) * rank; ++k) {
      if (work.need_hidden) {
        dot += grad_hidden[k] * hidden[k];
        hidden[k] *= factor;
      }
      grad_hidden[k] *= factor;
    }
    work.row_dots[first_row + i] = dot * job.scale;
  }

  // As coefficients of each row's ranks (dx), and of each rank's rows (dA, dB).
  const int64_t per_row = num_steps<Step>(rank);
  pack_coefs<Step>(grad_hidden, rank, 1, n, rank,
                   work.dx_coefs + job.hidden_begin + unit.row_begin * per_row, per_row, 1);
  const int64_t by_rows = job.hidden_begin + unit.row_begin / Step::kDepth * rank;
  pack_coefs<Step>(grad_hidden, 1, rank, rank, n, work.da_coefs + by_rows, 1, rank);
  if (work.need_hidden) {
    pack_coefs<Step>(hidden, 1, rank, rank, n, work.db_coefs + by_rows, 1, rank);
  }
}

template <class T>
void backward_dx_unit(const LoraBackwardWork& work, const LoraUnit& unit) {
  using Step = LoraStep<T>;
  const LoraJob& job = work.jobs[unit.job];
  const T* a = static_cast<const T*>(job.a);
  T* dx = static_cast<T*>(work.dx);
  const int64_t per_row = num_steps<Step>(job.rank);
  const float* coef = work.dx_coefs + job.hidden_begin + unit.row_begin * per_row;
  const int32_t* tokens = work.rows + job.row_begin + unit.row_begin;
  alignas(64) float panel[kPanelFloats];
  const int64_t step = panel_cols<Step>(job.rank);
  for (int64_t c0 = unit.begin; c0 < unit.end; c0 += step) {
    const int64_t cols = unit.end - c0 < step ? unit.end - c0 : step;
    pack_panel<Step, T>([&](int64_t k) { return a + k * job.a_stride + c0; }, job.rank, cols,
                        panel);
    axpy_panel<Step>(coef, per_row, 1, job.rank, panel, unit.row_end - unit.row_begin, cols,
                     [&](int64_t i, int64_t c, Vec acc, int64_t n) MILORA_ALWAYS_INLINE {
                       T* at = dx + tokens[i] * work.d_in + c0 + c;
                       store_upto(at, add(load_upto(at, n), acc), n);
                     });
  }
}

// For columns [begin, end) of `data` (x or dy) and all rows of the job:
//   sums[k][c] = sum_t coef[t][k] data[t][c];   then emit(sums, row length, first column, columns)
template <class T, class Emit>
void reduce_rows(const LoraBackwardWork& work, const LoraUnit& unit, const float* coef,
                 const void* data, int64_t stride, const Emit& emit) {
  using Step = LoraStep<T>;
  const LoraJob& job = work.jobs[unit.job];
  const int64_t rank = job.rank;
  alignas(64) float sums[kPanelFloats];
  alignas(64) float panel[kPanelFloats];
  // 256 columns at rank 128, fewer at more.
  constexpr int64_t kMost = kPanelFloats / kReduceRows / kStrip * kStrip;
  const int64_t fit = kPanelFloats / rank / kStrip * kStrip;
  const int64_t step = fit < kMost ? fit : kMost;
  for (int64_t c0 = unit.begin; c0 < unit.end; c0 += step) {
    const int64_t cols = unit.end - c0 < step ? unit.end - c0 : step;
    for (int64_t i = 0; i < rank * step; ++i) sums[i] = 0;
    for (int64_t t0 = 0; t0 < job.num_rows; t0 += kReduceRows) {
      const int64_t n = job.num_rows - t0 < kReduceRows ? job.num_rows - t0 : kReduceRows;
      const int32_t* tokens = work.rows + job.row_begin + t0;
      pack_panel<Step, T>(
          [&](int64_t t) { return static_cast<const T*>(data) + tokens[t] * stride + c0; }, n, cols,
          panel);
      // A strip at a time, so that it stays in L1 for all ranks.
      for (int64_t s0 = 0; s0 < cols; s0 += kStrip) {
        axpy_panel<Step>(coef + t0 / Step::kDepth * rank, 1, rank, n,
                         panel + s0 * num_steps<Step>(n), rank,
                         cols - s0 < kStrip ? cols - s0 : kStrip,
                         [&](int64_t k, int64_t c, Vec acc, int64_t) MILORA_ALWAYS_INLINE {
                           float* sum_at = sums + k * step + s0 + c;
                           store(sum_at, add(load(sum_at), acc));
                         });
      }
    }
    emit(sums, step, c0, cols);
  }
}

template <class T>
void backward_da_unit(const LoraBackwardWork& work, const LoraUnit& unit) {
  const LoraJob& job = work.jobs[unit.job];
  T* da = static_cast<T*>(work.grads[job.adapter].da);
  reduce_rows<T>(work, unit, work.da_coefs + job.hidden_begin, work.x, work.x_stride,
                 [&](const float* sums, int64_t length, int64_t c0, int64_t cols) {
                   for (int64_t k = 0; k < job.rank; ++k) {
                     for (int64_t c = 0; c < cols; c += kLanes) {
                       store_upto(da + k * work.d_in + c0 + c, load(sums + k * length + c),
                                  cols - c);
                     }
                   }
                 });
}

template <class T>
void backward_db_unit(const LoraBackwardWork& work, const LoraUnit& unit) {
  const LoraJob& job = work.jobs[unit.job];
  T* db = static_cast<T*>(work.grads[job.adapter].db);
  reduce_rows<T>(work, unit, work.db_coefs + job.hidden_begin, work.dy, work.dy_stride,
                 [&](const float* sums, int64_t length, int64_t c0, int64_t cols) {
                   for (int64_t c = 0; c < cols; ++c) {
                     for (int64_t k = 0; k < job.rank; k += kLanes) {
                       const int64_t n = job.rank - k < kLanes ? job.rank - k : kLanes;
                       alignas(64) float lanes[kLanes] = {};
                       for (int64_t i = 0; i < n; ++i) lanes[i] = sums[(k + i) * length + c];
                       store_upto(db + (c0 + c) * job.rank + k, load(lanes), n);
                     }
                   }
                 });
}

void backward_rows(const LoraBackwardWork& work, const LoraUnit& unit) {
  MILORA_DISPATCH_DTYPE(work.dtype, T, { backward_rows_unit<T>(work, unit); })
}
void backward_dx(const LoraBackwardWork& work, const LoraUnit& unit) {
  MILORA_DISPATCH_DTYPE(work.dtype, T, { backward_dx_unit<T>(work, unit); })
}
void backward_da(const LoraBackwardWork& work, const LoraUnit& unit) {
  MILORA_DISPATCH_DTYPE(work.dtype, T, { backward_da_unit<T>(work, unit); })
}
void backward_db(const LoraBackwardWork& work, const LoraUnit& unit) {
  MILORA_DISPATCH_DTYPE(work.dtype, T, { backward_db_unit<T>(work, unit); })
}

}  // namespace
}  // namespace milora::MILORA_ISA
