// Tiles of the prefill path by wgmma. No CUDA here. Plan, split of d_in, partial sums and workspace
// are those of sm80/.
#pragma once

#include "kernels/grouped_lora/sm80/config.h"

namespace milora::prefill_wgmma {

using prefill::ceil_div;
using prefill::Column;
using prefill::Job;
using prefill::kPieceBytes;
using prefill::kPieces;
using prefill::kRankBlock;
using prefill::kRanksPerStage;
using prefill::kRowBytes;
using prefill::kSplit;
using prefill::kUnitColumns;
using prefill::Partials;
using prefill::swizzled;
using prefill::Tile;
using prefill::Workspace;

// ---- tile table ----
// Two warpgroups of 64 rows. A and Bt are read again from L2 for every tile, rank / 128 bytes for
// each byte of x: for q, k and v of rank 32 L2 gives 1.75 bytes for each that the memory gives,
// where tiles of 64 rows ask 2.5 of it (12 TB/s beside an H200's memory).
constexpr int kRows = 128;
constexpr int kGroupRows = 64;  // of wgmma, and of a warpgroup
constexpr int kGroupThreads = 128;
constexpr int kThreads = kRows / kGroupRows * kGroupThreads;
// A tensor copy brings 8 rows of 128 bytes, the unit of the swizzle: a short tile asks for the rows
// that it has, rounded up to 8. Copies of one warp start one after the other (their operands are
// uniform registers), so two or four threads of each warp start one.
constexpr int kBoxRows = 8;
constexpr int kBoxBytes = kBoxRows * kRowBytes;
constexpr int kBoxes = kRows / kBoxRows;
constexpr int kThreadsPerBox = kThreads / kBoxes;
constexpr int kGroupThreadsPerBox = kGroupThreads / kBoxes;
static_assert(kGroupThreadsPerBox >= 1);
MILORA_HOST_DEVICE int boxes_of(const Tile& tile) { return (tile.rows + kBoxRows - 1) / kBoxRows; }
constexpr int kDepth = 64;  // 16-bit elements in 128 bytes

// ---- shrink ----
// q, k and v of rank 32, or 128 ranks of one module, in one pass; 64 sums a thread leave room for
// two blocks, of which one multiplies while the other waits.
constexpr int kShrinkColumns = 128;
constexpr int kShrinkStages = 3;  // 64 KB in flight for each block: twice what the memory needs
constexpr int kXBytes = kRows * kRowBytes;
constexpr int kABytes = kShrinkColumns * kRowBytes;
struct ShrinkShared {
  uint8_t stages[kShrinkStages][kXBytes + kABytes];
  Column columns[kShrinkColumns];
  uint64_t filled[kShrinkStages];  // barriers of x
};
static_assert(2 * (sizeof(ShrinkShared) + 1024) <= 228 * 1024, "two blocks a multiprocessor");

// ---- expand ----
// 64 columns a step, as for sm80. S takes 64 KB, so there is one block a multiprocessor; it asks
// for the next unit's y while it still works on this one. Four of the stages are on their way in
// (64 KB of y), one is worked on, one is on its way out.
constexpr int kExpandStages = 6;
constexpr int kAhead = kExpandStages - 2;
constexpr int kYBytes = kRows * kRowBytes;
constexpr int kExpandStageBytes = kYBytes + kRanksPerStage * kRowBytes;
// S: blocks of 64 ranks side by side, rows of 128 bytes in each.
constexpr int kHiddenBlockBytes = kRows * kRowBytes;
constexpr int kHiddenBytes = kMaxRank / kDepth * kHiddenBlockBytes;
struct ExpandShared {
  uint8_t stages[kExpandStages][kExpandStageBytes];
  uint8_t hidden[kHiddenBytes];
  float core_rows[kMaxRank][16];   // of sm80/core.cuh
  uint64_t filled[kExpandStages];  // barriers of y
};
static_assert(sizeof(ExpandShared) <= 227 * 1024, "what one block may have on sm_90");
static_assert(sizeof(ShrinkShared::stages[0]) % 1024 == 0 && kExpandStageBytes % 1024 == 0 &&
                  offsetof(ExpandShared, hidden) % 1024 == 0,
              "the swizzle follows the address");

}  // namespace milora::prefill_wgmma
