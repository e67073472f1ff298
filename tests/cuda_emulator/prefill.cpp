// grouped_lora_'s prefill kernels on the emulator, for tests/test_cuda_emulation.py (ctypes).
#define MILORA_EMULATE
#include "cuda_runtime.h"
// above: the words that the kernels are written in
#include "kernels/grouped_lora/sm80/expand.cuh"
#include "kernels/grouped_lora/sm80/plan.cuh"
#include "kernels/grouped_lora/sm80/shrink.cuh"

namespace milora {
namespace {

using namespace prefill;

template <class T>
void run(const GroupedLoraPoolParams& p, const Workspace& workspace, int blocks, bool descending) {
  int64_t widest = 0;
  for (int s = 0; s < p.num_slices; ++s) widest = p.d_out[s] > widest ? p.d_out[s] : widest;
  const auto column_units = static_cast<int>(ceil_div(widest, kUnitColumns));
  emulator::launch(1, kPlanThreads, 0, descending, [&] { plan_kernel<T>(p, workspace); });
  emulator::launch(blocks, kThreads, kShrinkBytes, descending,
                   [&] { shrink_kernel<T>(p, workspace); });
  emulator::launch(blocks, kThreads, expand_bytes(sizeof(T)), descending,
                   [&] { expand_kernel<T>(p, workspace, column_units); });
}

}  // namespace
}  // namespace milora

// `sizes`: num_tokens, num_routes, num_experts, num_adapters, num_slices, d_in, x_stride,
// pool_bytes, dtype. Returns the tiles found, and writes the first `capacity` of them as rows of
// six: first, rows, route, adapter, slices, jobs in all.
extern "C" int64_t emulate_prefill(const int64_t* sizes, void* const* y, const int64_t* y_stride,
                                   const int64_t* d_out, const int64_t* experts, const void* x,
                                   const uint8_t* pool, const int64_t* offsets,
                                   const int32_t* ranks, const float* scales, const float* gates,
                                   const int32_t* route_of, const int32_t* adapter_of, int blocks,
                                   int descending, int64_t* tiles, int64_t capacity) {
  using namespace milora;
  GroupedLoraPoolParams p{};
  p.num_tokens = sizes[0];
  p.num_routes = sizes[1];
  p.num_experts = sizes[2];
  p.num_adapters = sizes[3];
  p.num_slices = sizes[4];
  p.d_in = sizes[5];
  p.x_stride = sizes[6];
  p.pool_bytes = sizes[7];
  p.dtype = static_cast<Dtype>(sizes[8]);
  for (int s = 0; s < p.num_slices; ++s) {
    p.y[s] = y[s];
    p.y_stride[s] = y_stride[s];
    p.d_out[s] = d_out[s];
    p.expert[s] = static_cast<int32_t>(experts[s]);
  }
  p.x = x;
  p.pool = pool;
  p.offsets = offsets;
  p.ranks = ranks;
  p.scales = scales;
  p.gates = gates;
  p.route_of = route_of;
  p.adapter_of = adapter_of;

  Workspace workspace;
  std::vector<uint8_t> memory(lay_out(p, nullptr, &workspace) + 256, 0xff);  // NaN
  auto base = reinterpret_cast<uintptr_t>(memory.data());
  lay_out(p, reinterpret_cast<void*>((base + 255) / 256 * 256), &workspace);
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
