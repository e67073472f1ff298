// The two register-blocked loops under every CPU kernel.
//
//   dot_block    out[m][n] = sum_d x_m[d] w_n[d]          lanes along d: both rows contiguous
//   axpy_block   out[m][c] = sum_k coef[m][k] w[k][c]     lanes along c: w's rows contiguous
//
// Each output has one accumulator of its own and one order of summation, whatever the block shape,
// so MR and NR are free to follow the number of rows: results do not change.
#pragma once

#include <type_traits>

#include "kernels/cpu/simd.h"

namespace milora::MILORA_ISA {
namespace {

// Accumulators, w vectors and one x vector must fit the registers: 4 x 4 + 4 + 1 of 32, else
// 2 x 4 + 4 + 1 of 16; 6 x 4 + 4 + 1 of 32, else 6 x 2 + 2 + 1 of 16.
constexpr int kDotRows = kNumRegisters == 32 ? 4 : 2;
constexpr int kDotCols = 4;
constexpr int kAxpyRows = 6;
constexpr int kAxpyVecs = kNumRegisters == 32 ? 4 : 2;
constexpr int kWideVecs = kNumRegisters == 32 ? 16 : 8;  // one row: long runs of w
constexpr int kStrip = 64;                               // columns of a packed strip of w
static_assert(kStrip % (kAxpyVecs * kLanes) == 0, "a packed strip holds whole blocks");

template <int MR, int NR, class TX, class TW>
inline void dot_block(const TX* const (&x)[MR], const TW* const (&w)[NR], int64_t d,
                      float (&out)[MR][NR]) {
  Vec acc[MR][NR];
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NR; ++n) acc[m][n] = zero();
  }
  int64_t i = 0;
#ifdef __AVX512BF16__
  // Two products and two float32 additions an instruction, without widening either side.
  if constexpr (std::is_same_v<TX, Bf16> && std::is_same_v<TW, Bf16>) {
    for (; i < d; i += 2 * kLanes) {
      const __mmask32 mask = d - i >= 2 * kLanes ? ~__mmask32{0} : (__mmask32{1} << (d - i)) - 1;
      __m512bh wv[NR];
      for (int n = 0; n < NR; ++n) wv[n] = (__m512bh)_mm512_maskz_loadu_epi16(mask, w[n] + i);
      for (int m = 0; m < MR; ++m) {
        const auto xv = (__m512bh)_mm512_maskz_loadu_epi16(mask, x[m] + i);
        for (int n = 0; n < NR; ++n) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], xv, wv[n]);
      }
    }
  }
#endif
  for (; i + kLanes <= d; i += kLanes) {
    Vec wv[NR];
    for (int n = 0; n < NR; ++n) wv[n] = load(w[n] + i);
    for (int m = 0; m < MR; ++m) {
      const Vec xv = load(x[m] + i);
      for (int n = 0; n < NR; ++n) acc[m][n] = fma(xv, wv[n], acc[m][n]);
    }
  }
  if (i < d) {
    const int rest = static_cast<int>(d - i);
    for (int n = 0; n < NR; ++n) {
      const Vec wv = load_first(w[n] + i, rest);
      for (int m = 0; m < MR; ++m) acc[m][n] = fma(load_first(x[m] + i, rest), wv, acc[m][n]);
    }
  }
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NR; ++n) out[m][n] = sum(acc[m][n]);
  }
}

// out[m * out_stride + n] = x_rows[m] . w_n for num_rows rows of x and num_w rows of w. Rows beyond
// the end repeat the last one and are dropped.
template <int MR, int NR, class TX, class TW>
inline void dot_panel(const TX* const* x_rows, const TW* w, int64_t w_stride, int64_t num_w,
                      int64_t d, float* out, int64_t out_stride) {
  const TX* x[MR];
  for (int m = 0; m < MR; ++m) x[m] = x_rows[m];
  for (int64_t n0 = 0; n0 < num_w; n0 += NR) {
    const TW* rows[NR];
    for (int n = 0; n < NR; ++n) {
      const int64_t row = n0 + n < num_w ? n0 + n : num_w - 1;
      rows[n] = w + row * w_stride;
    }
    float block[MR][NR];
    dot_block<MR, NR>(x, rows, d, block);
    const int count = num_w - n0 < NR ? static_cast<int>(num_w - n0) : NR;
    for (int m = 0; m < MR; ++m) {
      for (int n = 0; n < count; ++n) out[m * out_stride + n0 + n] = block[m][n];
    }
  }
}

template <class TX, class TW>
inline void dot_rows(const TX* const* x_rows, int64_t num_rows, const TW* w, int64_t w_stride,
                     int64_t num_w, int64_t d, float* out, int64_t out_stride) {
  int64_t m = 0;
  for (; m + kDotRows <= num_rows; m += kDotRows) {
    dot_panel<kDotRows, kDotCols>(x_rows + m, w, w_stride, num_w, d, out + m * out_stride,
                                  out_stride);
  }
  for (; m < num_rows; ++m) {
    dot_panel<1, 2 * kDotCols>(x_rows + m, w, w_stride, num_w, d, out + m * out_stride, out_stride);
  }
}

// acc[m][v] += sum_k coef[m * coef_row + k * coef_k] * w[k * w_stride + v * kLanes ...]
template <int MR, int NV, class TW>
inline void axpy_block(const float* coef, int64_t coef_row, int64_t coef_k, int64_t num_k,
                       const TW* w, int64_t w_stride, Vec (&acc)[MR][NV]) {
  for (int64_t k = 0; k < num_k; ++k) {
    Vec wv[NV];
    for (int v = 0; v < NV; ++v) wv[v] = load(w + k * w_stride + v * kLanes);
    for (int m = 0; m < MR; ++m) {
      const Vec c = set1(coef[m * coef_row + k * coef_k]);
      for (int v = 0; v < NV; ++v) acc[m][v] = fma(c, wv[v], acc[m][v]);
    }
  }
}

// One vector of n <= kLanes columns.
template <class TW>
inline Vec axpy_first(const float* coef, int64_t coef_k, int64_t num_k, const TW* w,
                      int64_t w_stride, int64_t n, Vec acc) {
  for (int64_t k = 0; k < num_k; ++k) {
    acc = fma(set1(coef[k * coef_k]), load_upto(w + k * w_stride, n), acc);
  }
  return acc;
}

// Columns [0, num_cols) of one output row; emit(column, vector, count) takes each vector.
template <class TW, class Emit>
inline void axpy_row(const float* coef, int64_t coef_k, int64_t num_k, const TW* w,
                     int64_t w_stride, int64_t num_cols, const Emit& emit) {
  int64_t c = 0;
  for (; c + kWideVecs * kLanes <= num_cols; c += kWideVecs * kLanes) {
    Vec acc[1][kWideVecs];
    for (int v = 0; v < kWideVecs; ++v) acc[0][v] = zero();
    axpy_block<1, kWideVecs>(coef, 0, coef_k, num_k, w + c, w_stride, acc);
    for (int v = 0; v < kWideVecs; ++v) emit(c + v * kLanes, acc[0][v], kLanes);
  }
  for (; c < num_cols; c += kLanes) {
    const int64_t n = num_cols - c < kLanes ? num_cols - c : kLanes;
    emit(c, axpy_first(coef, coef_k, num_k, w + c, w_stride, n, zero()), n);
  }
}

// Copies columns [0, num_cols <= kStrip) of num_k rows into float32 rows of kStrip, zero-filled.
template <class TW, class RowOf>
inline void pack_strip(const RowOf& row_of, int64_t num_k, int64_t num_cols, float* strip) {
  for (int64_t k = 0; k < num_k; ++k) {
    const TW* row = row_of(k);
    float* out = strip + k * kStrip;
    for (int64_t c = 0; c < kStrip; c += kLanes) {
      const int64_t n = num_cols - c;
      store(out + c, n > 0 ? load_upto(row + c, n) : zero());
    }
  }
}

// num_rows output rows over a packed strip; emit(row, column, vector, count).
template <class Emit>
inline void axpy_strip(const float* coef, int64_t coef_row, int64_t coef_k, int64_t num_k,
                       const float* strip, int64_t num_rows, int64_t num_cols, const Emit& emit) {
  constexpr int kBlock = kAxpyVecs * kLanes;
  const auto run = [&](auto rows, int64_t m, int64_t c) {
    constexpr int kRows = decltype(rows)::value;
    Vec acc[kRows][kAxpyVecs];
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kAxpyVecs; ++v) acc[i][v] = zero();
    }
    axpy_block<kRows, kAxpyVecs>(coef + m * coef_row, coef_row, coef_k, num_k, strip + c, kStrip,
                                 acc);
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kAxpyVecs; ++v) {
        const int64_t column = c + v * kLanes;
        const int64_t n = num_cols - column < kLanes ? num_cols - column : kLanes;
        if (n > 0) emit(m + i, column, acc[i][v], n);
      }
    }
  };
  for (int64_t c = 0; c < num_cols; c += kBlock) {
    int64_t m = 0;
    for (; m + kAxpyRows <= num_rows; m += kAxpyRows) {
      run(std::integral_constant<int, kAxpyRows>(), m, c);
    }
    for (; m < num_rows; ++m) run(std::integral_constant<int, 1>(), m, c);
  }
}

}  // namespace
}  // namespace milora::MILORA_ISA
