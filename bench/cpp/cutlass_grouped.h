// A rival for prefill: the update as two stock CUTLASS grouped GEMMs, S = X A^T and Y += alpha S
// Bt, with one group per (adapter, module). 2.x (sm80: mma.sync, cp.async, device-side problem
// visitor) and 3.x (sm90a: pointer arrays, TMA, wgmma), the latter also with swapped operands,
// where a group has few rows. The tiles follow CUTLASS's own examples 24 and 57, cut down to N =
// rank and K = rank; S is bf16 in between, since its tensor-core operands are.
//
// What the clock leaves out is in CUTLASS's favour: the groups' pointers and sizes are made before
// (ours plans inside of its time), each adapter's tokens lie together, and all gates are 1 on sm80,
// whose grouped kernel has one alpha for all groups.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace milora::bench {

// d_g [m, n] = alpha_g a_g [m, k] b_g [k, n], plus d_g where it accumulates; bf16, sums in f32. All
// groups of one size, which the kernels cannot know: they read sizes and pointers on the device.
struct GroupedProducts {
  std::vector<const void*> a, b;
  std::vector<void*> d;
  int m, n, k;
  int64_t lda, ldb, ldd;  // elements from one row (b of a shrink: column) to the next
  bool accumulate;

  int count() const { return static_cast<int>(a.size()); }
};

// Products that are ready to run as often as wanted, in a graph too.
class GroupedGemm {
 public:
  virtual ~GroupedGemm() = default;
  virtual int run(cudaStream_t stream) = 0;  // returns a cudaError_t
};

// One instantiation, one file: each takes up to a minute and 3 GB to compile. A shrink's b is A
// [rank, d_in], so its columns lie together; an expand's is Bt [rank, d_out].
using MakeGroupedGemm = std::unique_ptr<GroupedGemm>(const GroupedProducts& products);
MakeGroupedGemm cutlass_sm80_shrink, cutlass_sm80_expand;
MakeGroupedGemm cutlass_sm90_shrink, cutlass_sm90_expand;
MakeGroupedGemm cutlass_sm90_swapped_shrink, cutlass_sm90_swapped_expand;

}  // namespace milora::bench
