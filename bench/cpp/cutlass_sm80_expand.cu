// Example 24's tile: the depth is one step, and y, read and written once, is what takes the time.
#include "cutlass_sm80.cuh"

namespace milora::bench {

std::unique_ptr<GroupedGemm> cutlass_sm80_expand(const GroupedProducts& products) {
  using cutlass::gemm::GemmShape;
  using Gemm =
      Sm80Grouped<cutlass::layout::RowMajor, GemmShape<128, 128, 32>, GemmShape<64, 64, 32>, 3>;
  return std::make_unique<Gemm>(products);
}

}  // namespace milora::bench
