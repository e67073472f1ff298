// A float32 vector as wide as the instruction set has, with exact loads from and one-rounding
// stores to float32, bfloat16 and float16.
//
// Multiply-add is explicit (the files are compiled with -ffp-contract=off), so an element's result
// does not depend on how the compiler unrolled the loop around it: the promise of batch invariance
// rests on that. Tails never touch memory past the last element: pool rows may be followed by NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#ifdef MILORA_X86
#include <immintrin.h>
#endif

// Accumulators stay in registers only if every function and lambda between them and their loop is
// inlined, which GCC does not decide by itself for the larger ones.
#define MILORA_ALWAYS_INLINE __attribute__((always_inline))

namespace milora::MILORA_ISA {
namespace {

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int kLanes = 16;
constexpr int kNumRegisters = 32;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float value) { return _mm512_set1_ps(value); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }
// a where x <= limit, b elsewhere and where x is NaN.
inline Vec select_le(Vec x, Vec limit, Vec a, Vec b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, limit, _CMP_LE_OQ), b, a);
}
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Lanes 8 apart, then 4, 2, 1: the tree that sum_block follows too.
inline float sum(Vec a) {
  const __m512 halves = _mm512_add_ps(a, _mm512_shuffle_f32x4(a, a, 0xee));
  const __m128 s = _mm_add_ps(_mm512_castps512_ps128(halves), _mm512_extractf32x4_ps(halves, 1));
  const __m128 t = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
// Sums of 16 vectors at a third of the instructions: vector m + 4 n goes to lane 4 m + n.
MILORA_ALWAYS_INLINE inline Vec sum_block(const Vec (&a)[16]) {
  Vec b[8], c[4], d[2];
  for (int i = 0; i < 8; ++i) {
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x44),
                         _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xee));
  }
  for (int i = 0; i < 4; ++i) {
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  }
  for (int i = 0; i < 2; ++i) {
    d[i] = _mm512_add_ps(_mm512_shuffle_ps(c[2 * i], c[2 * i + 1], 0x44),
                         _mm512_shuffle_ps(c[2 * i], c[2 * i + 1], 0xee));
  }
  return _mm512_add_ps(_mm512_shuffle_ps(d[0], d[1], 0x88), _mm512_shuffle_ps(d[0], d[1], 0xdd));
}
// The larger of each pair, NaN if either is (as torch.amax).
inline Vec max_or_nan(Vec a, Vec b) {
  const __mmask16 take =
      _mm512_cmp_ps_mask(b, a, _CMP_GT_OQ) | _mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q);
  return _mm512_mask_blend_ps(take, a, b);
}

inline Vec widen(__m256i half, const Bf16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline Vec widen(__m256i half, const F16*) { return _mm512_cvtph_ps(half); }
inline __m256i narrow(Vec a, const F16*) {
  return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m256i narrow(Vec a, const Bf16*) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  // Rounding up the payload of a NaN could carry into the sign: NaN is written as itself, quiet.
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
inline void store_first(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }

template <class T>
inline Vec load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p);
}
template <class T>
inline Vec load_first(const T* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first(n), p), p);
}
template <class T>
inline void store(T* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, p));
}
template <class T>
inline void store_first(T* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(a, p));
}

#else

#if defined(__AVX2__)

using Vec = __m256;
constexpr int kLanes = 8;
constexpr int kNumRegisters = 16;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float value) { return _mm256_set1_ps(value); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Vec select_le(Vec x, Vec limit, Vec a, Vec b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, limit, _CMP_LE_OQ));
}
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
// Sums of 8 vectors in the same order as sum: vector m + 2 n goes to lane 4 m + n.
MILORA_ALWAYS_INLINE inline Vec sum_block(const Vec (&a)[8]) {
  Vec b[4], c[2];
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm256_add_ps(_mm256_permute2f128_ps(a[2 * i], a[2 * i + 1], 0x20),
                         _mm256_permute2f128_ps(a[2 * i], a[2 * i + 1], 0x31));
  }
  for (int i = 0; i < 2; ++i) {
    c[i] = _mm256_add_ps(_mm256_shuffle_ps(b[2 * i], b[2 * i + 1], 0x44),
                         _mm256_shuffle_ps(b[2 * i], b[2 * i + 1], 0xee));
  }
  return _mm256_add_ps(_mm256_shuffle_ps(c[0], c[1], 0x88), _mm256_shuffle_ps(c[0], c[1], 0xdd));
}
inline Vec max_or_nan(Vec a, Vec b) {
  const Vec take = _mm256_or_ps(_mm256_cmp_ps(b, a, _CMP_GT_OQ), _mm256_cmp_ps(b, b, _CMP_UNORD_Q));
  return _mm256_blendv_ps(a, b, take);
}

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline Vec load(const Bf16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Vec load(const F16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(F16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(Bf16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}

#else  // Any CPU: GCC and Clang vectors of 16 bytes, which are SSE2 on x86-64 and NEON on Arm.

typedef float Vec __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kNumRegisters = 16;

inline Vec zero() { return Vec{0, 0, 0, 0}; }
inline Vec set1(float value) { return Vec{value, value, value, value}; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec abs(Vec a) { return Vec{fabsf(a[0]), fabsf(a[1]), fabsf(a[2]), fabsf(a[3])}; }
inline Vec select_le(Vec x, Vec limit, Vec a, Vec b) { return x <= limit ? a : b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // two roundings, the same everywhere
inline float sum(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline Vec max_or_nan(Vec a, Vec b) { return (b > a) | (b != b) ? b : a; }

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(Bf16 a) { return bits_to_float(static_cast<uint32_t>(a.bits) << 16); }
inline float widen(F16 a) {
  const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000) << 16;
  const uint32_t magnitude = a.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Shifted into place the exponent is short by 112 whatever it was: one exact product mends it,
  // for subnormals too.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}
inline Bf16 narrow(float a, const Bf16*) {
  const uint32_t bits = float_to_bits(a);
  if (a != a) return {static_cast<uint16_t>((bits | 0x400000) >> 16)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline F16 narrow(float a, const F16*) {
  const uint32_t bits = float_to_bits(a);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: let a float addition round at bit 2^-24
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

inline Vec load(const float* p) {
  Vec a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
inline void store(float* p, Vec a) { std::memcpy(p, &a, sizeof a); }
template <class T>
inline Vec load(const T* p) {
  return Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
template <class T>
inline void store(T* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = narrow(a[i], p);
}

#endif

// Without masked loads a tail goes through a zeroed buffer on the stack.
template <class T>
inline Vec load_first(const T* p, int n) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
inline void store_first(T* p, Vec a, int n) {
  T buffer[kLanes];
  store(buffer, a);
  std::memcpy(p, buffer, n * sizeof(T));
}

#endif

// Into the second-level cache: from there a kernel may read rows in whatever order it likes, while
// memory sees one ascending run, which it serves twice as fast as eight interleaved ones.
inline void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

// n in [1, kLanes].
template <class T>
inline Vec load_upto(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, static_cast<int>(n));
}
template <class T>
inline void store_upto(T* p, Vec a, int64_t n) {
  if (n >= kLanes) {
    store(p, a);
  } else {
    store_first(p, a, static_cast<int>(n));
  }
}

}  // namespace
}  // namespace milora::MILORA_ISA
