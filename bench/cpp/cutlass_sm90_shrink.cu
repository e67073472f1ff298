// The smallest tile that wgmma has for N = rank 32.
#include "cutlass_sm90.cuh"

namespace milora::bench {

std::unique_ptr<GroupedGemm> cutlass_sm90_shrink(const GroupedProducts& products) {
  using Tile = cute::Shape<cute::_64, cute::_32, cute::_128>;
  return std::make_unique<Sm90Grouped<cutlass::layout::ColumnMajor, Tile, false>>(products);
}

}  // namespace milora::bench
