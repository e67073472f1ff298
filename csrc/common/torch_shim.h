// Everything that ops need from torch, through its stable ABI: one library serves torch 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <vector>

#include "common/check.h"
#include "common/dtype.h"

namespace milora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(ScalarType type) { return torch::headeronly::toString(type); }

inline Dtype float_dtype(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      fail(op, name, " must be float32, bfloat16 or float16, got ",
           dtype_name(tensor.scalar_type()));
  }
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType type) {
  check(tensor.scalar_type() == type, op, name, " must be ", dtype_name(type), ", got ",
        dtype_name(tensor.scalar_type()));
}

struct Shape {
  const Tensor& tensor;
};
inline std::ostream& operator<<(std::ostream& stream, const Shape& shape) {
  stream << '[';
  for (int64_t i = 0; i < shape.tensor.dim(); ++i) {
    stream << (i > 0 ? ", " : "") << shape.tensor.size(i);
  }
  return stream << ']';
}

// `what` is the shape law, e.g. "[num_tokens, 64]"; a size of -1 leaves that dimension free.
inline void check_shape(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> sizes, const char* what) {
  const auto actual = tensor.sizes();
  bool same = actual.size() == sizes.size();
  size_t i = 0;
  for (int64_t size : sizes) {
    same = same && (size < 0 || actual[i] == size);
    ++i;
  }
  if (same) [[likely]]
    return;
  std::ostringstream wanted;
  for (int64_t size : sizes) {
    wanted << (wanted.tellp() > 0 ? ", " : "") << (size < 0 ? "any" : std::to_string(size));
  }
  fail(op, name, " must be ", what, " = [", wanted.str(), "], got ", Shape{tensor});
}

// Where a tensor lies. Asked once per call for the first tensor: each question goes through the
// stable ABI, and a decode step asks hundreds.
struct DeviceId {
  int32_t type, index;
  bool operator==(const DeviceId&) const = default;
};
inline DeviceId device_of(const Tensor& tensor) {
  DeviceId device{};
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
  return device;
}
inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const DeviceId& device) {
  check(device_of(tensor) == device, op, name,
        " must be on the device of the first tensor, got another one");
}
inline void check_same_device(const char* op, const char* name, const Tensor& tensor,
                              const Tensor& like) {
  check_same_device(op, name, tensor, device_of(like));
}

// Rows may be strided; a row itself is one run.
inline int64_t row_stride(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.size(1) <= 1 || tensor.stride(1) == 1, op, name,
        " must be contiguous in its last dimension, got stride ", tensor.stride(1));
  return tensor.size(0) <= 1 ? tensor.size(1) : tensor.stride(0);
}

// A tensor as rows of its last dimension: 2-D with rows at any stride, or contiguous with any other
// number of dimensions, whose leading ones then count together.
struct Rows {
  int64_t count, width, stride;
};
inline Rows rows_of(const char* op, const char* name, const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  if (dim == 2) return {tensor.size(0), tensor.size(1), row_stride(op, name, tensor)};
  check(dim >= 1, op, name, " must have at least one dimension, got a scalar");
  check(tensor.is_contiguous(), op, name,
        " must be contiguous if it has not two dimensions, got strides that are not, for ",
        Shape{tensor});
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < dim; ++i) count *= tensor.size(i);
  return {count, tensor.size(dim - 1), tensor.size(dim - 1)};
}

inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.is_contiguous(), op, name, " must be contiguous, got strides that are not");
}

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

// Calls body() on `threads` threads at once; bodies share out the work among themselves.
template <class Body>
inline void run_on_threads(int64_t threads, const Body& body) {
  if (threads <= 1) {
    body();
    return;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { body(); });
}

// Runs task(i) for i in [0, count), each on some thread; `parallel` false keeps to this one. Tasks
// are handed out one by one, since adapters differ in rank and rows: a static split would wait for
// the slowest.
template <class Task>
inline void run_tasks(int64_t count, bool parallel, const Task& task) {
  const int64_t threads = parallel ? std::min<int64_t>(count, num_threads()) : 1;
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  run_on_threads(threads, [&] {
    for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      task(i);
    }
  });
}

}  // namespace milora
