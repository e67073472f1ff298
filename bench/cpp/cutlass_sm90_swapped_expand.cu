// d_out x tokens: a group of 16 rows fills half of a tile, not an eighth.
#include "cutlass_sm90.cuh"

namespace milora::bench {

std::unique_ptr<GroupedGemm> cutlass_sm90_swapped_expand(const GroupedProducts& products) {
  using Tile = cute::Shape<cute::_64, cute::_32, cute::_32>;
  return std::make_unique<Sm90Grouped<cutlass::layout::RowMajor, Tile, true>>(products);
}

}  // namespace milora::bench
