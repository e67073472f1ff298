// Tiles, schedules and workspace of the prefill path. No CUDA here: tests run all of it on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cutter.h"
#include "common/macros.h"
#include "kernels/grouped_lora/params.h"

namespace milora::prefill {

// ---- tile table ----
// 64 rows: A is read again from L2 for every tile, rank / 64 bytes for each byte of x, so that
// ranks up to 96 stay under the ratio of L2's rate to the memory's. 128 would halve that and waste
// more on short runs.
constexpr int kTileRows = 64;
// 128 columns of A x a pass: q, k and v of rank 32 in one, with 64 sums a thread.
constexpr int kTileRanks = 128;
// 128 bytes, a row of a shared-memory tile: eight 16-byte pieces, which the swizzle spreads over
// all 32 banks.
constexpr int kRowBytes = 128;
constexpr int kPieceBytes = 16;
constexpr int kPieces = kRowBytes / kPieceBytes;
// mma takes 16 ranks at a time; a rank is rounded up to that and to no more.
constexpr int kRankBlock = 16;
// A sum over d_in is cut every 1024 elements, whatever the batch: 4096 tokens of 4096 become 256
// units of work for the 108 to 132 multiprocessors, and the partial sums of a rank-32 slice add 6 %
// to the bytes of x.
constexpr int kSplit = 1024;
// Columns of y that one unit of the expand walks through: it sums the partials once for all.
constexpr int kUnitColumns = 1024;
// Four warps, two along the rows and two along the columns of a tile: each matrix then passes from
// shared memory to registers twice.
constexpr int kThreads = 128;
constexpr int kWarpsAcross = 2;
constexpr int kShrinkStages = 3;  // 72 KB: two blocks on an A100, three on an H100
// f32 keeps twice the bytes of S in shared memory: two stages hold it under the 99 KB of Ada.
MILORA_HOST_DEVICE constexpr int expand_stages(size_t item) { return item == 4 ? 2 : 3; }

static_assert(kTileRows == 64 && kThreads == 128 && kWarpsAcross == 2,
              "a warp owns 32 rows of a tile: two of mma's 16");
static_assert(kTileRanks % (kWarpsAcross * kRankBlock) == 0);
static_assert(kSplit % kRowBytes == 0 && kUnitColumns % (kRowBytes / 2) == 0);

// Byte of a tile's piece (row, piece) in shared memory. Eight rows of one piece, which ldmatrix
// reads at once, lie in eight different 16-byte columns.
MILORA_HOST_DEVICE int swizzled(int row, int piece) {
  return row * kRowBytes + ((piece ^ (row & 7)) * kPieceBytes);
}

MILORA_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- the plan that the device writes ----
// Rows [first, first + rows) of one route, and the slices that change them, as bits.
struct Tile {
  int32_t first, route, adapter;
  int16_t rows;
  uint16_t slices;
};
static_assert(sizeof(Tile) == 16 && kMaxSlices <= 16);
constexpr int kBlockRows = 128;
static_assert(kBlockRows % kTileRows == 0);
// An active slice of a tile: tile * kMaxSlices + slice.
using Job = int32_t;
struct PlanCounts {
  int32_t tiles, jobs;
};

// ---- workspace ----
// Sums of A x by splits of d_in: [splits, num_slices, num_tokens, width]; only what an expert needs
// is used.
struct Partials {
  float* sums;
  int64_t width;  // partial_width, once for all kernels
};
struct Workspace {
  PlanCounts* counts;
  Tile* tiles;  // [num_tokens]: a tile has a row at least
  Job* jobs;    // [num_tokens * num_slices]
  Partials partials;
  // Of a plan that is aligned to blocks of kBlockRows tokens, else null: the first tile of each
  // block, and the number of tiles. [ceil(num_tokens / kBlockRows) + 1]
  int32_t* block_begin;
};

// The first token of the tile that holds token t, in the run that starts at `start`: tiles have up
// to kRows rows. A tile of an aligned plan also begins at every multiple of kRows.
template <int kRows, bool kAligned>
MILORA_HOST_DEVICE int64_t tile_first(int64_t t, int64_t start) {
  if (!kAligned) return t - (t - start) % kRows;
  const int64_t boundary = t - t % kRows;
  return boundary > start ? boundary : start;
}

MILORA_HOST_DEVICE int num_splits(int64_t d_in) { return static_cast<int>(ceil_div(d_in, kSplit)); }

// Sums of a row: as many as an expert of the call may have ranks, in blocks of 16.
inline int64_t partial_width(const GroupedLoraPoolParams& p) {
  return ceil_div(most_ranks(p), kRankBlock) * kRankBlock;
}

MILORA_HOST_DEVICE int64_t partial_row(const GroupedLoraPoolParams& p, int64_t width, int split,
                                       int slice, int64_t token) {
  return ((split * p.num_slices + slice) * p.num_tokens + token) * width;
}

// Cuts `memory` (null to measure) into the workspace; returns its bytes.
inline int64_t lay_out(const GroupedLoraPoolParams& p, void* memory, bool aligned,
                       Workspace* workspace) {
  Cutter cutter{static_cast<char*>(memory)};
  workspace->counts = cutter.take<PlanCounts>(1);
  workspace->tiles = cutter.take<Tile>(p.num_tokens);
  workspace->jobs = cutter.take<Job>(p.num_tokens * p.num_slices);
  workspace->partials.width = partial_width(p);
  workspace->partials.sums = cutter.take<float>(num_splits(p.d_in) * p.num_slices * p.num_tokens *
                                                workspace->partials.width);
  workspace->block_begin =
      aligned ? cutter.take<int32_t>(ceil_div(p.num_tokens, kBlockRows) + 1) : nullptr;
  return cutter.size;
}

// ---- dynamic shared memory, in bytes ----
constexpr int kShrinkTileBytes = kTileRows * kRowBytes;
constexpr int kShrinkStageBytes = kShrinkTileBytes + kTileRanks * kRowBytes;
// A column of A x in a pass: its row of A and the place of the tile's first row in partials.
struct Column {
  const uint8_t* row;  // null past the rank, where the sums are never read
  int64_t target;
};
constexpr int kShrinkBytes =
    kShrinkStages * kShrinkStageBytes + kTileRanks * static_cast<int>(sizeof(Column));

constexpr int kRanksPerStage = 64;  // of Bt in one stage of the expand
constexpr int kExpandYBytes = kTileRows * kRowBytes;
constexpr int kExpandStageBytes = kExpandYBytes + kRanksPerStage * kRowBytes;
MILORA_HOST_DEVICE constexpr int expand_bytes(size_t item) {
  return expand_stages(item) * kExpandStageBytes + kTileRows * kMaxRank * static_cast<int>(item);
}
static_assert(expand_bytes(2) <= 81 * 1024, "two blocks on an A100 (164 KB, 1 KB kept by each)");
static_assert(expand_bytes(4) <= 99 * 1024 && kShrinkBytes <= 99 * 1024, "one block on Ada");

}  // namespace milora::prefill
