// CUTLASS 2.x grouped GEMM (example 24): blocks find their tiles themselves (kDeviceOnly).
#pragma once

#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/device/gemm_grouped.h>
#include <cutlass/gemm/kernel/default_gemm_grouped.h>

#include "common/check.h"
#include "cuda_harness.h"
#include "cutlass_grouped.h"

namespace milora::bench {

// Tile and warp: GemmShape<rows, columns, depth>.
template <class LayoutB, class Tile, class Warp, int kStages>
class Sm80Grouped final : public GroupedGemm {
  using Element = cutlass::bfloat16_t;
  using RowMajor = cutlass::layout::RowMajor;
  static constexpr int kVector = 8;  // elements of a 16-byte access
  using Kernel = typename cutlass::gemm::kernel::DefaultGemmGrouped<
      Element, RowMajor, cutlass::ComplexTransform::kNone, kVector,  //
      Element, LayoutB, cutlass::ComplexTransform::kNone, kVector,   //
      Element, RowMajor, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile, Warp,
      cutlass::gemm::GemmShape<16, 8, 16>,
      cutlass::epilogue::thread::LinearCombination<Element, kVector, float, float>,
      cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle, kStages,
      cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly>::GemmKernel;
  using Gemm = cutlass::gemm::device::GemmGrouped<Kernel>;

 public:
  explicit Sm80Grouped(const GroupedProducts& p)
      : sizes_(p.count() * sizeof(cutlass::gemm::GemmCoord)),
        pointers_(3 * p.count() * sizeof(void*)),
        strides_(3 * p.count() * sizeof(int64_t)) {
    const int count = p.count();
    sizes_.put(std::vector<cutlass::gemm::GemmCoord>(count, {p.m, p.n, p.k}));
    std::vector<const void*> pointers(p.a);
    pointers.insert(pointers.end(), p.b.begin(), p.b.end());
    pointers.insert(pointers.end(), p.d.begin(), p.d.end());
    pointers_.put(pointers);
    std::vector<int64_t> strides;
    for (const int64_t stride : {p.lda, p.ldb, p.ldd}) {
      strides.insert(strides.end(), count, stride);
    }
    strides_.put(strides);
    auto* operands = pointers_.at<Element*>();
    auto* steps = strides_.at<int64_t>();
    // So many blocks as the chip holds: how many tiles there are, only the device knows.
    const typename Gemm::Arguments arguments(
        sizes_.at<cutlass::gemm::GemmCoord>(), count, Gemm::sufficient(),
        {1.0f, p.accumulate ? 1.0f : 0.0f}, operands, operands + count, operands + 2 * count,
        operands + 2 * count, steps, steps + count, steps + 2 * count, steps + 2 * count);
    check(arguments.threadblock_count > 0, "cutlass_sm80", "the kernel must fit on this GPU");
    const cutlass::Status status = gemm_.initialize(arguments);
    check(status == cutlass::Status::kSuccess, "cutlass_sm80",
          "the arguments must be accepted, got ", cutlassGetStatusString(status));
  }

  int run(cudaStream_t stream) override {
    return gemm_.run(stream) == cutlass::Status::kSuccess ? cudaSuccess : cudaErrorLaunchFailure;
  }

 private:
  Memory sizes_, pointers_, strides_;  // of every group, on the device
  Gemm gemm_;
};

}  // namespace milora::bench
