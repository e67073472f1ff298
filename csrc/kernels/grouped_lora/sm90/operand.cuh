// Tiles in shared memory as wgmma names them.
#pragma once

#include "kernels/cuda/wgmma.cuh"

namespace milora {

// A wgmma operand of 16-bit elements in rows of 128 bytes under the 128-byte swizzle (piece ^ row %
// 8 of eight 16-byte pieces, rows counted from 1024 bytes). In bytes: `group` from eight rows to
// the next eight; `across`, for operands whose rows run along M or N, from 64 of these to the
// next 64.
__device__ __forceinline__ uint64_t operand(const void* at, uint32_t group, uint32_t across) {
  return static_cast<uint64_t>((shared_address(at) & 0x3ffff) >> 4) |
         static_cast<uint64_t>(across >> 4) << 16 | static_cast<uint64_t>(group >> 4) << 32 |
         static_cast<uint64_t>(1) << 62;
}

}  // namespace milora
