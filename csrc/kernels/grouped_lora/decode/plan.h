// Who does what in the decode kernels: pure arithmetic, the same on a CPU, where it is tested.
//
// A vector is 16 bytes: 8 elements of a 16-bit type, 4 of float32. The vectors of d_in, and those
// of d_out, are cut into kLoraSplits shares, one block each. A block walks its share of A and then
// its share of Bt in tiles of kTileRanks rows by kTileVectors vectors. All of it follows from d_in,
// d_out and the rank alone, so a row's bits cannot depend on the batch.
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "kernels/grouped_lora/params.h"

// Which form a compute capability has, cluster.cuh's or split.cuh's: 9.x to 11.x have clusters and
// 227 KB of shared memory for a block; 12.x has clusters and 99 KB, too few for the 107 of that
// form.
#define MILORA_DECODE_BY_CLUSTERS(major) ((major) >= 9 && (major) < 12)

namespace milora {

constexpr int kLoraSplits = 8;    // the largest cluster that every part with clusters can place
constexpr int kGroupRows = 8;     // rows that share the weights once these are on the chip
constexpr int kTileRanks = 16;    // with the next: 16 KB, and 4 vectors in flight per thread
constexpr int kTileVectors = 64;  // 8 warps times 8 lanes

MILORA_HOST_DEVICE int32_t vectors_of(int64_t d, int64_t per_vector) {
  return static_cast<int32_t>((d + per_vector - 1) / per_vector);
}

struct LoraShare {
  int32_t begin, count;  // vectors of a row
};

MILORA_HOST_DEVICE LoraShare share_of(int32_t vectors, int32_t part) {
  const int32_t each = (vectors + kLoraSplits - 1) / kLoraSplits;
  const int32_t begin = part * each < vectors ? part * each : vectors;
  return {begin, each < vectors - begin ? each : vectors - begin};
}

struct LoraTile {
  int32_t first_rank, num_ranks;      // rows of A or Bt
  int32_t first_vector, num_vectors;  // of the share
  bool last;                          // shrink: of these ranks; expand: of these vectors
};

MILORA_HOST_DEVICE int32_t num_tiles(int32_t rank, int32_t vectors) {
  return (rank + kTileRanks - 1) / kTileRanks * ((vectors + kTileVectors - 1) / kTileVectors);
}

MILORA_HOST_DEVICE LoraTile lora_tile(int32_t rank, int32_t vectors, int32_t rank_tile,
                                      int32_t vector_tile) {
  const int32_t ranks_left = rank - rank_tile * kTileRanks;
  const int32_t vectors_left = vectors - vector_tile * kTileVectors;
  return {rank_tile * kTileRanks, ranks_left < kTileRanks ? ranks_left : kTileRanks,
          vector_tile * kTileVectors, vectors_left < kTileVectors ? vectors_left : kTileVectors,
          false};
}

// Tile i of the shrink, i < num_tiles: all vectors of 16 ranks before the next 16 ranks, so that
// the sums of only 16 ranks are open.
MILORA_HOST_DEVICE LoraTile shrink_tile_at(int32_t rank, int32_t vectors, int32_t i) {
  const int32_t across = (vectors + kTileVectors - 1) / kTileVectors;
  LoraTile tile = lora_tile(rank, vectors, i / across, i % across);
  tile.last = i % across == across - 1;
  return tile;
}

// Tile i of the expand: all ranks of 64 vectors before the next vectors, so that the sums stay in
// registers.
MILORA_HOST_DEVICE LoraTile expand_tile_at(int32_t rank, int32_t vectors, int32_t i) {
  const int32_t down = (rank + kTileRanks - 1) / kTileRanks;
  LoraTile tile = lora_tile(rank, vectors, i % down, i / down);
  tile.last = i % down == down - 1;
  return tile;
}

// Rows that stand together: bit l of `active` says that token l of 32 has work, of `same` that it
// has the adapter of token l - 1. A group ends at every eighth token, so that a warp sees it whole.
struct RowGroups {
  uint32_t heads;  // first rows of groups
  uint32_t joins;  // rows that belong to the group of the row before
};

MILORA_HOST_DEVICE RowGroups row_groups(uint32_t active, uint32_t same) {
  static_assert(kGroupRows == 8, "the mask clears every eighth bit");
  const uint32_t joins = active & (active << 1) & same & 0xfefefefeu;
  return {active & ~joins, joins};
}

MILORA_HOST_DEVICE int32_t rows_of_group(uint32_t joins, int32_t head) {
  int32_t rows = 1;
  while (head + rows < 32 && (joins >> (head + rows) & 1)) ++rows;
  return rows;
}

// Items are dealt out like cards: number i goes to worker i % workers.
MILORA_HOST_DEVICE int32_t items_of_worker(int32_t total, int32_t worker, int32_t workers) {
  return total > worker ? (total - worker - 1) / workers + 1 : 0;
}

}  // namespace milora
