// Dot products of rows:  out[m][n] = sum_d x_m[d] w_n[d]      lanes along d: both rows contiguous
//
// Each output has one accumulator of its own and one order of summation, whatever the block shape,
// so MR and NR are free to follow the number of rows: results do not change.
#pragma once

#include <type_traits>

#include "kernels/cpu/simd.h"

namespace milora::MILORA_ISA {
namespace {

// Accumulators, w vectors and one x vector must fit the registers: 4 x 4 + 4 + 1 of 32, else
// 2 x 4 + 4 + 1 of 16.
constexpr int kDotRows = kNumRegisters == 32 ? 4 : 2;
constexpr int kDotCols = 4;
constexpr int64_t kLine = 64;  // bytes of a cache line

// Walks rows of `row_bytes` that are `stride_bytes` apart, a cache line a step.
struct Prefetcher {
  const char* at;
  int64_t row_bytes, skip, left;

  Prefetcher(const void* start, int64_t row_bytes, int64_t stride_bytes)
      : at(static_cast<const char*>(start)),
        row_bytes(row_bytes),
        skip(stride_bytes - (row_bytes + kLine - 1) / kLine * kLine),
        left(row_bytes) {}
  void step() {
    prefetch(at);
    at += kLine;
    left -= kLine;
    if (left <= 0) {
      at += skip;
      left = row_bytes;
    }
  }
};

#ifdef __AVX512BF16__
// Two products and two float32 additions an instruction, without widening either side.
template <int MR, int NR, class Ahead>
MILORA_ALWAYS_INLINE inline void dot_vectors(const Bf16* const (&x)[MR], const Bf16* const (&w)[NR],
                                             int64_t d, Vec (&acc)[MR][NR], const Ahead& ahead) {
  const auto step = [&](int64_t i, __mmask32 mask) MILORA_ALWAYS_INLINE {
    __m512bh wv[NR];
    for (int n = 0; n < NR; ++n) wv[n] = (__m512bh)_mm512_maskz_loadu_epi16(mask, w[n] + i);
    for (int m = 0; m < MR; ++m) {
      const auto xv = (__m512bh)_mm512_maskz_loadu_epi16(mask, x[m] + i);
      for (int n = 0; n < NR; ++n) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], xv, wv[n]);
    }
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= d; i += 2 * kLanes) {
    ahead(NR);
    step(i, ~__mmask32{0});
  }
  if (i < d) step(i, (__mmask32{1} << (d - i)) - 1);
}
#endif

template <int MR, int NR, class TX, class TW, class Ahead>
MILORA_ALWAYS_INLINE inline void dot_vectors(const TX* const (&x)[MR], const TW* const (&w)[NR],
                                             int64_t d, Vec (&acc)[MR][NR], const Ahead& ahead) {
  constexpr int64_t kUnroll = kLine / (kLanes * sizeof(TW));  // vectors in a line of w
  int64_t i = 0;
  const auto step = [&]() MILORA_ALWAYS_INLINE {
    Vec wv[NR];
    for (int n = 0; n < NR; ++n) wv[n] = load(w[n] + i);
    for (int m = 0; m < MR; ++m) {
      const Vec xv = load(x[m] + i);
      for (int n = 0; n < NR; ++n) acc[m][n] = fma(xv, wv[n], acc[m][n]);
    }
    i += kLanes;
  };
  while (i + kUnroll * kLanes <= d) {
    ahead(NR);
    for (int64_t u = 0; u < kUnroll; ++u) step();
  }
  while (i + kLanes <= d) step();
  if (i < d) {
    const int rest = static_cast<int>(d - i);
    for (int n = 0; n < NR; ++n) {
      const Vec wv = load_first(w[n] + i, rest);
      for (int m = 0; m < MR; ++m) acc[m][n] = fma(load_first(x[m] + i, rest), wv, acc[m][n]);
    }
  }
}

// `ahead(lines)` is called once per line of each of the NR rows of w.
template <int MR, int NR, class TX, class TW, class Ahead>
MILORA_ALWAYS_INLINE inline void dot_block(const TX* const (&x)[MR], const TW* const (&w)[NR],
                                           int64_t d, float (&out)[MR][NR], const Ahead& ahead) {
  Vec acc[MR][NR];
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NR; ++n) acc[m][n] = zero();
  }
  dot_vectors<MR, NR>(x, w, d, acc, ahead);
#if defined(__AVX512F__) || defined(__AVX2__)
  if constexpr (MR == kDotRows && NR == kDotCols) {
    Vec flat[MR * NR];
    for (int m = 0; m < MR; ++m) {
      for (int n = 0; n < NR; ++n) flat[m + MR * n] = acc[m][n];
    }
    store(&out[0][0], sum_block(flat));
    return;
  }
#endif
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NR; ++n) out[m][n] = sum(acc[m][n]);
  }
}

// out[m * out_stride + n] = x_rows[m] . w_n for MR rows of x and num_w rows of w. Rows of w beyond
// the end repeat the last one and are dropped. kStream: w comes from memory, so the block after
// this one is prefetched, in ascending order.
template <int MR, int NR, bool kStream, class TX, class TW>
inline void dot_panel(const TX* const* x_rows, const TW* w, int64_t w_stride, int64_t num_w,
                      int64_t d, float* out, int64_t out_stride) {
  const TX* x[MR];
  for (int m = 0; m < MR; ++m) x[m] = x_rows[m];
  constexpr int64_t kItem = sizeof(TW);
  Prefetcher next(w + NR * w_stride, d * kItem, w_stride * kItem);
  const auto ahead = [&](int lines) MILORA_ALWAYS_INLINE {
    if constexpr (kStream) {
      for (int i = 0; i < lines; ++i) next.step();
    }
  };
  for (int64_t n0 = 0; n0 < num_w; n0 += NR) {
    const TW* rows[NR];
    for (int n = 0; n < NR; ++n) {
      const int64_t row = n0 + n < num_w ? n0 + n : num_w - 1;
      rows[n] = w + row * w_stride;
    }
    alignas(64) float block[MR][NR];
    dot_block<MR, NR>(x, rows, d, block, ahead);
    const int count = num_w - n0 < NR ? static_cast<int>(num_w - n0) : NR;
    for (int m = 0; m < MR; ++m) {
      for (int n = 0; n < count; ++n) out[m * out_stride + n0 + n] = block[m][n];
    }
  }
}

// All products of num_rows rows of x and num_w rows of w; w is read from memory once.
template <class TX, class TW>
inline void dot_rows(const TX* const* x_rows, int64_t num_rows, const TW* w, int64_t w_stride,
                     int64_t num_w, int64_t d, float* out, int64_t out_stride) {
  int64_t m = 0;
  if (num_rows >= kDotRows) {
    dot_panel<kDotRows, kDotCols, true>(x_rows, w, w_stride, num_w, d, out, out_stride);
    m = kDotRows;
  }
  for (; m + kDotRows <= num_rows; m += kDotRows) {
    dot_panel<kDotRows, kDotCols, false>(x_rows + m, w, w_stride, num_w, d, out + m * out_stride,
                                         out_stride);
  }
  for (; m < num_rows; ++m) {
    dot_panel<1, 2 * kDotCols, true>(x_rows + m, w, w_stride, num_w, d, out + m * out_stride,
                                     out_stride);
  }
}

}  // namespace
}  // namespace milora::MILORA_ISA
