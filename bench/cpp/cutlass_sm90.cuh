// CUTLASS 3.x grouped GEMM of Hopper (example 57): persistent blocks rewrite their tensor maps at
// each group; one warpgroup multiplies while the other writes (ping-pong).
#pragma once

#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <type_traits>

#include "common/check.h"
#include "cuda_harness.h"
#include "cutlass_grouped.h"

namespace milora::bench {

// Tile: Shape<rows, columns, depth>; swapped, it is d^T = b^T a^T that is computed, and the tile's
// rows are columns of d.
template <class LayoutB, class Tile, bool kSwapped>
class Sm90Grouped final : public GroupedGemm {
  using Element = cutlass::bfloat16_t;
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  using TransposedB = std::conditional_t<std::is_same_v<LayoutB, Row>, Column, Row>;
  using LayoutLeft = std::conditional_t<kSwapped, TransposedB, Row>;
  using LayoutRight = std::conditional_t<kSwapped, Column, LayoutB>;
  using LayoutD = std::conditional_t<kSwapped, Column, Row>;
  static constexpr int kVector = 8;  // elements of 16 bytes, on which tensor copies insist

  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float,  //
      Element, LayoutD*, kVector, Element, LayoutD*, kVector,
      cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong,
      cutlass::epilogue::fusion::LinearCombination<Element, float>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp,  //
      Element, LayoutLeft*, kVector, Element, LayoutRight*, kVector, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong>::CollectiveOp;
  using Shape = cute::Shape<int, int, int>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<Shape>,
                                                      Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using StrideLeft = typename Kernel::InternalStrideA;
  using StrideRight = typename Kernel::InternalStrideB;
  using StrideD = typename Kernel::InternalStrideD;

 public:
  explicit Sm90Grouped(const GroupedProducts& p)
      : sizes_(p.count() * sizeof(Shape)),
        pointers_(4 * p.count() * sizeof(void*)),
        alpha_(p.count() * sizeof(float)),
        left_strides_(p.count() * sizeof(StrideLeft)),
        right_strides_(p.count() * sizeof(StrideRight)),
        d_strides_(p.count() * sizeof(StrideD)) {
    const int count = p.count();
    const auto [left, right] = kSwapped ? std::pair(&p.b, &p.a) : std::pair(&p.a, &p.b);
    std::vector<const void*> pointers(*left);
    pointers.insert(pointers.end(), right->begin(), right->end());
    pointers.insert(pointers.end(), p.d.begin(), p.d.end());
    for (int g = 0; g < count; ++g) pointers.push_back(alpha_.at<float>(g * sizeof(float)));
    pointers_.put(pointers);
    alpha_.put(std::vector<float>(count, 1.0f));
    const int rows = kSwapped ? p.n : p.m, columns = kSwapped ? p.m : p.n;
    sizes_.put(std::vector<Shape>(count, Shape{rows, columns, p.k}));
    left_strides_.put(std::vector(count, stride_of<StrideLeft>(kSwapped ? p.ldb : p.lda)));
    right_strides_.put(std::vector(count, stride_of<StrideRight>(kSwapped ? p.lda : p.ldb)));
    d_strides_.put(std::vector(count, stride_of<StrideD>(p.ldd)));

    const typename Gemm::Arguments arguments = arguments_of(count, p.accumulate);
    workspace_ = std::make_unique<Memory>(Gemm::get_workspace_size(arguments));
    const cutlass::Status status = gemm_.initialize(arguments, workspace_->at());
    check(status == cutlass::Status::kSuccess, "cutlass_sm90",
          "the arguments must be accepted, got ", cutlassGetStatusString(status));
    check_cuda(cudaDeviceSynchronize(), "CUTLASS's workspace");
  }

  int run(cudaStream_t stream) override {
    return gemm_.run(stream) == cutlass::Status::kSuccess ? cudaSuccess : cudaErrorLaunchFailure;
  }

 private:
  // The mode that is not contiguous has the stride; the other is 1 at compile time.
  template <class Stride>
  static std::remove_pointer_t<Stride> stride_of(int64_t step) {
    std::remove_pointer_t<Stride> stride{};
    if constexpr (cute::is_static<std::decay_t<decltype(cute::get<0>(stride))>>::value) {
      cute::get<1>(stride) = step;
    } else {
      cute::get<0>(stride) = step;
    }
    return stride;
  }

  typename Gemm::Arguments arguments_of(int count, bool accumulate) const {
    auto* left = pointers_.at<const Element*>();
    auto* right = left + count;
    auto* d = pointers_.at<Element*>(2 * count * sizeof(void*));
    typename Gemm::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    arguments.problem_shape = {count, sizes_.at<Shape>(), nullptr};  // the host knows no sizes
    arguments.mainloop.ptr_A = left;
    arguments.mainloop.dA = left_strides_.at<StrideLeft>();
    arguments.mainloop.ptr_B = right;
    arguments.mainloop.dB = right_strides_.at<StrideRight>();
    arguments.epilogue.ptr_C = const_cast<const Element**>(d);
    arguments.epilogue.ptr_D = d;
    arguments.epilogue.dC = arguments.epilogue.dD = d_strides_.at<StrideD>();
    auto& fusion = arguments.epilogue.thread;
    fusion.alpha_ptr_array = pointers_.at<const float*>(3 * count * sizeof(void*));
    fusion.dAlpha = {cute::_0{}, cute::_0{}, 1};
    fusion.beta = accumulate ? 1.0f : 0.0f;
    arguments.hw_info =
        cutlass::KernelHardwareInfo::make_kernel_hardware_info<Kernel>(/*device_id=*/0);
    return arguments;
  }

  Memory sizes_, pointers_, alpha_, left_strides_, right_strides_, d_strides_;  // of every group
  std::unique_ptr<Memory> workspace_;
  Gemm gemm_;
};

}  // namespace milora::bench
