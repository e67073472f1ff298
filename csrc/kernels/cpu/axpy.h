// Sums of rows:  out[m][c] = sum_k coef[m][k] w[k][c]      lanes along c: w's rows contiguous
//
// A step multiplies one or two rows of w: FmaStep one in float32; PairStep two at once in bf16,
// with the coefficients rounded to bf16, as torch rounds them between its two products. Each output
// has one accumulator and goes through its steps in order, whatever the loop around it: axpy_stream
// walks w in the order of memory with the sums in L1, axpy_panel has w repacked in L2 and serves
// many rows. Both give the same bits.
#pragma once

#include <type_traits>

#include "kernels/cpu/dot.h"

namespace milora::MILORA_ISA {
namespace {

// Accumulators, w vectors and one coefficient must fit the registers: 6 x 4 + 4 + 1 of 32, else
// 6 x 2 + 2 + 1 of 16.
constexpr int kAxpyRows = 6;
constexpr int kAxpyVecs = kNumRegisters == 32 ? 4 : 2;
constexpr int kStrip = 64;           // columns of a packed strip of w
constexpr int kStreamRows = 4;       // output rows of axpy_stream at most
constexpr int kStreamDepth = 8;      // rows of w it takes at once
constexpr int kStreamFloats = 4096;  // of its sums: 16 KB, half of L1
static_assert(kStrip % (kAxpyVecs * kLanes) == 0, "a packed strip holds whole blocks");

// ---- steps ----

template <class T>
struct FmaStep {
  static constexpr int kDepth = 1;  // rows of w
  static constexpr int kVecs = 1;   // vectors that hold kVecs * kLanes consecutive columns
  // Columns [0, n) of rows w and w + stride; has_second: whether there is a second row.
  MILORA_ALWAYS_INLINE static void load_rows(const T* w, const T*, int64_t n, Vec (&out)[1]) {
    out[0] = load_upto(w, n);
  }
  MILORA_ALWAYS_INLINE static Vec multiply_add(Vec coef, Vec w, Vec acc) {
    return fma(coef, w, acc);
  }
  MILORA_ALWAYS_INLINE static void to_columns(Vec*) {}
};

#ifdef __AVX512BF16__
// Accumulators hold columns 0-3, 8-11, 16-19, 24-27 and the rest: what unpacking two rows gives.
struct PairStep {
  static constexpr int kDepth = 2;
  static constexpr int kVecs = 2;
  MILORA_ALWAYS_INLINE static void load_rows(const Bf16* w, const Bf16* second, int64_t n,
                                             Vec (&out)[2]) {
    const __mmask32 mask = n >= 2 * kLanes ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
    const __m512i a = _mm512_maskz_loadu_epi16(mask, w);
    const __m512i b =
        second != nullptr ? _mm512_maskz_loadu_epi16(mask, second) : _mm512_setzero_si512();
    out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
    out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
  }
  MILORA_ALWAYS_INLINE static Vec multiply_add(Vec coef, Vec w, Vec acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(coef),
                            (__m512bh)_mm512_castps_si512(w));
  }
  MILORA_ALWAYS_INLINE static void to_columns(Vec* v) {
    const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const Vec first = _mm512_permutex2var_ps(v[0], low, v[1]);
    v[1] = _mm512_permutex2var_ps(v[0], high, v[1]);
    v[0] = first;
  }
};
template <class T>
using LoraStep = std::conditional_t<std::is_same_v<T, Bf16>, PairStep, FmaStep<T>>;
#else
template <class T>
using LoraStep = FmaStep<T>;
#endif

template <class Step>
constexpr int64_t num_steps(int64_t num_k) {
  return (num_k + Step::kDepth - 1) / Step::kDepth;
}

// Coefficients as the steps take them: out[m * out_row + step] from coef[m * row + k * stride_k].
// FmaStep has them already if stride_k is 1.
template <class Step>
inline void pack_coefs(const float* coef, int64_t row, int64_t stride_k, int64_t num_rows,
                       int64_t num_k, float* out, int64_t out_row, int64_t out_step) {
  for (int64_t m = 0; m < num_rows; ++m) {
    for (int64_t k = 0, s = 0; k < num_k; k += Step::kDepth, ++s) {
      const float first = coef[m * row + k * stride_k];
      float* at = out + m * out_row + s * out_step;
      if constexpr (Step::kDepth == 1) {
        *at = first;
      } else {
#ifdef __AVX512BF16__
        const float second = k + 1 < num_k ? coef[m * row + (k + 1) * stride_k] : 0.0f;
        const __m128bh pair = _mm_cvtne2ps_pbh(_mm_setzero_ps(), _mm_set_ps(0, 0, second, first));
        _mm_store_ss(at, _mm_castsi128_ps((__m128i)pair));
#endif
      }
    }
  }
}

// acc[m][v] = sum_k coef[m * coef_row + k * coef_k] * w[k * w_stride + v * kLanes ...]
template <int MR, int NV, class Step, class TW>
MILORA_ALWAYS_INLINE inline void axpy_block(const float* coef, int64_t coef_row, int64_t coef_k,
                                            int64_t num_k, const TW* w, int64_t w_stride,
                                            Vec (&acc)[MR][NV]) {
  Vec sums[MR][NV];  // a copy whose address nobody has: GCC then keeps it in registers
  for (int m = 0; m < MR; ++m) {
    for (int v = 0; v < NV; ++v) sums[m][v] = zero();
  }
  for (int64_t k = 0; k < num_k; ++k) {
    Vec wv[NV];
    for (int v = 0; v < NV; ++v) wv[v] = load(w + k * w_stride + v * kLanes);
    for (int m = 0; m < MR; ++m) {
      const Vec c = set1(coef[m * coef_row + k * coef_k]);
      for (int v = 0; v < NV; ++v) sums[m][v] = Step::multiply_add(c, wv[v], sums[m][v]);
    }
  }
  for (int m = 0; m < MR; ++m) {
    for (int v = 0; v < NV; ++v) acc[m][v] = sums[m][v];
  }
}

// emit(row, column, vector, count) for the kVecs accumulators at one place.
template <class Step, class Emit>
MILORA_ALWAYS_INLINE inline void emit_columns(Vec* acc, int64_t m, int64_t c, int64_t num_cols,
                                              const Emit& emit) {
  Step::to_columns(acc);
  for (int v = 0; v < Step::kVecs; ++v) {
    const int64_t column = c + v * kLanes;
    const int64_t n = num_cols - column < kLanes ? num_cols - column : kLanes;
    if (n > 0) emit(m, column, acc[v], n);
  }
}

// ---- few rows, w from memory ----

// M output rows over num_k rows of w. `coef`: from pack_coefs, one row of steps after another.
template <int M, class Step, class TW, class Emit>
inline void axpy_stream(const float* coef, int64_t coef_row, int64_t num_k, const TW* w,
                        int64_t w_stride, int64_t num_cols, const Emit& emit) {
  constexpr int kTile = Step::kVecs * kLanes;
  constexpr int kSteps = kStreamDepth / Step::kDepth;
  constexpr int64_t kCols = kStreamFloats / M / kTile * kTile;
  constexpr int64_t kItem = sizeof(TW);
  constexpr int kLines = kTile * kItem < kLine ? 1 : static_cast<int>(kTile * kItem / kLine);
  alignas(64) float sums[M * kCols];
  for (int64_t c0 = 0; c0 < num_cols; c0 += kCols) {
    const int64_t cols = num_cols - c0 < kCols ? num_cols - c0 : kCols;
    Prefetcher next(w + kStreamDepth * w_stride + c0, cols * kItem, w_stride * kItem);
    for (int64_t k0 = 0; k0 < num_k; k0 += kStreamDepth) {
      const bool first = k0 == 0, last = k0 + kStreamDepth >= num_k;
      const TW* rows = w + k0 * w_stride + c0;
      const float* coefs = coef + k0 / Step::kDepth;
      const auto tile = [&](auto full, int64_t c, int64_t n) MILORA_ALWAYS_INLINE {
        Vec acc[M][Step::kVecs];
        for (int m = 0; m < M; ++m) {
          for (int v = 0; v < Step::kVecs; ++v) {
            acc[m][v] = first ? zero() : load(sums + m * kCols + c + v * kLanes);
          }
        }
        const int64_t left = num_k - k0;
        const int steps = full ? kSteps : static_cast<int>(num_steps<Step>(left));
        for (int s = 0; s < steps; ++s) {
          const TW* row = rows + s * Step::kDepth * w_stride + c;
          const bool pair = full || s * Step::kDepth + 1 < left;
          Vec wv[Step::kVecs];
          Step::load_rows(row, pair ? row + w_stride : nullptr, n, wv);
          for (int m = 0; m < M; ++m) {
            const Vec coef_at = set1(coefs[m * coef_row + s]);
            for (int v = 0; v < Step::kVecs; ++v) {
              acc[m][v] = Step::multiply_add(coef_at, wv[v], acc[m][v]);
            }
          }
        }
        for (int m = 0; m < M; ++m) {
          if (last) {
            emit_columns<Step>(acc[m], m, c0 + c, num_cols, emit);
          } else {
            for (int v = 0; v < Step::kVecs; ++v) {
              store(sums + m * kCols + c + v * kLanes, acc[m][v]);
            }
          }
        }
      };
      const auto columns = [&](auto full) {
        int64_t c = 0;
        for (; c + kTile <= cols; c += kTile) {
          if (c * kItem % kLine == 0) {
            for (int i = 0; i < kStreamDepth * kLines; ++i) next.step();
          }
          tile(full, c, kTile);
        }
        if (c < cols) tile(full, c, cols - c);
      };
      if (k0 + kStreamDepth <= num_k) {
        columns(std::true_type());
      } else {
        columns(std::false_type());
      }
    }
  }
}

// ---- many rows, w packed ----

// Floats of a packed panel: 128 KB, which stay in L2 while rows of the output go by.
constexpr int64_t kPanelFloats = 32 * 1024;

// Columns that a panel of num_k rows holds, a multiple of kStrip.
template <class Step>
constexpr int64_t panel_cols(int64_t num_k) {
  return kPanelFloats / (num_steps<Step>(num_k) * kStrip) * kStrip;
}

// Copies columns [0, num_cols) of num_k rows into the steps' form: one strip of kStrip columns
// after another, zero-filled at the end.
template <class Step, class TW, class RowOf>
inline void pack_panel(const RowOf& row_of, int64_t num_k, int64_t num_cols, float* panel) {
  constexpr int kTile = Step::kVecs * kLanes;
  const int64_t strip_size = num_steps<Step>(num_k) * kStrip;
  for (int64_t k = 0; k < num_k; k += Step::kDepth) {
    const TW* row = row_of(k);
    const bool pair = Step::kDepth == 2 && k + 1 < num_k;
    const TW* second = pair ? row_of(k + 1) : nullptr;
    float* out = panel + k / Step::kDepth * kStrip;
    for (int64_t c0 = 0; c0 < num_cols; c0 += kStrip, out += strip_size) {
      for (int64_t c = c0; c < c0 + kStrip; c += kTile) {
        Vec v[Step::kVecs];
        for (int i = 0; i < Step::kVecs; ++i) v[i] = zero();
        if (c < num_cols) Step::load_rows(row + c, pair ? second + c : nullptr, num_cols - c, v);
        for (int i = 0; i < Step::kVecs; ++i) store(out + c - c0 + i * kLanes, v[i]);
      }
    }
  }
}

// num_rows output rows over a packed panel; emit(row, column, vector, count).
template <class Step, class Emit>
inline void axpy_panel(const float* coef, int64_t coef_row, int64_t coef_k, int64_t num_k,
                       const float* panel, int64_t num_rows, int64_t num_cols, const Emit& emit) {
  constexpr int kBlock = kAxpyVecs * kLanes;
  const int64_t steps = num_steps<Step>(num_k);
  const auto run = [&](auto rows, int64_t m) MILORA_ALWAYS_INLINE {
    constexpr int kRows = decltype(rows)::value;
    for (int64_t c = 0; c < num_cols; c += kBlock) {
      Vec acc[kRows][kAxpyVecs];
      const float* strip = panel + c / kStrip * steps * kStrip + c % kStrip;
      axpy_block<kRows, kAxpyVecs, Step>(coef + m * coef_row, coef_row, coef_k, steps, strip,
                                         kStrip, acc);
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kAxpyVecs; v += Step::kVecs) {
          emit_columns<Step>(acc[i] + v, m + i, c + v * kLanes, num_cols, emit);
        }
      }
    }
  };
  int64_t m = 0;
  for (; m + kAxpyRows <= num_rows; m += kAxpyRows) {
    run(std::integral_constant<int, kAxpyRows>(), m);
  }
  if (m + 4 <= num_rows) {
    run(std::integral_constant<int, 4>(), m);
    m += 4;
  }
  for (; m < num_rows; ++m) run(std::integral_constant<int, 1>(), m);
}

}  // namespace
}  // namespace milora::MILORA_ISA
