// grouped_lora_'s prefill kernels on the emulator, for tests/test_emulated_prefill.py (ctypes).
#include "driver.h"
#include "kernels/grouped_lora/sm80/expand.cuh"
#include "kernels/grouped_lora/sm80/plan.cuh"
#include "kernels/grouped_lora/sm80/shrink.cuh"

MILORA_EXPORT int64_t params_bytes() { return sizeof(milora::GroupedLoraPoolParams); }

// Returns the number of tiles found, and writes the first `capacity` of them as rows of six:
// first, rows, route, adapter, slices, jobs in all.
MILORA_EXPORT int64_t prefill(const milora::GroupedLoraPoolParams* params, unsigned blocks,
                              int order, int64_t* tiles, int64_t capacity) {
  using namespace milora;
  using namespace milora::prefill;
  const GroupedLoraPoolParams& p = *params;
  Workspace workspace;
  emulator::Memory memory(lay_out(p, nullptr, false, &workspace));
  lay_out(p, memory.data(), false, &workspace);
  const int64_t widest = *std::max_element(p.d_out, p.d_out + p.num_slices);
  const auto column_units = static_cast<int>(ceil_div(widest, kUnitColumns));
  emulator::start(order, p);
  dispatch_device_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    emulator::launch(1, kPlanThreads, 0, [&] { plan_kernel<T, false>(p, workspace); });
    emulator::launch(blocks, kThreads, kShrinkBytes, [&] { shrink_kernel<T>(p, workspace); });
    emulator::launch(blocks, kThreads, expand_bytes(sizeof(T)),
                     [&] { expand_kernel<T>(p, workspace, column_units); });
  });
  for (int64_t i = 0; i < workspace.counts->tiles && i < capacity; ++i) {
    const Tile& tile = workspace.tiles[i];
    const int64_t row[] = {tile.first,   tile.rows,   tile.route,
                           tile.adapter, tile.slices, workspace.counts->jobs};
    memcpy(tiles + 6 * i, row, sizeof(row));
  }
  return workspace.counts->tiles;
}
