// grouped_lora_'s prefill kernels on the emulator, for tests/test_emulated_prefill.py (ctypes).
#include "driver.h"
#include "kernels/grouped_lora/sm80/expand.cuh"
#include "kernels/grouped_lora/sm80/plan.cuh"
#include "kernels/grouped_lora/sm80/shrink.cuh"
#include "kernels/grouped_lora/sm90/prefill_expand.cuh"
#include "kernels/grouped_lora/sm90/prefill_shrink.cuh"
#include "tensor_map.h"

namespace milora {
namespace {

using prefill::Workspace;

struct Call {
  const GroupedLoraPoolParams& p;
  const Workspace& workspace;
  unsigned blocks;
  int column_units;
};

template <class T>
void run(const Call& c) {
  using namespace prefill;
  emulator::launch(1, kPlanThreads, 0, [&] { plan_kernel<T, kTileRows, false>(c.p, c.workspace); });
  emulator::launch(c.blocks, kThreads, kShrinkBytes, [&] { shrink_kernel<T>(c.p, c.workspace); });
  emulator::launch(c.blocks, kThreads, expand_bytes(sizeof(T)),
                   [&] { expand_kernel<T>(c.p, c.workspace, c.column_units); });
}

template <class T>
void run_wgmma(const Call& c) {
  using namespace prefill_wgmma;
  const GroupedLoraPoolParams& p = c.p;
  const CUtensorMap x_map = emulator::tensor_map(p.x, p.num_tokens, p.d_in, p.x_stride, kBoxRows);
  YMaps y_maps{};
  for (int s = 0; s < p.num_slices; ++s) {
    y_maps.slice[s] =
        emulator::tensor_map(p.y[s], p.num_tokens, p.d_out[s], p.y_stride[s], kBoxRows);
  }
  emulator::launch(1, prefill::kPlanThreads, 0,
                   [&] { prefill::plan_kernel<T, kRows, false>(p, c.workspace); });
  emulator::launch(c.blocks, kThreads, sizeof(ShrinkShared),
                   [&] { shrink_wgmma_kernel<T>(p, c.workspace, x_map); });
  emulator::launch(c.blocks, kThreads, sizeof(ExpandShared),
                   [&] { expand_wgmma_kernel<T>(p, c.workspace, c.column_units, y_maps); });
}

}  // namespace
}  // namespace milora

MILORA_EXPORT int64_t params_bytes() { return sizeof(milora::GroupedLoraPoolParams); }

// `wgmma`: by the kernels of sm_90a. Returns the number of tiles found, and writes the first
// `capacity` of them as rows of six: first, rows, route, adapter, slices, jobs in all.
MILORA_EXPORT int64_t prefill(const milora::GroupedLoraPoolParams* params, int wgmma,
                              unsigned blocks, int order, int64_t* tiles, int64_t capacity) {
  using namespace milora;
  const GroupedLoraPoolParams& p = *params;
  Workspace workspace;
  emulator::Memory memory(prefill::lay_out(p, nullptr, false, &workspace));
  prefill::lay_out(p, memory.data(), false, &workspace);
  const int64_t widest = *std::max_element(p.d_out, p.d_out + p.num_slices);
  const Call call{p, workspace, blocks,
                  static_cast<int>(prefill::ceil_div(widest, prefill::kUnitColumns))};
  emulator::start(order, p);
  dispatch_device_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) == 2) {
      if (wgmma) return run_wgmma<T>(call);
    }
    run<T>(call);
  });
  for (int64_t i = 0; i < workspace.counts->tiles && i < capacity; ++i) {
    const prefill::Tile& tile = workspace.tiles[i];
    const int64_t row[] = {tile.first,   tile.rows,   tile.route,
                           tile.adapter, tile.slices, workspace.counts->jobs};
    memcpy(tiles + 6 * i, row, sizeof(row));
  }
  return workspace.counts->tiles;
}
