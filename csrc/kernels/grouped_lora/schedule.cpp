#include "kernels/grouped_lora/schedule.h"

#include <algorithm>

#include "common/check.h"

namespace milora {
namespace {

constexpr const char* kOp = "grouped_lora_";

struct Run {
  int32_t adapter;
  int32_t begin, end;
};

const uint8_t* resolve(const GroupedLoraPoolParams& params, const char* what, int32_t adapter,
                       int32_t expert, int64_t offset, int64_t bytes) {
  check(offset >= 0 && offset % 16 == 0 && bytes <= params.pool_bytes &&
            offset <= params.pool_bytes - bytes,
        kOp, "offsets must place ", what, " of adapter ", adapter, ", expert ", expert,
        " on 16 bytes inside the pool of ", params.pool_bytes, " bytes, got ", offset, " + ",
        bytes);
  return params.pool + offset;
}

}  // namespace

void LoraSchedule::clear() {
  jobs.clear();
  rows.clear();
  row_gates.clear();
  hidden_size = 0;
}

void group_tokens(const char* op, const int32_t* route_of, const int32_t* adapter_of,
                  int64_t num_tokens, int64_t num_routes, int64_t num_adapters, LoraGroups* out) {
  static thread_local std::vector<Run> runs;
  runs.clear();
  for (int64_t begin = 0; begin < num_tokens;) {
    const int32_t route = route_of[begin];
    int64_t end = begin + 1;
    while (end < num_tokens && route_of[end] == route) ++end;
    check(route >= -1 && route < num_routes, op, "route_of must be in [-1, ", num_routes, "), got ",
          route, " for token ", begin);
    const int32_t adapter = route < 0 ? -1 : adapter_of[route];
    check(adapter >= -1 && adapter < num_adapters, op, "adapter_of must be in [-1, ", num_adapters,
          "), got ", adapter, " for route ", route);
    if (adapter >= 0) {
      runs.push_back({adapter, static_cast<int32_t>(begin), static_cast<int32_t>(end)});
    }
    begin = end;
  }
  // Not std::stable_sort, which allocates.
  std::sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) {
    return a.adapter != b.adapter ? a.adapter < b.adapter : a.begin < b.begin;
  });
  out->groups.clear();
  out->tokens.clear();
  for (const Run& run : runs) {
    const auto size = static_cast<int64_t>(out->tokens.size());
    if (out->groups.empty() || out->groups.back().adapter != run.adapter) {
      out->groups.push_back({run.adapter, size, size});
    }
    for (int32_t t = run.begin; t < run.end; ++t) out->tokens.push_back(t);
    out->groups.back().end = static_cast<int64_t>(out->tokens.size());
  }
}

void schedule(const GroupedLoraPoolParams& params, LoraSchedule* out) {
  static thread_local LoraGroups grouped;
  group_tokens(kOp, params.route_of, params.adapter_of, params.num_tokens, params.num_routes,
               params.num_adapters, &grouped);
  out->clear();
  const int64_t item = element_size(params.dtype);
  for (const LoraGroup& group : grouped.groups) {
    for (int64_t s = 0; s < params.num_slices; ++s) {
      const int32_t expert = params.expert[s];
      const int64_t entry = group.adapter * params.num_experts + expert;
      const int32_t rank = params.ranks[entry];
      check(rank >= 0 && rank <= kMaxRank, kOp, "ranks must be in [0, ", kMaxRank, "], got ", rank,
            " for adapter ", group.adapter, ", expert ", expert);
      check(rank <= most_ranks(params), kOp, "rank_gates must have a column for each rank (", rank,
            " for adapter ", group.adapter, ", expert ", expert, "), got ", params.max_rank);
      const auto row_begin = static_cast<int64_t>(out->rows.size());
      if (rank > 0) {
        for (int64_t i = group.begin; i < group.end; ++i) {
          const int32_t token = grouped.tokens[i];
          const float gate = params.gates[params.route_of[token] * params.num_experts + expert];
          if (gate == 0.0f) continue;
          out->rows.push_back(token);
          out->row_gates.push_back(gate);
        }
      }
      const auto num_rows = static_cast<int64_t>(out->rows.size()) - row_begin;
      if (num_rows == 0) continue;

      const int64_t* offset = offsets_at(params, entry);
      const int64_t d_out = params.d_out[s];
      LoraJob job{};
      job.a_stride = pool_row_stride(params.d_in, params.dtype);
      job.bt_stride = pool_row_stride(d_out, params.dtype);
      const int64_t a_bytes = rank * job.a_stride * item;
      const int64_t bt_bytes = rank * job.bt_stride * item;
      job.a = resolve(params, "A", group.adapter, expert, offset[kPartA], a_bytes);
      job.bt = resolve(params, "Bt", group.adapter, expert, offset[kPartBt], bt_bytes);
      const auto vector_at = [&](const char* what, int64_t at) {
        if (at < 0) return static_cast<const float*>(nullptr);
        return reinterpret_cast<const float*>(
            resolve(params, what, group.adapter, expert, at, d_out * 4));
      };
      job.u = vector_at("u", offset[kPartU]);
      job.v = vector_at("v", offset[kPartV]);
      if (offset[kPartCore] >= 0) {
        job.core_stride = pool_row_stride(rank, params.dtype);
        job.core = resolve(params, "the core", group.adapter, expert, offset[kPartCore],
                           rank * job.core_stride * item);
      }
      job.scale = params.scales[entry];
      job.rank = rank;
      job.d_out = d_out;
      job.slice = static_cast<int32_t>(s);
      job.adapter = group.adapter;
      job.row_begin = row_begin;
      job.num_rows = num_rows;
      job.hidden_begin = out->hidden_size;
      out->hidden_size += num_rows * rank;
      out->jobs.push_back(job);
    }
  }
}

}  // namespace milora
