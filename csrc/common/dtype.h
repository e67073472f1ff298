// Element types of activations and weights, without any torch header.
#pragma once

#include <cstdint>

namespace milora {

enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Storage-only 16-bit floats: kernels convert them to float32 and back, never compute in them.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Row stride, in elements, of a matrix in the adapter pool: rows start on 16 bytes so that a
// vector load or a bulk copy may begin at each of them.
inline int64_t pool_row_stride(int64_t d, Dtype dtype) {
  const int64_t size = element_size(dtype);
  return (d * size + 15) / 16 * 16 / size;
}

}  // namespace milora
