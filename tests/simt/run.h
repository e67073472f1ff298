// What the drivers of tests/simt share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/dtype.h"

namespace simt {

template <class F>
void with_type(milora::Dtype dtype, const F& f) {
  switch (dtype) {
    case milora::Dtype::kFloat32:
      return f(static_cast<float*>(nullptr));
    case milora::Dtype::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case milora::Dtype::kFloat16:
      return f(static_cast<__half*>(nullptr));
  }
}

// Memory that vector loads may touch.
inline Range range(const void* begin, int64_t bytes) {
  const auto* at = static_cast<const char*>(begin);
  return {at, at + bytes};
}

}  // namespace simt
