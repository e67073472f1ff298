// fused_lora's kernels on the emulator, for tests/test_emulated_fused.py (ctypes).
#include "kernels/grouped_lora/sm90/fused.cuh"

#include "driver.h"
#include "kernels/grouped_lora/sm80/plan.cuh"
#include "kernels/grouped_lora/sm80/shrink.cuh"
#include "tensor_map.h"

namespace milora {
namespace {

template <class T>
void run(const FusedLoraParams& p, const fused::Workspace& workspace, unsigned blocks) {
  const GroupedLoraPoolParams& lora = p.lora;
  const CUtensorMap x_map =
      emulator::tensor_map(lora.x, lora.num_tokens, lora.d_in, lora.x_stride, fused::kRows);
  const CUtensorMap w_map =
      emulator::tensor_map(p.w, lora.d_out[0], lora.d_in, p.w_stride, fused::kColumns);
  emulator::launch(1, prefill::kPlanThreads, 0, [&] {
    prefill::plan_kernel<T, prefill::kTileRows, true>(lora, workspace.shrink);
  });
  emulator::launch(blocks, prefill::kThreads, prefill::kShrinkBytes,
                   [&] { prefill::shrink_kernel<T>(lora, workspace.shrink); });
  emulator::launch(blocks, prefill::kThreads, 0, [&] { fused::finish_kernel<T>(lora, workspace); });
  emulator::launch(blocks, fused::kThreads, fused::kSharedBytes,
                   [&] { fused::fused_kernel<T>(p, workspace, x_map, w_map); });
}

}  // namespace
}  // namespace milora

MILORA_EXPORT int64_t params_bytes() { return sizeof(milora::GroupedLoraPoolParams); }

MILORA_EXPORT void fused(const milora::GroupedLoraPoolParams* lora, const void* w, int64_t w_stride,
                         const void* bias, unsigned blocks, int order) {
  using namespace milora;
  const FusedLoraParams p{*lora, w, w_stride, bias};
  fused::Workspace workspace;
  emulator::Memory memory(fused::lay_out(p, nullptr, &workspace));
  fused::lay_out(p, memory.data(), &workspace);
  emulator::start(order, p.lora, {memory.range()});
  if (p.lora.dtype == Dtype::kBFloat16) {
    run<__nv_bfloat16>(p, workspace, blocks);
  } else {
    run<__half>(p, workspace, blocks);
  }
}

// The output tile of each index, as (down, across).
MILORA_EXPORT void output_tiles(int64_t tiles_down, int64_t tiles_across, int32_t* tiles) {
  for (int64_t i = 0; i < tiles_down * tiles_across; ++i) {
    const milora::fused::OutputTile tile = milora::fused::output_tile(i, tiles_down, tiles_across);
    tiles[2 * i] = tile.down;
    tiles[2 * i + 1] = tile.across;
  }
}

// Segments of tiles given as rows of (first, rows, route); returns how many, as the same rows.
MILORA_EXPORT int segments(const int32_t* tiles, int count, int32_t* found) {
  std::vector<milora::prefill::Tile> list;
  for (int i = 0; i < count; ++i) {
    list.push_back({tiles[3 * i], tiles[3 * i + 2], 0, static_cast<int16_t>(tiles[3 * i + 1]), 1});
  }
  milora::fused::Segment segment;
  int32_t at = 0, segments = 0;
  while (milora::fused::next_segment(list.data(), &at, count, &segment)) {
    const int32_t row[] = {segment.first, segment.rows, segment.route};
    memcpy(found + 3 * segments++, row, sizeof(row));
  }
  return segments;
}
