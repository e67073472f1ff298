// rank [<= 64 of wgmma's rows] x tokens: half of the rows of rank 32 are padding.
#include "cutlass_sm90.cuh"

namespace milora::bench {

std::unique_ptr<GroupedGemm> cutlass_sm90_swapped_shrink(const GroupedProducts& products) {
  using Tile = cute::Shape<cute::_64, cute::_32, cute::_128>;
  return std::make_unique<Sm90Grouped<cutlass::layout::ColumnMajor, Tile, true>>(products);
}

}  // namespace milora::bench
