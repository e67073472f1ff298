// milora::prompt_router, its form for weights in the adapter pool, and the backward.
#include <memory>

#include "common/cuda_runtime.h"
#include "kernels/prompt_router/cpu.h"
#include "kernels/prompt_router/cuda.h"
#include "kernels/prompt_router/weights.h"
#include "ops/ops.h"

namespace milora {
namespace {

constexpr int64_t kParallelElements = 16 * 1024;

struct Table {
  const char* name;
  const Tensor& tensor;
  ScalarType type;
};

void check_tables(const char* op, const Tensor& h, std::initializer_list<Table> tables) {
  const DeviceId device = device_of(h);
  for (const Table& table : tables) {
    check_dtype(op, table.name, table.tensor, table.type);
    check_same_device(op, table.name, table.tensor, device);
    check_contiguous(op, table.name, table.tensor);
  }
}

// What both forms of the op share: prompts, and per router its codes.
PromptRouterParams prompt_params(const char* op, const Tensor& h, const Tensor& spans,
                                 const Tensor& router_of, const Tensor& codes,
                                 int64_t num_experts) {
  PromptRouterParams p{};
  p.dtype = float_dtype(op, "h", h);
  check_shape(op, "h", h, {-1, -1}, "[num_tokens, d]");
  p.num_tokens = h.size(0);
  p.d = h.size(1);
  check(p.d >= 1, op, "d must be at least 1, got 0");
  check(num_experts >= 1 && num_experts <= kMaxExperts, op, "num_experts must be in [1, ",
        kMaxExperts, "], got ", num_experts);
  p.num_experts = num_experts;
  check_shape(op, "router_of", router_of, {-1}, "[num_prompts]");
  p.num_prompts = router_of.size(0);
  check_shape(op, "spans", spans, {p.num_prompts, 2}, "[num_prompts, 2]");
  check_shape(op, "codes", codes, {-1, kNumCodes}, "[num_routers, 6]");
  p.num_routers = codes.size(0);
  check_tables(op, h,
               {{"spans", spans, ScalarType::Int},
                {"router_of", router_of, ScalarType::Int},
                {"codes", codes, ScalarType::Int}});
  p.h = h.const_data_ptr();
  p.h_stride = row_stride(op, "h", h);
  p.spans = static_cast<const int32_t*>(spans.const_data_ptr());
  p.router_of = static_cast<const int32_t*>(router_of.const_data_ptr());
  p.codes = static_cast<const RouterCodes*>(codes.const_data_ptr());
  return p;
}

PromptRouterParams make_params(const char* op, const Tensor& h, const Tensor& spans,
                               const Tensor& router_of, const Tensor& w_sa, const Tensor& w_r,
                               const Tensor& coef, const Tensor& codes) {
  check_shape(op, "w_r", w_r, {-1, -1, -1}, "[num_routers, num_experts, d]");
  PromptRouterParams p = prompt_params(op, h, spans, router_of, codes, w_r.size(1));
  check_shape(op, "w_r", w_r, {p.num_routers, p.num_experts, p.d}, "[num_routers, num_experts, d]");
  check_shape(op, "w_sa", w_sa, {p.num_routers, p.d}, "[num_routers, d]");
  check_shape(op, "coef", coef, {p.num_routers, kNumCoefs}, "[num_routers, 12]");
  check_tables(op, h,
               {{"w_sa", w_sa, ScalarType::Float},
                {"w_r", w_r, ScalarType::Float},
                {"coef", coef, ScalarType::Float}});
  p.w_sa = static_cast<const float*>(w_sa.const_data_ptr());
  p.w_r = static_cast<const float*>(w_r.const_data_ptr());
  p.coef = static_cast<const float*>(coef.const_data_ptr());
  return p;
}

PromptRouterParams make_pool_params(const char* op, const Tensor& h, const Tensor& spans,
                                    const Tensor& router_of, const Tensor& pool,
                                    const Tensor& offsets, const Tensor& codes,
                                    int64_t num_experts) {
  PromptRouterParams p = prompt_params(op, h, spans, router_of, codes, num_experts);
  check_shape(op, "pool", pool, {-1}, "[pool_bytes]");
  check_shape(op, "offsets", offsets, {p.num_routers, 3}, "[num_routers, 3]");
  check_tables(op, h, {{"pool", pool, ScalarType::Byte}, {"offsets", offsets, ScalarType::Long}});
  p.pool = static_cast<const uint8_t*>(pool.const_data_ptr());
  p.pool_bytes = pool.size(0);
  p.offsets = static_cast<const int64_t*>(offsets.const_data_ptr());
  check(reinterpret_cast<uintptr_t>(p.pool) % 16 == 0, op,
        "pool must start on 16 bytes, got an address that does not");
  return p;
}

// Two prompts that share a token would race for its gradient.
void check_disjoint(const char* op, const PromptRouterParams& p) {
  std::vector<std::pair<int32_t, int32_t>> spans;
  for (int64_t i = 0; i < p.num_prompts; ++i) {
    if (p.spans[2 * i] < p.spans[2 * i + 1]) {
      spans.emplace_back(p.spans[2 * i], p.spans[2 * i + 1]);
    }
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i) {
    check(spans[i - 1].second <= spans[i].first, op, "spans must not overlap, got [",
          spans[i - 1].first, ", ", spans[i - 1].second, ") and [", spans[i].first, ", ",
          spans[i].second, ")");
  }
}

void check_codes(const char* op, const PromptRouterParams& p, int64_t router) {
  const RouterCodes& codes = p.codes[router];
  const auto code = [&](const char* name, int32_t value, int32_t low, int64_t high) {
    check(value >= low && value <= high, op, "codes: ", name, " must be in [", low, ", ", high,
          "], got ", value, " for router ", router);
  };
  code("pooler", static_cast<int32_t>(codes.pooler), 0, 3);
  code("activation", static_cast<int32_t>(codes.activation), 0, 2);
  code("norm", static_cast<int32_t>(codes.norm), 0, 1);
  code("gate", static_cast<int32_t>(codes.gate), 0, 2);
  code("num_experts", codes.num_experts, 1, p.num_experts);
  code("top_k", codes.top_k, 1, codes.num_experts);
  if (p.offsets == nullptr) return;
  constexpr const char* kNames[] = {"w_sa", "W_r", "coef"};
  for (int i = 0; i < 3; ++i) {
    const int64_t offset = p.offsets[3 * router + i], bytes = router_bytes(p, codes, i);
    check(bytes == 0 || inside_pool(p, offset, bytes), op, "offsets must place ", kNames[i],
          " of router ", router, " on 16 bytes inside the pool of ", p.pool_bytes, " bytes, got ",
          offset, " + ", bytes);
  }
}

// Values of CPU tensors; on a GPU reading them would stop the stream. Only routers in use count: a
// free slot of a pool holds anything.
void check_values(const char* op, const PromptRouterParams& p) {
  for (int64_t i = 0; i < p.num_prompts; ++i) {
    const int32_t begin = p.spans[2 * i], end = p.spans[2 * i + 1];
    check(0 <= begin && begin <= end && end <= p.num_tokens, op, "spans must lie in [0, ",
          p.num_tokens, "], got [", begin, ", ", end, ") for prompt ", i);
    check(p.router_of[i] >= -1 && p.router_of[i] < p.num_routers, op, "router_of must be in [-1, ",
          p.num_routers, "), got ", p.router_of[i], " for prompt ", i);
    if (p.router_of[i] >= 0) check_codes(op, p, p.router_of[i]);
  }
  check_disjoint(op, p);
}

struct ChunkPlan {
  std::vector<RouterChunk> chunks;
  std::vector<int32_t> first_chunk;
};

ChunkPlan cut_chunks(const PromptRouterParams& p) {
  ChunkPlan plan;
  plan.first_chunk.push_back(0);
  for (int64_t i = 0; i < p.num_prompts; ++i) {
    const int32_t end = p.spans[2 * i + 1];
    for (int32_t t = p.spans[2 * i]; t < end && p.router_of[i] >= 0; t += kRouterChunk) {
      plan.chunks.push_back({static_cast<int32_t>(i), t, std::min(t + kRouterChunk, end)});
    }
    plan.first_chunk.push_back(static_cast<int32_t>(plan.chunks.size()));
  }
  return plan;
}

void run_cpu(const char* op, const PromptRouterParams& p) {
  check_values(op, p);
  const ChunkPlan plan = cut_chunks(p);
  const auto num_chunks = static_cast<int64_t>(plan.chunks.size());
  const std::unique_ptr<float[]> scratch(new float[num_chunks * (p.d + 2)]);
  RouterWork work{p,
                  plan.chunks.data(),
                  plan.first_chunk.data(),
                  scratch.get(),
                  scratch.get() + num_chunks,
                  scratch.get() + 2 * num_chunks};
  const PromptRouterCpu& kernels = prompt_router_cpu();
  const bool parallel = p.num_tokens * p.d > kParallelElements;
  run_tasks(num_chunks, parallel, [&](int64_t i) { kernels.pool(work, i, i + 1); });
  run_tasks(p.num_prompts, parallel, [&](int64_t i) { kernels.head(work, i, i + 1); });
}

void run_cpu_backward(const char* op, const PromptRouterBackwardParams& params) {
  const PromptRouterParams& p = params.forward;
  check_values(op, p);
  const ChunkPlan plan = cut_chunks(p);
  const auto num_chunks = static_cast<int64_t>(plan.chunks.size());
  std::vector<float> prompt_scratch(p.num_prompts * (2 * p.d + p.num_experts + kNumCoefs));
  std::vector<float> token_scratch(2 * p.num_tokens + num_chunks * p.d);
  std::vector<int32_t> argmax(p.num_prompts * p.d);

  RouterBackwardWork work{};
  work.p = params;
  work.chunks = plan.chunks.data();
  work.first_chunk = plan.first_chunk.data();
  work.dvector = prompt_scratch.data();
  work.activated = work.dvector + p.num_prompts * p.d;
  work.dlogits = work.activated + p.num_prompts * p.d;
  work.dcoef = work.dlogits + p.num_prompts * p.num_experts;
  work.scores = token_scratch.data();
  work.dots = work.scores + p.num_tokens;
  work.dw_sa = work.dots + p.num_tokens;
  work.argmax = argmax.data();

  const PromptRouterCpu& kernels = prompt_router_cpu();
  const bool parallel = p.num_tokens * p.d > kParallelElements;
  const auto run = [&](int64_t count, auto kernel) {
    run_tasks(count, parallel, [&](int64_t i) { kernel(work, i, i + 1); });
  };
  run(p.num_prompts, kernels.head_backward);
  run(num_chunks, kernels.dots);
  run(p.num_prompts, kernels.weights);
  run(num_chunks, kernels.scatter);
  run(p.num_routers, kernels.combine);
}

// Allocates the outputs and computes them on h's device.
std::tuple<Tensor, Tensor, Tensor> run(const char* op, const Tensor& h, PromptRouterParams p) {
  const auto empty = [&](int64_t columns) {
    return torch::stable::new_empty(h, {p.num_prompts, columns}, ScalarType::Float);
  };
  Tensor probs = empty(p.num_experts), gates = empty(p.num_experts), pooled = empty(p.d);
  if (p.num_prompts == 0) return {probs, gates, pooled};
  p.probs = static_cast<float*>(probs.mutable_data_ptr());
  p.gates = static_cast<float*>(gates.mutable_data_ptr());
  p.pooled = static_cast<float*>(pooled.mutable_data_ptr());
  if (h.is_cuda()) {
    Tensor scratch = torch::stable::new_empty(h, {prompt_router_cuda_scratch(p)}, ScalarType::Byte);
    run_cuda(op, h.get_device_index(), [&](void* stream) {
      return prompt_router_cuda(p, scratch.mutable_data_ptr(), stream);
    });
  } else {
    run_cpu(op, p);
  }
  return {probs, gates, pooled};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> prompt_router(const Tensor& h, const Tensor& spans,
                                                 const Tensor& router_of, const Tensor& w_sa,
                                                 const Tensor& w_r, const Tensor& coef,
                                                 const Tensor& codes) {
  constexpr const char* kOp = "prompt_router";
  return run(kOp, h, make_params(kOp, h, spans, router_of, w_sa, w_r, coef, codes));
}

std::tuple<Tensor, Tensor, Tensor> prompt_router_pool(const Tensor& h, const Tensor& spans,
                                                      const Tensor& router_of, const Tensor& pool,
                                                      const Tensor& offsets, const Tensor& codes,
                                                      int64_t num_experts) {
  constexpr const char* kOp = "prompt_router_pool";
  return run(kOp, h, make_pool_params(kOp, h, spans, router_of, pool, offsets, codes, num_experts));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prompt_router_backward(
    const Tensor& dprobs, const Tensor& dgates, const Tensor& dpooled, const Tensor& h,
    const Tensor& spans, const Tensor& router_of, const Tensor& w_sa, const Tensor& w_r,
    const Tensor& coef, const Tensor& codes, const Tensor& probs, const Tensor& pooled) {
  constexpr const char* kOp = "prompt_router_backward";
  PromptRouterBackwardParams p{};
  p.forward = make_params(kOp, h, spans, router_of, w_sa, w_r, coef, codes);
  const PromptRouterParams& f = p.forward;
  const std::pair<const char*, const Tensor*> per_expert[] = {
      {"dprobs", &dprobs}, {"dgates", &dgates}, {"probs", &probs}};
  const std::pair<const char*, const Tensor*> per_column[] = {{"dpooled", &dpooled},
                                                              {"pooled", &pooled}};
  for (const auto& [name, tensor] : per_expert) {
    check_shape(kOp, name, *tensor, {f.num_prompts, f.num_experts}, "[num_prompts, num_experts]");
  }
  for (const auto& [name, tensor] : per_column) {
    check_shape(kOp, name, *tensor, {f.num_prompts, f.d}, "[num_prompts, d]");
  }
  for (const Tensor* tensor : {&dprobs, &dgates, &dpooled, &probs, &pooled}) {
    check_dtype(kOp, "gradients, probs and pooled", *tensor, ScalarType::Float);
    check_contiguous(kOp, "gradients, probs and pooled", *tensor);
    check_same_device(kOp, "gradients, probs and pooled", *tensor, h);
  }
  Tensor dh = torch::stable::new_zeros(h, {f.num_tokens, f.d});
  Tensor dw_sa = torch::stable::new_zeros(w_sa, {f.num_routers, f.d});
  Tensor dw_r = torch::stable::new_zeros(w_r, {f.num_routers, f.num_experts, f.d});
  Tensor dcoef = torch::stable::new_zeros(coef, {f.num_routers, kNumCoefs});
  if (f.num_prompts > 0) {
    p.forward.probs = static_cast<float*>(probs.data_ptr());
    p.forward.pooled = static_cast<float*>(pooled.data_ptr());
    p.dprobs = static_cast<const float*>(dprobs.const_data_ptr());
    p.dgates = static_cast<const float*>(dgates.const_data_ptr());
    p.dpooled = static_cast<const float*>(dpooled.const_data_ptr());
    p.dh = dh.mutable_data_ptr();
    p.dw_sa = static_cast<float*>(dw_sa.mutable_data_ptr());
    p.dw_r = static_cast<float*>(dw_r.mutable_data_ptr());
    p.dcoef = static_cast<float*>(dcoef.mutable_data_ptr());
    if (h.is_cuda()) {
      Tensor scratch =
          torch::stable::new_empty(h, {prompt_router_backward_cuda_scratch(f)}, ScalarType::Byte);
      run_cuda(kOp, h.get_device_index(), [&](void* stream) {
        return prompt_router_backward_cuda(p, scratch.mutable_data_ptr(), stream);
      });
    } else {
      run_cpu_backward(kOp, p);
    }
  }
  return {dh, dw_sa, dw_r, dcoef};
}

}  // namespace milora
