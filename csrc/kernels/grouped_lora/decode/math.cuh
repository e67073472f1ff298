// The arithmetic of the decode kernels, the same for every source of weights (shared memory on
// sm90, global memory elsewhere), so that all architectures give the same bits.
//
// A thread owns one vector of the tile's columns (8 warps x 8 lanes = 64 vectors) and every fourth
// of its 16 ranks: a warp reads 4 rows of 128 bytes at once. Each product of a row is added in the
// same order whether it stands alone or with 7 others (R), so batches cannot change it.
//
// FMA, not tensor cores: a weight element costs 2 bytes of memory and R + 1 operations. An H200
// has 12 such slots per element in the time it reads one, so memory decides up to R = 8; ranks
// need no padding to 16, float32 needs no other code, and S stays float32 between the two products.
#pragma once

#include "kernels/grouped_lora/decode/items.cuh"

namespace milora {

constexpr int kLaneVectors = 8;                        // neighbouring vectors of a warp
constexpr int kLaneRanks = kWarp / kLaneVectors;       // ranks that a warp reads at once
constexpr int kThreadRanks = kTileRanks / kLaneRanks;  // ranks of a thread in a tile
static_assert(kDecodeWarps * kLaneVectors == kTileVectors, "a thread for each vector of a tile");
static_assert(kLaneRanks == 4 && kThreadRanks == 4, "the reductions below are written for these");

// 8 rows of x, or 4 ranks for 8 rows of y, are more than the registers hold.
constexpr int kRowsAtOnce = 4;
template <int R>
constexpr int kSteps = R == 8 ? 1 : kThreadRanks;

__device__ __forceinline__ int own_vector() {
  return threadIdx.x / kWarp * kLaneVectors + threadIdx.x % kLaneVectors;
}
__device__ __forceinline__ int own_rank() { return threadIdx.x % kWarp / kLaneVectors; }

// How many elements of the thread's vector, which starts at `column`, lie in the tile and in d_in.
template <class T>
__device__ __forceinline__ int valid_elements(const GroupedLoraPoolParams& p, const LoraTile& tile,
                                              int64_t column) {
  const int64_t left = p.d_in - column;
  if (own_vector() >= tile.num_vectors || left <= 0) return 0;
  return left < kVecOf<T> ? static_cast<int>(left) : kVecOf<T>;
}

// x[r][e]: element e of the thread's vector of the item's row from + r; 0 where there is none.
// `valid` is the number of the vector's elements inside of d_in. Whole vectors of all rows are
// asked for before the first is used.
template <class T, int R>
__device__ __forceinline__ void load_rows(const GroupedLoraPoolParams& p, const LoraItem& item,
                                          int from, int64_t column, int valid,
                                          float (&x)[R][kVecOf<T>]) {
  constexpr int kVec = kVecOf<T>;
  const T* first = static_cast<const T*>(p.x) + (item.token + from) * p.x_stride + column;
  const bool wide = valid == kVec && reinterpret_cast<uintptr_t>(first) % kVectorBytes == 0 &&
                    p.x_stride % kVec == 0;
  if (wide) {
    uint4 vectors[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      vectors[r] = make_uint4(0, 0, 0, 0);
      if (from + r < item.rows) {
        vectors[r] = *reinterpret_cast<const uint4*>(first + r * p.x_stride);
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) unpack(vectors[r], x[r], static_cast<const T*>(nullptr));
    return;
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const T* row = first + r * p.x_stride;
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      x[r][e] = from + r < item.rows && e < valid ? to_float(row[e]) : 0.0f;
    }
  }
}

// Adds this warp's part of A x to sums[rank][from + r]; the first tile of these ranks sets it. A
// vector's elements from `valid` on are padding that may hold anything. vector_at(rank) gives the
// 16 bytes.
template <class T, int R, class VectorAt>
__device__ __forceinline__ void shrink_tile(const float (&x)[R][kVecOf<T>], const LoraTile& tile,
                                            int valid, int from, const VectorAt& vector_at,
                                            float (*sums)[kGroupRows]) {
  constexpr int kVec = kVecOf<T>;
  constexpr int kValues = R == 1 ? 4 : 8;  // reduced together
  constexpr int kRanks = kValues / R;
#pragma unroll
  for (int first = 0; first < kThreadRanks; first += kRanks) {
    uint4 weights[kRanks];
#pragma unroll
    for (int i = 0; i < kRanks; ++i) {
      const int rank = own_rank() + kLaneRanks * (first + i);
      weights[i] = make_uint4(0, 0, 0, 0);
      if (rank < tile.num_ranks && valid > 0) weights[i] = vector_at(rank);
    }
    float values[kValues] = {};
#pragma unroll
    for (int i = 0; i < kRanks; ++i) {
      float a[kVec];
      unpack(weights[i], a, static_cast<const T*>(nullptr));
      if (valid < kVec) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) a[e] = e < valid ? a[e] : 0.0f;
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) values[i * R + r] = fmaf(a[e], x[r][e], values[i * R + r]);
      }
    }
    reduce_lanes<kLaneVectors / 2, 1>(values);
    // Lane l of 8 holds value l of 8, or lanes 2 l and 2 l + 1 hold value l of 4.
    const int held = threadIdx.x % kLaneVectors * kValues / kLaneVectors;
    float* sum = &sums[own_rank() + kLaneRanks * (first + held / R)][from + held % R];
    if (kValues == kLaneVectors || threadIdx.x % 2 == 0) {
      *sum = tile.first_vector == 0 ? values[0] : *sum + values[0];
    }
  }
}

// sums[warp][rank][row] of a tile's ranks -> block_sums[rank][row], in the order of the warps.
template <int R>
__device__ __forceinline__ void add_warps(const float (*sums)[kTileRanks][kGroupRows],
                                          const LoraTile& tile, float (*block_sums)[kGroupRows]) {
  static_assert(kTileRanks * R <= kDecodeThreads, "one value a thread");
  const int rank = threadIdx.x / R, row = threadIdx.x % R;
  if (rank >= tile.num_ranks) return;
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kDecodeWarps; ++w) sum += sums[w][rank][row];
  block_sums[tile.first_rank + rank][row] = sum;
}

// The gate of one rank of the item's row: what A x is multiplied with, once it is whole.
__device__ __forceinline__ float rank_gate(const GroupedLoraPoolParams& p, const LoraItem& item,
                                           int rank, int row) {
  if (p.rank_gates == nullptr || row >= item.rows) return 1.0f;
  return rank_gates_at(p, item.token + row, item.slice)[rank];
}

// hidden[k][r] = sum over j of C[k][j] gathered[j][r]: a thread for each (k, r), j ascending. All
// threads must call it, after a barrier; another must follow. Each block of an item needs all of
// hidden and makes it itself: rank / d of the arithmetic of a share, where an exchange would cost
// the cluster one more barrier. C comes from L2 for all blocks but the first.
template <class T, int R>
__device__ __forceinline__ void multiply_core(const GroupedLoraPoolParams& p, const LoraItem& item,
                                              const float (*gathered)[kGroupRows],
                                              float (*hidden)[kGroupRows]) {
  constexpr int kVec = kVecOf<T>;
  const int32_t row_vectors = vectors_of(item.rank, kVec);
  const auto* core = reinterpret_cast<const uint4*>(p.pool + item.core);
  for (int i = threadIdx.x; i < item.rank * R; i += kDecodeThreads) {
    const int rank = i / R, row = i % R;
    float sum = 0;
    for (int32_t vector = 0; vector < row_vectors; ++vector) {
      float c[kVec];
      unpack(__ldg(core + rank * row_vectors + vector), c, static_cast<const T*>(nullptr));
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const int j = vector * kVec + e;
        if (j < item.rank) sum = fmaf(c[e], gathered[j][row], sum);  // padding may hold anything
      }
    }
    hidden[rank][row] = sum;
  }
}

// y[r][e] += hidden[rank][r] Bt[rank][e] for the thread's ranks of the tile.
template <class T, int R, class VectorAt>
__device__ __forceinline__ void expand_tile(float (&y)[R][kVecOf<T>], const LoraTile& tile,
                                            bool valid, const VectorAt& vector_at,
                                            const float (*hidden)[kGroupRows]) {
  constexpr int kVec = kVecOf<T>;
#pragma unroll kSteps < R>
  for (int i = 0; i < kThreadRanks; ++i) {
    const int rank = own_rank() + kLaneRanks * i;
    if (rank >= tile.num_ranks || !valid) continue;
    float b[kVec];
    unpack(vector_at(rank), b, static_cast<const T*>(nullptr));
    const float* h = hidden[tile.first_rank + rank];
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) y[r][e] = fmaf(h[r], b[e], y[r][e]);
    }
  }
}

// After the expand a lane owns kVec / 4 neighbouring columns of its vector: what y holds there,
// read before the weights are waited for. 8 rows have no registers for that and read it at the end.
template <class T, int R>
struct OldOutputs {
  static constexpr bool kEarly = R < 8;
  static constexpr int kRows = kEarly ? R : 4;  // at a time
  uint32_t bits[kRows] = {};
};

// The first of the lane's columns. reduce_lanes<16, 8> leaves the upper half of what it halves with
// the lane whose bit is set.
template <class T>
__device__ __forceinline__ int64_t own_column(int64_t vector) {
  const int place = (threadIdx.x & 16 ? 2 : 0) + (threadIdx.x & 8 ? 1 : 0);
  return vector * kVecOf<T> + place * (kVecOf<T> / kLaneRanks);
}

// The lane's columns of the item's rows of y.
template <class T>
struct OwnOutputs {
  static constexpr int kColumns = kVecOf<T> / kLaneRanks;
  static_assert(kColumns * sizeof(T) == 4, "a word");
  T* first;  // of the item's first row
  int64_t stride;
  int count;   // columns inside of d_out
  bool words;  // they are one aligned word in every row

  __device__ __forceinline__ OwnOutputs(const GroupedLoraPoolParams& p, const LoraItem& item,
                                        int64_t column) {
    stride = p.y_stride[item.slice];
    first = static_cast<T*>(p.y[item.slice]) + item.token * stride + column;
    const int64_t left = p.d_out[item.slice] - column;
    count = static_cast<int>(left < 0 ? 0 : (left < kColumns ? left : kColumns));
    words =
        count == kColumns &&
        (reinterpret_cast<uintptr_t>(first) | static_cast<uintptr_t>(stride * sizeof(T))) % 4 == 0;
  }

  // Rows [from, from + N) of `rows`, a word each; all are asked for before the first is used.
  template <int N>
  __device__ __forceinline__ void load(int from, int rows, uint32_t (&bits)[N]) const {
#pragma unroll
    for (int r = 0; r < N; ++r) bits[r] = 0;
    if (words) {
#pragma unroll
      for (int r = 0; r < N; ++r) {
        const T* row = first + (from + r) * stride;
        if (from + r < rows) bits[r] = *reinterpret_cast<const uint32_t*>(row);
      }
      return;
    }
#pragma unroll
    for (int r = 0; r < N; ++r) {
      T values[kColumns] = {};
#pragma unroll
      for (int e = 0; e < kColumns; ++e) {
        if (from + r < rows && e < count) values[e] = first[(from + r) * stride + e];
      }
      memcpy(&bits[r], values, 4);
    }
  }

  __device__ __forceinline__ void store(int r, const T (&values)[kColumns]) const {
    T* row = first + r * stride;
    if (words) {
      uint32_t bits;
      memcpy(&bits, values, 4);
      *reinterpret_cast<uint32_t*>(row) = bits;
      return;
    }
#pragma unroll
    for (int e = 0; e < kColumns; ++e) {
      if (e < count) row[e] = values[e];
    }
  }
};

template <class T, int R>
__device__ __forceinline__ OldOutputs<T, R> load_outputs(const GroupedLoraPoolParams& p,
                                                         const LoraItem& item, int64_t vector) {
  OldOutputs<T, R> old;
  if constexpr (OldOutputs<T, R>::kEarly) {
    OwnOutputs<T>(p, item, own_column<T>(vector)).load(0, item.rows, old.bits);
  }
  return old;
}

// y = y + gate (scale B A x + u y + v), one rounding at the end. All threads must call it.
template <class T, int R>
__device__ __forceinline__ void store_outputs(const GroupedLoraPoolParams& p, const LoraItem& item,
                                              int64_t vector, bool valid,
                                              float (&sums)[R][kVecOf<T>], OldOutputs<T, R>& old,
                                              const float* gates) {
  constexpr int kColumns = OwnOutputs<T>::kColumns, kAtOnce = OldOutputs<T, R>::kRows;
  const float* u = item.u < 0 ? nullptr : reinterpret_cast<const float*>(p.pool + item.u);
  const float* v = item.v < 0 ? nullptr : reinterpret_cast<const float*>(p.pool + item.v);
#pragma unroll
  for (int r = 0; r < R; ++r) reduce_lanes<kWarp / 2, kLaneVectors>(sums[r]);
  if (!valid) return;
  const int64_t first = own_column<T>(vector);
  const OwnOutputs<T> own(p, item, first);
#pragma unroll
  for (int from = 0; from < R; from += kAtOnce) {
    if constexpr (!OldOutputs<T, R>::kEarly) own.load(from, item.rows, old.bits);
#pragma unroll
    for (int r = from; r < from + kAtOnce; ++r) {
      if (r >= item.rows) break;
      T y[kColumns];
      memcpy(y, &old.bits[r - from], 4);
#pragma unroll
      for (int e = 0; e < kColumns; ++e) {
        const float base = to_float(y[e]);
        float delta = item.scale * sums[r][e];
        if (u != nullptr && e < own.count) delta = fmaf(u[first + e], base, delta);
        if (v != nullptr && e < own.count) delta += v[first + e];
        y[e] = from_float<T>(fmaf(gates[r], delta, base));
      }
      own.store(r, y);
    }
  }
}

// The block's share `out` of the item's columns: multiply_tile(y, tile, place, valid) adds one tile
// of Bt to the sums y of the thread's vector number `place` of a row. All threads must call it.
template <class T, int R, class MultiplyTile>
__device__ __forceinline__ void expand_share(const GroupedLoraPoolParams& p, const LoraItem& item,
                                             const LoraShare& out, const float* gates,
                                             const MultiplyTile& multiply_tile) {
  const int32_t tiles = num_tiles(item.rank, out.count);
  for (int32_t i = 0; i < tiles;) {
    LoraTile tile = expand_tile_at(item.rank, out.count, i);
    const bool valid = own_vector() < tile.num_vectors;
    const int64_t place = int64_t{out.begin} + tile.first_vector + own_vector();
    OldOutputs<T, R> old = load_outputs<T, R>(p, item, place);
    float y[R][kVecOf<T>] = {};
    for (bool last = false; !last; ++i) {
      tile = expand_tile_at(item.rank, out.count, i);
      multiply_tile(y, tile, place, valid);
      last = tile.last;
    }
    store_outputs<T, R>(p, item, place, valid, y, old, gates);
  }
}

// gates[r] of the item's rows, for after the next barrier.
__device__ __forceinline__ void load_gates(const GroupedLoraPoolParams& p, const LoraItem& item,
                                           float* gates) {
  const int row = threadIdx.x;
  if (row >= item.rows) return;
  const int64_t route = p.route_of[item.token + row];
  gates[row] = p.gates[route * p.num_experts + p.expert[item.slice]];
}

// Calls f with the number of rows that the code is compiled for, as an integral constant.
template <int R>
struct Rows {
  static constexpr int value = R;
};
template <class F>
__device__ __forceinline__ void dispatch_rows(int32_t rows, const F& f) {
  if (rows == 1) {
    f(Rows<1>{});
  } else if (rows == 2) {
    f(Rows<2>{});
  } else if (rows <= 4) {
    f(Rows<4>{});
  } else {
    f(Rows<8>{});
  }
}

}  // namespace milora
