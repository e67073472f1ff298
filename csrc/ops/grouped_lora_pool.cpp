// milora::grouped_lora_: y[s][t] += g (scale B C (rg * A x[t]) + u y[s][t] + v), weights in the
// pool.
#include <algorithm>
#include <cstring>
#include <string>

#include "common/cuda_runtime.h"
#include "common/macros.h"
#include "kernels/grouped_lora/cpu.h"
#include "kernels/grouped_lora/decode/decode.h"
#include "kernels/grouped_lora/prefill.h"
#include "kernels/grouped_lora/tasks.h"
#include "ops/ops.h"
#include "ops/pool_params.h"

namespace milora {
namespace {

constexpr const char* kOp = "grouped_lora_";

struct Scratch {
  LoraSchedule plan;
  LoraTasks tasks;
  std::vector<float> hidden;
};

void run_cpu(const GroupedLoraPoolParams& params) {
  // Kept between calls: a decode step makes hundreds of them, and then none allocates.
  static thread_local Scratch kept;
  auto& [plan, tasks, hidden] = kept;
  schedule(params, &plan);
  if (plan.jobs.empty()) return;
  if (static_cast<int64_t>(hidden.size()) < plan.hidden_size) hidden.resize(plan.hidden_size);

  LoraWork work{};
  work.jobs = plan.jobs.data();
  work.rows = plan.rows.data();
  work.row_gates = plan.row_gates.data();
  work.hidden = hidden.data();
  work.rank_gates = params.rank_gates;
  work.num_slices = params.num_slices;
  work.max_rank = params.max_rank;
  work.x = params.x;
  work.x_stride = params.x_stride;
  work.d_in = params.d_in;
  for (int64_t s = 0; s < params.num_slices; ++s) {
    work.y[s] = work.out[s] = params.y[s];
    work.y_stride[s] = work.out_stride[s] = params.y_stride[s];
  }
  work.dtype = params.dtype;

  const int64_t threads = tasks.cut(plan, work.d_in, work.dtype, num_threads());
  // By reference: in the other threads the name `kept` would mean theirs.
  run_on_threads(threads, [&work, shared = &tasks] { shared->run(work); });
}

// What a call's addresses must keep to; the GPU and the dtype are checked once (check_path).
void check_wgmma_rows(GroupedLoraPoolParams* p) {
  check_rows_on_16(kOp, "x", p->x, p->num_tokens, &p->x_stride);
  for (int64_t s = 0; s < p->num_slices; ++s) {
    check_rows_on_16(kOp, "y", p->y[s], p->num_tokens, &p->y_stride[s]);
  }
}

void check_path(const char* op, const Tensor& x, int64_t path) {
  check(path >= kDecodePath && path <= kPrefillWgmmaPath, op,
        "path must be 0 (decode), 1 (prefill) or 2 (prefill by wgmma), got ", path);
  if (path == kPrefillWgmmaPath && x.is_cuda()) check_wgmma(op, x, "take path 1 (prefill)");
}

// On the current device, which is this one, and stream. The workspace goes back to torch's
// allocator at once: what takes it next is queued on the same stream.
int launch_cuda(GroupedLoraPoolParams p, int64_t path, int32_t device, void* stream) {
  if (path == kPrefillWgmmaPath) check_wgmma_rows(&p);
  const int64_t bytes =
      path == kDecodePath ? grouped_lora_decode_workspace(p) : grouped_lora_prefill_workspace(p);
  std::optional<Tensor> workspace;
  void* memory = nullptr;
  if (bytes > 0) {
    using torch::headeronly::DeviceType;
    workspace = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt,
                                     torch::stable::Device(DeviceType::CUDA, device));
    memory = workspace->mutable_data_ptr();
  }
  switch (path) {
    case kDecodePath:
      return grouped_lora_decode_cuda(p, memory, stream);
    case kPrefillPath:
      return grouped_lora_prefill_cuda(p, memory, stream);
    default:
      return grouped_lora_prefill_wgmma_cuda(p, memory, stream);
  }
}

constexpr int32_t kCpu = -1;

// `device`: a GPU's index, or kCpu, where the path does not matter.
void run(const GroupedLoraPoolParams& p, int64_t path, int32_t device) {
  if (p.num_tokens == 0 || p.num_adapters == 0) return;
  if (device == kCpu) {
    run_cpu(p);
  } else {
    run_cuda(kOp, device, [&](void* stream) { return launch_cuda(p, path, device, stream); });
  }
}

int32_t device_index(const Tensor& x) { return x.is_cuda() ? x.get_device_index() : kCpu; }

// What grouped_lora_prepare leaves for milora_grouped_lora_run.
struct Prepared {
  GroupedLoraPoolParams params;
  int64_t path;
  int32_t device;
};

void set_rank_gates(const Tensor& rank_gates, const Tensor& x, GroupedLoraPoolParams* p) {
  check_dtype(kOp, "rank_gates", rank_gates, ScalarType::Float);
  check_shape(kOp, "rank_gates", rank_gates, {p->num_tokens, p->num_slices, -1},
              "[num_tokens, num_slices, max_rank]");
  check_same_device(kOp, "rank_gates", rank_gates, x);
  check_contiguous(kOp, "rank_gates", rank_gates);
  p->max_rank = rank_gates.size(2);
  check(p->max_rank >= 1 && p->max_rank <= kMaxRank, kOp, "rank_gates must have 1 to ", kMaxRank,
        " columns, got ", p->max_rank);
  p->rank_gates = static_cast<const float*>(rank_gates.const_data_ptr());
}

}  // namespace

void grouped_lora_pool(const Tensors& y, const Tensor& x, const Tensor& pool, const Tensor& offsets,
                       const Tensor& ranks, const Tensor& scales, const Tensor& gates,
                       const Tensor& route_of, const Tensor& adapter_of,
                       const std::vector<int64_t>& experts, int64_t path,
                       const std::optional<Tensor>& rank_gates) {
  GroupedLoraPoolParams p =
      pool_params(kOp, y, x, pool, offsets, ranks, scales, gates, route_of, adapter_of, experts);
  check_path(kOp, x, path);
  if (rank_gates.has_value()) set_rank_gates(*rank_gates, x, &p);
  run(p, path, device_index(x));
}

Tensor grouped_lora_prepare(const Tensors& y, const Tensor& x, const Tensor& pool,
                            const Tensor& offsets, const Tensor& ranks, const Tensor& scales,
                            const Tensor& gates, const Tensor& route_of, const Tensor& adapter_of,
                            const std::vector<int64_t>& experts, int64_t path) {
  constexpr const char* kPrepare = "grouped_lora_prepare";
  check_path(kPrepare, x, path);
  const Prepared prepared{pool_params(kPrepare, y, x, pool, offsets, ranks, scales, gates, route_of,
                                      adapter_of, experts),
                          path, device_index(x)};
  Tensor out = torch::stable::empty({static_cast<int64_t>(sizeof prepared)}, ScalarType::Byte);
  std::memcpy(out.mutable_data_ptr(), &prepared, sizeof prepared);
  return out;
}

}  // namespace milora

// Runs what grouped_lora_prepare has checked, on other tensors of the same shapes and device, on
// torch's current stream. `tensors`: the addresses of x and of each y. Python calls it with ctypes
// (milora/prepared.py). Returns null, or the error, which lives until the next one.
MILORA_EXPORT const char* milora_grouped_lora_run(const void* prepared, void* const* tensors) {
  static thread_local std::string message;
  try {
    milora::Prepared call;
    std::memcpy(&call, prepared, sizeof call);
    call.params.x = tensors[0];
    std::copy_n(tensors + 1, call.params.num_slices, call.params.y);
    milora::run(call.params, call.path, call.device);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
