// Layout of the training op's workspace, and what its kernels share. No CUDA here.
#pragma once

#include "kernels/grouped_lora/sm80/config.h"

namespace milora::train {

using prefill::ceil_div;
using prefill::kRowBytes;

// The table of adapters travels as a kernel argument, this many a launch, because a copy from host
// memory would neither be asynchronous nor capturable.
constexpr int kTableSize = 64;

// A pool made for one call: each adapter's A and B^T, rows on 16 bytes, and the tables that the
// prefill kernels read. `reverse` has A and B^T exchanged: dy takes the way of x and dx that of y.
struct PackedPool {
  uint8_t* bytes;
  int64_t num_bytes;
  int64_t* offsets;  // [num_adapters, 1, kNumParts]
  int64_t* reverse;  // [num_adapters, 1, kNumParts]
  int32_t* ranks;    // [num_adapters, 1]
  float* scales;     // [num_adapters, 1]
};

inline int64_t matrix_bytes(int64_t rank, int64_t d, Dtype dtype) {
  return rank * pool_row_stride(d, dtype) * element_size(dtype);
}

inline PackedPool lay_out_pool(const LoraWeights* adapters, int64_t num_adapters, int64_t d_in,
                               int64_t d_out, Dtype dtype, Cutter* cutter) {
  PackedPool pool{};
  for (int64_t i = 0; i < num_adapters; ++i) {
    const int64_t rank = adapters[i].rank;
    pool.num_bytes += matrix_bytes(rank, d_in, dtype) + matrix_bytes(rank, d_out, dtype);
  }
  pool.bytes = cutter->take<uint8_t>(pool.num_bytes);
  pool.offsets = cutter->take<int64_t>(num_adapters * kNumParts);
  pool.reverse = cutter->take<int64_t>(num_adapters * kNumParts);
  pool.ranks = cutter->take<int32_t>(num_adapters);
  pool.scales = cutter->take<float>(num_adapters);
  return pool;
}

// Adapters [first, first + count), and where their matrices go in the pool.
struct PackTable {
  LoraWeights weights[kTableSize];
  int64_t a_at[kTableSize], bt_at[kTableSize];
  int32_t first, count;
};
inline PackTable make_pack_table(const LoraWeights* adapters, int64_t num_adapters, int64_t first,
                                 int64_t d_in, int64_t d_out, Dtype dtype, int64_t* pool_at) {
  PackTable table{};
  table.first = static_cast<int32_t>(first);
  const int64_t left = num_adapters - first;
  table.count = static_cast<int32_t>(left < kTableSize ? left : kTableSize);
  for (int i = 0; i < table.count; ++i) {
    table.weights[i] = adapters[first + i];
    table.a_at[i] = *pool_at;
    *pool_at += matrix_bytes(table.weights[i].rank, d_in, dtype);
    table.bt_at[i] = *pool_at;
    *pool_at += matrix_bytes(table.weights[i].rank, d_out, dtype);
  }
  return table;
}

struct GradTable {
  LoraGrads grads[kTableSize];
  int32_t ranks[kTableSize];
  int32_t first, count;
};
inline GradTable make_grad_table(const LoraWeights* adapters, const LoraGrads* grads,
                                 int64_t num_adapters, int64_t first) {
  GradTable table{};
  table.first = static_cast<int32_t>(first);
  const int64_t left = num_adapters - first;
  table.count = static_cast<int32_t>(left < kTableSize ? left : kTableSize);
  for (int i = 0; i < table.count; ++i) {
    table.grads[i] = grads[first + i];
    table.ranks[i] = adapters[first + i].rank;
  }
  return table;
}

// What the sums over tokens read, one row a token of an active tile.
struct TokenCoefs {
  void* hidden;       // [num_tokens, partial_width] dtype of x: g s A x
  void* grad_hidden;  // [num_tokens, partial_width] dtype of x: g s B^T dy
  float* row_dots;    // [num_tokens] s (B^T dy) . (A x)
};
inline TokenCoefs lay_out_coefs(int64_t num_tokens, int64_t width, Dtype dtype, Cutter* cutter) {
  const int64_t bytes = num_tokens * width * element_size(dtype);
  TokenCoefs coefs;
  coefs.hidden = cutter->take<uint8_t>(bytes);
  coefs.grad_hidden = cutter->take<uint8_t>(bytes);
  coefs.row_dots = cutter->take<float>(num_tokens);
  return coefs;
}

// ---- sums over tokens ----
constexpr int kReduceStages = 3;  // 48 KB: four blocks a multiprocessor
constexpr int kReduceTileBytes = prefill::kTileRows * kRowBytes;
constexpr int kReduceBytes = kReduceStages * 2 * kReduceTileBytes;
static_assert(kReduceBytes <= 48 * 1024, "what a kernel may have without asking");

}  // namespace milora::train
