// milora::grouped_lora_: y[s][t] += g (scale B A x[t] + u y[s][t] + v), weights read from the pool.
#include "common/cuda_runtime.h"
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

// On the current device and stream. The workspace goes back to torch's allocator at once: what
// takes it next is queued on the same stream.
int launch_cuda(const GroupedLoraPoolParams& p, int64_t path, const Tensor& x, void* stream) {
  const bool decode = path == kDecodePath;
  const int64_t bytes =
      decode ? grouped_lora_decode_workspace(p) : grouped_lora_prefill_workspace(p);
  const Tensor workspace = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  void* memory = workspace.mutable_data_ptr();
  return decode ? grouped_lora_decode_cuda(p, memory, stream)
                : grouped_lora_prefill_cuda(p, memory, stream);
}

}  // namespace

void grouped_lora_pool(const Tensors& y, const Tensor& x, const Tensor& pool, const Tensor& offsets,
                       const Tensor& ranks, const Tensor& scales, const Tensor& gates,
                       const Tensor& route_of, const Tensor& adapter_of,
                       const std::vector<int64_t>& experts, int64_t path) {
  const GroupedLoraPoolParams p =
      pool_params(kOp, y, x, pool, offsets, ranks, scales, gates, route_of, adapter_of, experts);
  check(path == kDecodePath || path == kPrefillPath, kOp,
        "path must be 0 (decode) or 1 (prefill), got ", path);
  if (p.num_tokens == 0 || p.num_adapters == 0) return;
  if (x.is_cuda()) {
    run_cuda(kOp, x, [&](void* stream) { return launch_cuda(p, path, x, stream); });
  } else {
    run_cpu(p);
  }
}

}  // namespace milora
