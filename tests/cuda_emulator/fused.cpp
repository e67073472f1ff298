// fused_lora's kernels on the emulator, for tests/test_cuda_emulation.py (ctypes).
#define MILORA_EMULATE
#include "cuda_runtime.h"
// above: the words that the kernels are written in
#include "kernels/grouped_lora/sm80/plan.cuh"
#include "kernels/grouped_lora/sm80/shrink.cuh"
#include "kernels/grouped_lora/sm90/fused.cuh"
#include "pool_arguments.h"

namespace milora {
namespace {

CUtensorMap tensor_map(const void* data, int64_t rows, int64_t columns, int64_t stride,
                       int box_rows) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || stride % 8 != 0) {
    emulator::die("a tensor map needs rows on 16 bytes");
  }
  return {static_cast<const uint8_t*>(data), rows, columns, stride * 2, box_rows};
}

template <class T>
void run(const FusedLoraParams& p, const fused::Workspace& workspace, int blocks, bool descending) {
  const GroupedLoraPoolParams& lora = p.lora;
  const CUtensorMap x_map =
      tensor_map(lora.x, lora.num_tokens, lora.d_in, lora.x_stride, fused::kRows);
  const CUtensorMap w_map = tensor_map(p.w, lora.d_out[0], lora.d_in, p.w_stride, fused::kColumns);
  emulator::launch(1, prefill::kPlanThreads, 0, descending,
                   [&] { prefill::plan_kernel<T, true>(lora, workspace.shrink); });
  emulator::launch(blocks, prefill::kThreads, prefill::kShrinkBytes, descending,
                   [&] { prefill::shrink_kernel<T>(lora, workspace.shrink); });
  emulator::launch(blocks, fused::kFinishThreads, 0, descending,
                   [&] { fused::finish_kernel<T>(lora, workspace); });
  emulator::launch(blocks, fused::kThreads, fused::kSharedBytes, descending,
                   [&] { fused::fused_kernel<T>(p, workspace, x_map, w_map); });
}

}  // namespace
}  // namespace milora

extern "C" void emulate_fused(const milora::PoolArguments* arguments, const void* w,
                              int64_t w_stride, const void* bias, int blocks, int descending) {
  using namespace milora;
  const FusedLoraParams p{arguments->params(), w, w_stride, bias};
  fused::Workspace workspace;
  std::vector<uint8_t> memory(fused::lay_out(p, nullptr, &workspace) + 256, 0xff);  // NaN
  auto base = reinterpret_cast<uintptr_t>(memory.data());
  fused::lay_out(p, reinterpret_cast<void*>((base + 255) / 256 * 256), &workspace);
  if (p.lora.dtype == Dtype::kBFloat16) {
    run<__nv_bfloat16>(p, workspace, blocks, descending != 0);
  } else {
    run<__half>(p, workspace, blocks, descending != 0);
  }
}

// The output tile of each index, as (down, across).
extern "C" void output_tiles(int64_t tiles_down, int64_t tiles_across, int32_t* tiles) {
  for (int64_t i = 0; i < tiles_down * tiles_across; ++i) {
    const milora::fused::OutputTile tile = milora::fused::output_tile(i, tiles_down, tiles_across);
    tiles[2 * i] = tile.down;
    tiles[2 * i + 1] = tile.across;
  }
}

// Segments of tiles given as rows of (first, rows, route); returns how many, as the same rows.
extern "C" int segments(const int32_t* tiles, int count, int32_t* found) {
  std::vector<milora::prefill::Tile> list;
  for (int i = 0; i < count; ++i) {
    list.push_back({tiles[3 * i], tiles[3 * i + 2], 0, static_cast<int16_t>(tiles[3 * i + 1]), 1});
  }
  milora::fused::Segment segment;
  int32_t at = 0, segments = 0;
  while (milora::fused::next_segment(list.data(), &at, count, &segment)) {
    const int32_t row[] = {segment.first, segment.rows, segment.route};
    std::memcpy(found + 3 * segments++, row, sizeof(row));
  }
  return segments;
}
