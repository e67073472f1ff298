// Tiles and schedule of the fused product. No CUDA here.
#pragma once

#include "kernels/grouped_lora/fused.h"
#include "kernels/grouped_lora/sm80/config.h"

namespace milora::fused {

using prefill::ceil_div;
using prefill::kPieceBytes;
using prefill::kPieces;
using prefill::kRowBytes;
using prefill::swizzled;

// ---- tile table ----
// 128 x 256: two warpgroups of 64 x 256 sums, 128 registers a thread. Per 64 of depth 48 KB come
// from L2 for 1024 cycles of wgmma, which is what L2 gives a multiprocessor; 128 x 128 would need
// a third more.
constexpr int kRows = 128;
constexpr int kColumns = 256;
constexpr int kDepth = 64;  // 128 bytes, the widest swizzle
constexpr int kStages = 4;  // 192 KB: three products ahead, about 1.7 us, longer than L2 takes
constexpr int kGroupThreads = 128;
constexpr int kConsumers = 2;
constexpr int kThreads = kGroupThreads * (kConsumers + 1);
// 128 sums, addresses and bias. What the groups take must be what the kernel was launched with, 168
// a thread (65,536 / 384 in steps of 8): asking for more waits for ever.
constexpr int kLaunchRegisters = 168;
constexpr int kConsumerRegisters = 224;
constexpr int kProducerRegisters = 56;
static_assert(kConsumers * kConsumerRegisters + kProducerRegisters <=
              (kConsumers + 1) * kLaunchRegisters);
static_assert(kThreads * kLaunchRegisters <= 65536);
static_assert(kRows == prefill::kBlockRows && kRows == kConsumers * 64);

constexpr int kXBytes = kRows * kRowBytes;
constexpr int kWBytes = kColumns * kRowBytes;
constexpr int kStageBytes = kXBytes + kWBytes;
// Bt in a stage: blocks of 64 columns, each kDepth rows of 128 bytes.
constexpr int kBlockColumns = 64;
constexpr int kBlockBytes = kDepth * kRowBytes;
static_assert(kColumns / kBlockColumns * kBlockBytes == kWBytes);
constexpr int kBarrierBytes = 2 * kStages * 8;
constexpr int kSharedBytes = kStages * kStageBytes + kBarrierBytes;
static_assert(kSharedBytes <= 227 * 1024, "what one block may have on sm_90");

// ---- schedule ----
// Output tiles in bands of 8 down, which run through all columns: the 132 tiles under way then
// share 8 tiles of x and about 17 of W, all in L2.
constexpr int kBand = 8;
struct OutputTile {
  int32_t down, across;
};
MILORA_HOST_DEVICE OutputTile output_tile(int64_t index, int64_t tiles_down, int64_t tiles_across) {
  const int64_t band = index / (kBand * tiles_across), inside = index % (kBand * tiles_across);
  const int64_t left = tiles_down - band * kBand;
  const int64_t height = left < kBand ? left : kBand;
  return {static_cast<int32_t>(band * kBand + inside % height),
          static_cast<int32_t>(inside / height)};
}

// Neighbouring tiles of one route, merged: rows [first, first + rows) of x.
struct Segment {
  int32_t first, rows, route, adapter;
};
// The next segment among tiles [*at, end), or false.
MILORA_HOST_DEVICE bool next_segment(const prefill::Tile* tiles, int32_t* at, int32_t end,
                                     Segment* segment) {
  if (*at >= end) return false;
  const prefill::Tile& tile = tiles[(*at)++];
  *segment = {tile.first, tile.rows, tile.route, tile.adapter};
  while (*at < end && tiles[*at].route == segment->route &&
         tiles[*at].first == segment->first + segment->rows) {
    segment->rows += tiles[(*at)++].rows;
  }
  return true;
}

// ---- workspace: that of the shrink, and gate scale A x, rounded ----
struct Workspace {
  prefill::Workspace shrink;
  void* hidden;  // [num_tokens, kMaxRank] dtype of x; up to the rank rounded up to 16
};
inline int64_t lay_out(const FusedLoraParams& p, void* memory, Workspace* workspace) {
  Cutter cutter{static_cast<char*>(memory)};
  cutter.size = prefill::lay_out(p.lora, memory, true, &workspace->shrink);
  workspace->hidden = cutter.take<uint16_t>(p.lora.num_tokens * kMaxRank);
  return cutter.size;
}

}  // namespace milora::fused
