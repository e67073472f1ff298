// One step of depth 32: y is what takes the time.
#include "cutlass_sm90.cuh"

namespace milora::bench {

std::unique_ptr<GroupedGemm> cutlass_sm90_expand(const GroupedProducts& products) {
  using Tile = cute::Shape<cute::_64, cute::_128, cute::_32>;
  return std::make_unique<Sm90Grouped<cutlass::layout::RowMajor, Tile, false>>(products);
}

}  // namespace milora::bench
