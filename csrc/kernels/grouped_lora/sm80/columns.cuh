// Which ranks a pass of the shrink sums.
//
// The active slices of a tile share x: their A's stand below one another, each rounded up to blocks
// of 16 ranks, and a pass takes as many of these blocks as its tile of sums is wide.
#pragma once

#include "kernels/grouped_lora/sm80/config.h"
#include "kernels/grouped_lora/sm80/expert.cuh"

namespace milora::prefill {

// Column `index` of the pass that begins at rank block `first_block`, with `width` partial sums a
// row; *total_blocks is the number of rank blocks of all passes. A column that the tile has not is
// empty.
template <class T>
__device__ __forceinline__ Column column_at(const GroupedLoraPoolParams& p, const Tile& tile,
                                            int64_t width, int split, int first_block, int index,
                                            int* total_blocks) {
  Column column{nullptr, 0};
  const int block = first_block + index / kRankBlock;
  int total = 0;
  for (int s = 0; s < p.num_slices; ++s) {
    if ((tile.slices >> s & 1) == 0) continue;
    const int64_t entry = tile.adapter * p.num_experts + p.expert[s];
    const int rank = p.ranks[entry];
    const int row = (block - total) * kRankBlock + index % kRankBlock;
    const int rank_blocks = static_cast<int>(ceil_div(rank, kRankBlock));
    if (row >= 0 && row < rank_blocks * kRankBlock) {
      column.target = partial_row(p, width, split, s, tile.first) + row;
      if (row < rank) {
        column.row = p.pool + offsets_at(p, entry)[kPartA] + row * pool_row_bytes<T>(p.d_in);
      }
    }
    total += rank_blocks;
  }
  *total_blocks = total;
  return column;
}

}  // namespace milora::prefill
