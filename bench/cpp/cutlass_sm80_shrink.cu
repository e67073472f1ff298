// Tiles of 32 rows, since without a split of d_in a tile is all the parallelism that there is: 4096
// tokens make 128 of them. Eight stages of 8 KB hide the memory's latency.
#include "cutlass_sm80.cuh"

namespace milora::bench {

std::unique_ptr<GroupedGemm> cutlass_sm80_shrink(const GroupedProducts& products) {
  using cutlass::gemm::GemmShape;
  using Gemm =
      Sm80Grouped<cutlass::layout::ColumnMajor, GemmShape<32, 32, 64>, GemmShape<16, 32, 64>, 8>;
  return std::make_unique<Gemm>(products);
}

}  // namespace milora::bench
