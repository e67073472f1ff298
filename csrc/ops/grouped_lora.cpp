// milora::grouped_lora, its in-place form and its backward: y[t] + g scale B A x[t], weights as
// tensors.
#include <cstring>
#include <memory>

#include "common/cuda_runtime.h"
#include "kernels/grouped_lora/cpu.h"
#include "kernels/grouped_lora/cuda.h"
#include "kernels/grouped_lora/tasks.h"
#include "ops/ops.h"

namespace milora {
namespace {

constexpr int64_t kColsPerUnit = 256;
constexpr int64_t kTokensPerUnit = 64;
constexpr int64_t kMinReduceCols = 64, kMaxReduceCols = 256;
constexpr int64_t kParallelWork = 64 * 1024;  // multiply-adds that one thread does sooner alone

// Host-side table of the adapters, checked.
std::vector<LoraWeights> weight_table(const char* op, const Tensor& x, const Tensors& a,
                                      const Tensors& b, const std::vector<double>& scales,
                                      int64_t d_in, int64_t d_out) {
  check(a.size() == b.size() && a.size() == scales.size(), op,
        "a, b and scales must have one entry per adapter, got ", a.size(), ", ", b.size(), " and ",
        scales.size());
  std::vector<LoraWeights> table(a.size());
  for (size_t i = 0; i < a.size(); ++i) {
    check_shape(op, "a", a[i], {-1, d_in}, "[rank, d_in]");
    const int64_t rank = a[i].size(0);
    check(rank >= 1 && rank <= kMaxRank, op, "rank must be in [1, ", kMaxRank, "], got ", rank,
          " for adapter ", i);
    check_shape(op, "b", b[i], {d_out, rank}, "[d_out, rank]");
    check_dtype(op, "a", a[i], x.scalar_type());
    check_dtype(op, "b", b[i], x.scalar_type());
    check_contiguous(op, "a", a[i]);
    check_contiguous(op, "b", b[i]);
    check_same_device(op, "a", a[i], x);
    check_same_device(op, "b", b[i], x);
    table[i] = {a[i].const_data_ptr(), b[i].const_data_ptr(), static_cast<int32_t>(rank),
                static_cast<float>(scales[i])};
  }
  return table;
}

void check_routes(const char* op, const Tensor& x, const Tensor& gates, const Tensor& route_of,
                  const Tensor& adapter_of) {
  check_dtype(op, "gates", gates, ScalarType::Float);
  check_dtype(op, "route_of", route_of, ScalarType::Int);
  check_dtype(op, "adapter_of", adapter_of, ScalarType::Int);
  check_shape(op, "gates", gates, {-1}, "[num_routes]");
  check_shape(op, "route_of", route_of, {x.size(0)}, "[num_tokens]");
  check_shape(op, "adapter_of", adapter_of, {gates.size(0)}, "[num_routes]");
  const std::pair<const char*, const Tensor*> tables[] = {
      {"gates", &gates}, {"route_of", &route_of}, {"adapter_of", &adapter_of}};
  for (const auto& [name, table] : tables) {
    check_same_device(op, name, *table, x);
    check_contiguous(op, name, *table);
  }
}

// Jobs of one slice with Bt in scratch; rows with gate 0 are left out.
struct TrainPlan {
  LoraSchedule schedule;
  std::vector<char> bt;
  int64_t work = 0;  // multiply-adds of the shrink
};

void make_plan(const char* op, const LoraWeights* adapters, int64_t num_adapters,
               const float* gates, int64_t num_routes, const int32_t* route_of,
               const int32_t* adapter_of, int64_t num_tokens, int64_t d_in, int64_t d_out,
               Dtype dtype, TrainPlan* plan) {
  const int64_t item = element_size(dtype);
  LoraGroups grouped;
  group_tokens(op, route_of, adapter_of, num_tokens, num_routes, num_adapters, &grouped);
  LoraSchedule& out = plan->schedule;
  int64_t bt_size = 0;
  for (const LoraGroup& group : grouped.groups) {
    const auto row_begin = static_cast<int64_t>(out.rows.size());
    for (int64_t i = group.begin; i < group.end; ++i) {
      const int32_t token = grouped.tokens[i];
      const float gate = gates[route_of[token]];
      if (gate == 0.0f) continue;
      out.rows.push_back(token);
      out.row_gates.push_back(gate);
    }
    const auto num_rows = static_cast<int64_t>(out.rows.size()) - row_begin;
    if (num_rows == 0) continue;
    const LoraWeights& weights = adapters[group.adapter];
    LoraJob job{};
    job.a = weights.a;
    job.a_stride = d_in;
    job.bt_stride = d_out;
    job.d_out = d_out;
    job.scale = weights.scale;
    job.rank = weights.rank;
    job.adapter = group.adapter;
    job.row_begin = row_begin;
    job.num_rows = num_rows;
    job.hidden_begin = out.hidden_size;
    out.hidden_size += num_rows * job.rank;
    plan->work += num_rows * job.rank * d_in;
    bt_size += job.rank * d_out * item;
    out.jobs.push_back(job);
  }
  plan->bt.resize(bt_size);
  char* bt = plan->bt.data();
  for (LoraJob& job : out.jobs) {
    job.bt = bt;
    bt += job.rank * d_out * item;
  }
}

void transpose_weights(const TrainPlan& plan, const LoraWeights* adapters, Dtype dtype,
                       int64_t d_out) {
  const GroupedLoraCpu& kernels = grouped_lora_cpu();
  const auto& jobs = plan.schedule.jobs;
  const int64_t pieces = (d_out + kColsPerUnit - 1) / kColsPerUnit;
  run_tasks(static_cast<int64_t>(jobs.size()) * pieces, plan.work > kParallelWork, [&](int64_t i) {
    const LoraJob& job = jobs[i / pieces];
    const int64_t begin = i % pieces * kColsPerUnit;
    kernels.transpose_b(adapters[job.adapter].b, dtype, job.rank, d_out, begin,
                        std::min(begin + kColsPerUnit, d_out), const_cast<void*>(job.bt));
  });
}

std::vector<LoraUnit> cut(const std::vector<LoraJob>& jobs, int64_t row_step, int64_t extent,
                          int64_t step) {
  std::vector<LoraUnit> units;
  for (size_t j = 0; j < jobs.size(); ++j) {
    const int64_t rows = jobs[j].num_rows;
    const int64_t stride = row_step > 0 ? row_step : rows;
    for (int64_t r = 0; r < rows; r += stride) {
      for (int64_t c = 0; c < extent; c += step) {
        units.push_back({static_cast<int32_t>(j), static_cast<int32_t>(r),
                         static_cast<int32_t>(std::min(r + stride, rows)), static_cast<int32_t>(c),
                         static_cast<int32_t>(std::min(c + step, extent))});
      }
    }
  }
  return units;
}

// Rows that no adapter changes: a copy of y.
void copy_idle_rows(const TrainPlan& plan, const GroupedLoraParams& p) {
  if (static_cast<int64_t>(plan.schedule.rows.size()) == p.num_tokens) return;
  std::vector<char> active(p.num_tokens, 0);
  for (int32_t token : plan.schedule.rows) active[token] = 1;
  const int64_t item = element_size(p.dtype);
  const int64_t units = (p.num_tokens + kTokensPerUnit - 1) / kTokensPerUnit;
  run_tasks(units, p.num_tokens * p.d_out > kParallelWork, [&](int64_t i) {
    const int64_t end = std::min((i + 1) * kTokensPerUnit, p.num_tokens);
    for (int64_t t = i * kTokensPerUnit; t < end; ++t) {
      if (active[t]) continue;
      std::memcpy(static_cast<char*>(p.out) + t * p.d_out * item,
                  static_cast<const char*>(p.y) + t * p.y_stride * item, p.d_out * item);
    }
  });
}

void run_cpu(const char* op, const GroupedLoraParams& p) {
  TrainPlan plan;
  make_plan(op, p.adapters, p.num_adapters, p.gates, p.num_routes, p.route_of, p.adapter_of,
            p.num_tokens, p.d_in, p.d_out, p.dtype, &plan);
  if (p.out != p.y) copy_idle_rows(plan, p);
  transpose_weights(plan, p.adapters, p.dtype, p.d_out);
  std::vector<float> hidden(plan.schedule.hidden_size);

  LoraWork work{};
  work.jobs = plan.schedule.jobs.data();
  work.rows = plan.schedule.rows.data();
  work.row_gates = plan.schedule.row_gates.data();
  work.hidden = hidden.data();
  work.x = p.x;
  work.x_stride = p.x_stride;
  work.d_in = p.d_in;
  work.y[0] = p.y;
  work.out[0] = p.out;
  work.y_stride[0] = p.y_stride;
  work.out_stride[0] = p.d_out;
  work.dtype = p.dtype;

  LoraTasks tasks;
  const int64_t threads = tasks.cut(plan.schedule, p.d_in, p.dtype, num_threads());
  run_on_threads(threads, [&] { tasks.run(work); });
}

void run_cpu_backward(const char* op, const GroupedLoraBackwardParams& p) {
  TrainPlan plan;
  make_plan(op, p.adapters, p.num_adapters, p.gates, p.num_routes, p.route_of, p.adapter_of,
            p.num_tokens, p.d_in, p.d_out, p.dtype, &plan);
  transpose_weights(plan, p.adapters, p.dtype, p.d_out);
  const auto& jobs = plan.schedule.jobs;
  // One allocation for the coefficients and the gates' row sums.
  const int64_t size = plan.schedule.hidden_size;
  const auto num_rows = static_cast<int64_t>(plan.schedule.rows.size());
  const std::unique_ptr<float[]> scratch(new float[3 * size + num_rows]);

  LoraBackwardWork work{};
  work.jobs = jobs.data();
  work.rows = plan.schedule.rows.data();
  work.row_gates = plan.schedule.row_gates.data();
  work.dx_coefs = scratch.get();
  work.da_coefs = work.dx_coefs + size;
  work.db_coefs = work.da_coefs + size;
  work.row_dots = work.db_coefs + size;
  work.x = p.x;
  work.dy = p.dy;
  work.x_stride = p.x_stride;
  work.dy_stride = p.dy_stride;
  work.d_in = p.d_in;
  work.d_out = p.d_out;
  work.dx = p.dx;
  work.grads = p.grads;
  work.dtype = p.dtype;
  work.need_hidden = p.grads != nullptr || p.dgates != nullptr;

  const GroupedLoraCpu& kernels = grouped_lora_cpu();
  const bool parallel = plan.work > kParallelWork;
  const std::vector<LoraUnit> row_units = cut(jobs, kBackwardRows, 1, 1);
  run_tasks(static_cast<int64_t>(row_units.size()), parallel,
            [&](int64_t i) { kernels.backward_rows(work, row_units[i]); });

  // The rest in any order; wide pieces of columns suit the memory, narrow ones many threads.
  struct Piece {
    decltype(kernels.backward_dx) kernel;
    std::vector<LoraUnit> units;
  };
  const auto reduce_cols = [](int64_t d) {
    const int64_t share = d / (3 * num_threads()) / kMinReduceCols * kMinReduceCols;
    return std::clamp(share, kMinReduceCols, kMaxReduceCols);
  };
  std::vector<Piece> pieces;
  if (p.grads != nullptr) {
    pieces.push_back({kernels.backward_da, cut(jobs, 0, p.d_in, reduce_cols(p.d_in))});
    pieces.push_back({kernels.backward_db, cut(jobs, 0, p.d_out, reduce_cols(p.d_out))});
  }
  if (p.dx != nullptr) {
    pieces.push_back({kernels.backward_dx, cut(jobs, kUnitRows, p.d_in, p.d_in)});
  }
  std::vector<std::pair<decltype(kernels.backward_dx), const LoraUnit*>> tasks;
  for (const Piece& piece : pieces) {
    for (const LoraUnit& unit : piece.units) tasks.emplace_back(piece.kernel, &unit);
  }
  run_tasks(static_cast<int64_t>(tasks.size()), parallel,
            [&](int64_t i) { tasks[i].first(work, *tasks[i].second); });
  if (p.dgates != nullptr) {
    std::vector<double> sums(p.num_routes, 0.0);
    for (size_t i = 0; i < plan.schedule.rows.size(); ++i) {
      sums[p.route_of[plan.schedule.rows[i]]] += work.row_dots[i];
    }
    std::copy(sums.begin(), sums.end(), p.dgates);
  }
}

}  // namespace

namespace {

// Checks and runs both forms; `out` may be y.
void run_grouped_lora(const char* op, const Tensor& y, const Tensor& x, const Tensors& a,
                      const Tensors& b, const std::vector<double>& scales, const Tensor& gates,
                      const Tensor& route_of, const Tensor& adapter_of, const Tensor& out) {
  GroupedLoraParams p{};
  p.dtype = float_dtype(op, "x", x);
  check_shape(op, "x", x, {-1, -1}, "[num_tokens, d_in]");
  check(x.size(1) >= 1, op, "d_in must be at least 1, got 0");
  check_dtype(op, "y", y, x.scalar_type());
  check_shape(op, "y", y, {x.size(0), -1}, "[num_tokens, d_out]");
  check_same_device(op, "y", y, x);
  check_routes(op, x, gates, route_of, adapter_of);
  p.num_tokens = x.size(0);
  p.d_in = x.size(1);
  p.d_out = y.size(1);
  p.num_routes = gates.size(0);
  p.num_adapters = static_cast<int64_t>(a.size());
  const std::vector<LoraWeights> table = weight_table(op, x, a, b, scales, p.d_in, p.d_out);
  if (y.numel() == 0) return;
  p.y = y.const_data_ptr();
  p.y_stride = row_stride(op, "y", y);
  p.out = out.mutable_data_ptr();
  p.x = x.const_data_ptr();
  p.x_stride = row_stride(op, "x", x);
  p.adapters = table.data();
  p.gates = static_cast<const float*>(gates.const_data_ptr());
  p.route_of = static_cast<const int32_t*>(route_of.const_data_ptr());
  p.adapter_of = static_cast<const int32_t*>(adapter_of.const_data_ptr());
  if (x.is_cuda()) {
    const int64_t bytes = grouped_lora_cuda_scratch(p);
    Tensor scratch = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
    run_cuda(op, x.get_device_index(), [&](void* stream) {
      return grouped_lora_cuda(p, scratch.mutable_data_ptr(), stream);
    });
  } else {
    run_cpu(op, p);
  }
}

// Where the gradient of `of` goes: a contiguous tensor like it.
void* gradient(const char* op, const char* name, const Tensor& grad, const Tensor& of) {
  check_dtype(op, name, grad, of.scalar_type());
  if (of.dim() == 1) check_shape(op, name, grad, {of.size(0)}, "[num_routes]");
  if (of.dim() == 2) check_shape(op, name, grad, {of.size(0), of.size(1)}, "as its input");
  check_same_device(op, name, grad, of);
  check_contiguous(op, name, grad);
  return grad.mutable_data_ptr();
}

}  // namespace

Tensor grouped_lora(const Tensor& y, const Tensor& x, const Tensors& a, const Tensors& b,
                    const std::vector<double>& scales, const Tensor& gates, const Tensor& route_of,
                    const Tensor& adapter_of) {
  constexpr const char* kOp = "grouped_lora";
  check_shape(kOp, "y", y, {-1, -1}, "[num_tokens, d_out]");
  Tensor out = torch::stable::new_empty(y, {y.size(0), y.size(1)});
  run_grouped_lora(kOp, y, x, a, b, scales, gates, route_of, adapter_of, out);
  return out;
}

void grouped_lora_add(const Tensor& y, const Tensor& x, const Tensors& a, const Tensors& b,
                      const std::vector<double>& scales, const Tensor& gates,
                      const Tensor& route_of, const Tensor& adapter_of) {
  constexpr const char* kOp = "grouped_lora_add_";
  check_contiguous(kOp, "y", y);
  run_grouped_lora(kOp, y, x, a, b, scales, gates, route_of, adapter_of, y);
}

void grouped_lora_backward(const Tensor& dy, const Tensor& x, const Tensors& a, const Tensors& b,
                           const std::vector<double>& scales, const Tensor& gates,
                           const Tensor& route_of, const Tensor& adapter_of,
                           const std::optional<Tensor>& dx, const Tensors& da, const Tensors& db,
                           const std::optional<Tensor>& dgates) {
  constexpr const char* kOp = "grouped_lora_backward_";
  GroupedLoraBackwardParams p{};
  p.dtype = float_dtype(kOp, "x", x);
  check_shape(kOp, "x", x, {-1, -1}, "[num_tokens, d_in]");
  check(x.size(1) >= 1, kOp, "d_in must be at least 1, got 0");
  check_dtype(kOp, "dy", dy, x.scalar_type());
  check_shape(kOp, "dy", dy, {x.size(0), -1}, "[num_tokens, d_out]");
  check_same_device(kOp, "dy", dy, x);
  check_routes(kOp, x, gates, route_of, adapter_of);
  p.num_tokens = x.size(0);
  p.d_in = x.size(1);
  p.d_out = dy.size(1);
  p.num_routes = gates.size(0);
  p.num_adapters = static_cast<int64_t>(a.size());
  const std::vector<LoraWeights> table = weight_table(kOp, x, a, b, scales, p.d_in, p.d_out);

  if (dx) p.dx = gradient(kOp, "dx", *dx, x);
  if (dgates) p.dgates = static_cast<float*>(gradient(kOp, "dgates", *dgates, gates));
  check(da.size() == db.size() && (da.empty() || da.size() == a.size()), kOp,
        "da and db must have one entry per adapter or none, got ", da.size(), " and ", db.size());
  std::vector<LoraGrads> grads;
  for (size_t i = 0; i < da.size(); ++i) {
    grads.push_back({gradient(kOp, "da", da[i], a[i]), gradient(kOp, "db", db[i], b[i])});
  }
  p.grads = grads.empty() ? nullptr : grads.data();
  if (p.num_tokens == 0 || p.num_adapters == 0) return;

  p.dy = dy.const_data_ptr();
  p.dy_stride = row_stride(kOp, "dy", dy);
  p.x = x.const_data_ptr();
  p.x_stride = row_stride(kOp, "x", x);
  p.adapters = table.data();
  p.gates = static_cast<const float*>(gates.const_data_ptr());
  p.route_of = static_cast<const int32_t*>(route_of.const_data_ptr());
  p.adapter_of = static_cast<const int32_t*>(adapter_of.const_data_ptr());
  if (x.is_cuda()) {
    const int64_t bytes = grouped_lora_backward_cuda_scratch(p);
    Tensor scratch = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
    run_cuda(kOp, x.get_device_index(), [&](void* stream) {
      return grouped_lora_backward_cuda(p, scratch.mutable_data_ptr(), stream);
    });
  } else {
    run_cpu_backward(kOp, p);
  }
}

}  // namespace milora
