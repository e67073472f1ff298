// grouped_lora_'s prefill kernels on the emulator, for tests/test_cuda_emulation.py (ctypes).
#define MILORA_EMULATE
#include "cuda_runtime.h"
// above: the words that the kernels are written in
#include "kernels/grouped_lora/sm80/expand.cuh"
#include "kernels/grouped_lora/sm80/plan.cuh"
#include "kernels/grouped_lora/sm80/shrink.cuh"
#include "pool_arguments.h"

namespace milora {
namespace {

using namespace prefill;

template <class T>
void run(const GroupedLoraPoolParams& p, const Workspace& workspace, int blocks, bool descending) {
  int64_t widest = 0;
  for (int s = 0; s < p.num_slices; ++s) widest = p.d_out[s] > widest ? p.d_out[s] : widest;
  const auto column_units = static_cast<int>(ceil_div(widest, kUnitColumns));
  emulator::launch(1, kPlanThreads, 0, descending, [&] { plan_kernel<T, false>(p, workspace); });
  emulator::launch(blocks, kThreads, kShrinkBytes, descending,
                   [&] { shrink_kernel<T>(p, workspace); });
  emulator::launch(blocks, kThreads, expand_bytes(sizeof(T)), descending,
                   [&] { expand_kernel<T>(p, workspace, column_units); });
}

}  // namespace
}  // namespace milora

// Returns the number of tiles found, and writes the first `capacity` of them as rows of six:
// first, rows, route, adapter, slices, jobs in all.
extern "C" int64_t emulate_prefill(const milora::PoolArguments* arguments, int blocks,
                                   int descending, int64_t* tiles, int64_t capacity) {
  using namespace milora;
  const GroupedLoraPoolParams p = arguments->params();
  Workspace workspace;
  std::vector<uint8_t> memory(lay_out(p, nullptr, false, &workspace) + 256, 0xff);  // NaN
  auto base = reinterpret_cast<uintptr_t>(memory.data());
  lay_out(p, reinterpret_cast<void*>((base + 255) / 256 * 256), false, &workspace);
  switch (p.dtype) {
    case Dtype::kFloat32:
      run<float>(p, workspace, blocks, descending != 0);
      break;
    case Dtype::kBFloat16:
      run<__nv_bfloat16>(p, workspace, blocks, descending != 0);
      break;
    case Dtype::kFloat16:
      run<__half>(p, workspace, blocks, descending != 0);
      break;
  }
  for (int64_t i = 0; i < workspace.counts->tiles && i < capacity; ++i) {
    const prefill::Tile& tile = workspace.tiles[i];
    const int64_t row[] = {tile.first,   tile.rows,   tile.route,
                           tile.adapter, tile.slices, workspace.counts->jobs};
    std::memcpy(tiles + 6 * i, row, sizeof(row));
  }
  return workspace.counts->tiles;
}
