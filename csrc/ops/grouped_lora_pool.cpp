// milora::grouped_lora_: y[s][t] += g (scale B A x[t] + u y[s][t] + v), weights read from the pool.
#include "common/cuda_runtime.h"
#include "kernels/grouped_lora/cpu.h"
#include "kernels/grouped_lora/decode/decode.h"
#include "kernels/grouped_lora/prefill.h"
#include "kernels/grouped_lora/tasks.h"
#include "ops/ops.h"

namespace milora {
namespace {

constexpr const char* kOp = "grouped_lora_";

void check_tables(const GroupedLoraPoolParams& p, const Tensor& x, const Tensor& pool,
                  const Tensor& offsets, const Tensor& ranks, const Tensor& scales,
                  const Tensor& gates, const Tensor& route_of, const Tensor& adapter_of) {
  check_dtype(kOp, "pool", pool, ScalarType::Byte);
  check_dtype(kOp, "offsets", offsets, ScalarType::Long);
  check_dtype(kOp, "ranks", ranks, ScalarType::Int);
  check_dtype(kOp, "scales", scales, ScalarType::Float);
  check_dtype(kOp, "gates", gates, ScalarType::Float);
  check_dtype(kOp, "route_of", route_of, ScalarType::Int);
  check_dtype(kOp, "adapter_of", adapter_of, ScalarType::Int);
  check_shape(kOp, "pool", pool, {-1}, "[pool_bytes]");
  check_shape(kOp, "offsets", offsets, {-1, -1, 4}, "[num_adapters, num_experts, 4]");
  check_shape(kOp, "ranks", ranks, {p.num_adapters, p.num_experts}, "[num_adapters, num_experts]");
  check_shape(kOp, "scales", scales, {p.num_adapters, p.num_experts},
              "[num_adapters, num_experts]");
  check_shape(kOp, "gates", gates, {-1, p.num_experts}, "[num_routes, num_experts]");
  check_shape(kOp, "route_of", route_of, {p.num_tokens}, "[num_tokens]");
  check_shape(kOp, "adapter_of", adapter_of, {gates.size(0)}, "[num_routes]");
  const std::pair<const char*, const Tensor*> tables[] = {
      {"pool", &pool},   {"offsets", &offsets},   {"ranks", &ranks},          {"scales", &scales},
      {"gates", &gates}, {"route_of", &route_of}, {"adapter_of", &adapter_of}};
  const DeviceId device = device_of(x);
  for (const auto& [name, table] : tables) {
    check_same_device(kOp, name, *table, device);
    check_contiguous(kOp, name, *table);
  }
  check(reinterpret_cast<uintptr_t>(pool.const_data_ptr()) % 16 == 0, kOp,
        "pool must start on 16 bytes, got an address that does not");
}

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
  GroupedLoraPoolParams p{};
  p.num_slices = static_cast<int64_t>(y.size());
  check(p.num_slices >= 1 && p.num_slices <= kMaxSlices, kOp, "y must have 1 to ", kMaxSlices,
        " slices, got ", p.num_slices);
  check(path == kDecodePath || path == kPrefillPath, kOp,
        "path must be 0 (decode) or 1 (prefill), got ", path);
  check(experts.size() == y.size(), kOp, "experts must have one column per slice (", p.num_slices,
        "), got ", experts.size());
  p.dtype = float_dtype(kOp, "x", x);
  const Rows x_rows = rows_of(kOp, "x", x);
  check(x_rows.width >= 1, kOp, "d_in must be at least 1, got 0");
  check(offsets.dim() == 3, kOp, "offsets must be [num_adapters, num_experts, 4], got ",
        Shape{offsets});
  p.num_tokens = x_rows.count;
  p.d_in = x_rows.width;
  p.num_adapters = offsets.size(0);
  p.num_experts = offsets.size(1);
  check_tables(p, x, pool, offsets, ranks, scales, gates, route_of, adapter_of);
  p.num_routes = gates.size(0);
  for (int64_t s = 0; s < p.num_slices; ++s) {
    check_dtype(kOp, "y", y[s], x.scalar_type());
    const Rows y_rows = rows_of(kOp, "y", y[s]);
    check(y_rows.count == p.num_tokens, kOp, "y must have one row per token of x (", p.num_tokens,
          "), got ", Shape{y[s]});
    check_same_device(kOp, "y", y[s], x);
    check(experts[s] >= 0 && experts[s] < p.num_experts, kOp, "experts must be in [0, ",
          p.num_experts, "), got ", experts[s]);
    p.y[s] = y[s].mutable_data_ptr();
    p.y_stride[s] = y_rows.stride;
    p.d_out[s] = y_rows.width;
    p.expert[s] = static_cast<int32_t>(experts[s]);
  }
  p.x = x.const_data_ptr();
  p.x_stride = x_rows.stride;
  p.pool = static_cast<const uint8_t*>(pool.const_data_ptr());
  p.pool_bytes = pool.size(0);
  p.offsets = static_cast<const int64_t*>(offsets.const_data_ptr());
  p.ranks = static_cast<const int32_t*>(ranks.const_data_ptr());
  p.scales = static_cast<const float*>(scales.const_data_ptr());
  p.gates = static_cast<const float*>(gates.const_data_ptr());
  p.route_of = static_cast<const int32_t*>(route_of.const_data_ptr());
  p.adapter_of = static_cast<const int32_t*>(adapter_of.const_data_ptr());

  if (p.num_tokens == 0 || p.num_adapters == 0) return;
  if (x.is_cuda()) {
    run_cuda(kOp, x, [&](void* stream) { return launch_cuda(p, path, x, stream); });
  } else {
    run_cpu(p);
  }
}

}  // namespace milora
