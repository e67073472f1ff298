// csrc/kernels/grouped_lora/sm90/tensor_map.h for the emulator's drivers.
#pragma once

#include <cuda.h>

#include "launch.h"

namespace milora::emulator {

inline CUtensorMap tensor_map(const void* data, int64_t rows, int64_t columns, int64_t stride,
                              int box_rows) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || stride % 8 != 0) {
    die("a tensor map needs rows on 16 bytes");
  }
  return {static_cast<const uint8_t*>(data), rows, columns, stride * 2, box_rows};
}

}  // namespace milora::emulator
