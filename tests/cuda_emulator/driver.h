// What the drivers share: how a call of a kernel finds memory, and what it may read of it.
#pragma once

#include <initializer_list>

#include "common/dtype.h"
#include "common/macros.h"
#include "kernels/grouped_lora/params.h"
#include "launch.h"

namespace milora::emulator {

// A workspace: on 256 bytes, full of NaN.
class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(bytes), memory_(bytes + 256, 0xff) {}
  void* data() { return memory_.data() + (-reinterpret_cast<uintptr_t>(memory_.data()) % 256); }
  Range range() { return {data(), bytes_}; }

 private:
  int64_t bytes_;
  std::vector<uint8_t> memory_;
};

// A tensor [num_rows, width].
inline Range rows(const void* data, int64_t num_rows, int64_t stride, int64_t width, Dtype dtype) {
  return {data, num_rows > 0 ? ((num_rows - 1) * stride + width) * element_size(dtype) : 0};
}

// Before the launches of a call.
inline void start(int order, std::vector<Range> readable) {
  machine.order = order;
  machine.readable = std::move(readable);
}
inline void start(int order, const GroupedLoraPoolParams& p,
                  std::initializer_list<Range> workspaces = {}) {
  std::vector<Range> readable(workspaces);
  readable.push_back({p.pool, p.pool_bytes});
  readable.push_back(rows(p.x, p.num_tokens, p.x_stride, p.d_in, p.dtype));
  for (int s = 0; s < p.num_slices; ++s) {
    readable.push_back(rows(p.y[s], p.num_tokens, p.y_stride[s], p.d_out[s], p.dtype));
  }
  start(order, std::move(readable));
}

}  // namespace milora::emulator
