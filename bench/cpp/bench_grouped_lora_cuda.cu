// Times the CUDA kernels of grouped_lora_ (decode, prefill) and fused_lora, without Python and
// torch; prefill in both forms and beside CUTLASS's grouped GEMM. One adapter per request; weights
// rotate over copies that no cache holds. "base" is a copy of as many bytes: adapters, x, and y
// read and written.
#include <cmath>
#include <cstdio>

#include "common/check.h"
#include "cuda_harness.h"
#include "cutlass_grouped.h"
#include "kernels/grouped_lora/decode/decode.h"
#include "kernels/grouped_lora/decode/plan.h"
#include "kernels/grouped_lora/fused.h"
#include "kernels/grouped_lora/prefill.h"
#include "kernels/grouped_lora/sm90/device.h"

namespace milora::bench {
namespace {

constexpr int64_t kSize = 2;  // bytes of bf16

enum class Path { kDecode, kPrefill, kFused };

struct Case {
  Path path;
  int64_t batch, tokens, d_in, d_out, rank;
  int64_t slices = 1;  // modules that read the same x
};

const char* kernel_of(const Case& c) {
  if (c.path == Path::kFused) return "fused_lora";
  if (c.path == Path::kPrefill) return "prefill";
  return MILORA_DECODE_BY_CLUSTERS(gpu().capability / 10) ? "decode_cluster" : "decode_split";
}

std::string name_of(const Case& c) {
  const std::string name = std::string(kernel_of(c)) + " b" + std::to_string(c.batch) + "x" +
                           std::to_string(c.tokens) + " r" + std::to_string(c.rank) + " " +
                           std::to_string(c.d_in) + "-" + std::to_string(c.d_out);
  return c.slices == 1 ? name : name + " x" + std::to_string(c.slices);
}

// In the pool: copies x adapters x slices of A, then Bt.
class Problem {
 public:
  Problem(const Case& c, const Options& options)
      : c_(c),
        expert_(c.rank * (c.d_in + c.d_out) * kSize),
        weights_(c.batch * c.slices * expert_),
        copies_(num_copies(weights_, options)),
        pool_(copies_ * weights_),
        x_(num_tokens() * c.d_in * kSize),
        y_(num_tokens() * c.d_out * c.slices * kSize),
        w_(c.path == Path::kFused ? c.d_in * c.d_out * kSize : 0) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(c.d_in));
    pool_.random_bf16(1, scale);
    x_.random_bf16(2, 1);
    y_.random_bf16(3, 1);
    w_.random_bf16(4, scale);
    std::vector<int64_t> offsets;
    for (int64_t i = 0; i < copies_ * c.batch * c.slices; ++i) {
      const int64_t a = i * expert_;
      offsets.insert(offsets.end(), {a, a + c.rank * c.d_in * kSize, -1, -1, -1});
    }
    std::vector<int32_t> adapter_of, route_of;
    for (int64_t row = 0; row < c.batch; ++row) {
      adapter_of.push_back(static_cast<int32_t>(row));
      route_of.insert(route_of.end(), c.tokens, static_cast<int32_t>(row));
    }
    const int64_t experts = c.batch * c.slices;
    offsets_.put(offsets);
    ranks_.put(std::vector<int32_t>(experts, static_cast<int32_t>(c.rank)));
    ones_.put(std::vector<float>(experts, 1.0f));
    adapter_of_.put(adapter_of);
    route_of_.put(route_of);
  }

  int64_t num_tokens() const { return c_.batch * c_.tokens; }
  int copies() const { return copies_; }

  int64_t bytes() const {
    const int64_t reads_y = c_.path == Path::kFused ? 1 : 2;
    return weights_ + x_.bytes() + reads_y * y_.bytes() + w_.bytes();
  }
  int64_t flops() const {
    const int64_t update = c_.rank * c_.slices * (c_.d_in + c_.d_out);
    return 2 * num_tokens() * (update + (c_.path == Path::kFused ? c_.d_in * c_.d_out : 0));
  }

  int launch(int turn, cudaStream_t stream, bool by_wgmma = false) {
    const GroupedLoraPoolParams p = params(turn);
    if (c_.path == Path::kFused) {
      FusedLoraParams f{};
      f.lora = p;
      f.w = w_.at();
      f.w_stride = c_.d_in;
      return fused_lora_cuda(f, scratch_.of(fused_lora_workspace(f)), stream);
    }
    if (c_.path == Path::kPrefill) {
      void* space = scratch_.of(grouped_lora_prefill_workspace(p));
      return by_wgmma ? grouped_lora_prefill_wgmma_cuda(p, space, stream)
                      : grouped_lora_prefill_cuda(p, space, stream);
    }
    return grouped_lora_decode_cuda(p, scratch_.of(grouped_lora_decode_workspace(p)), stream);
  }

  // The two products of a prefill with this turn's weights, one group per request and slice.
  GroupedProducts shrink_products(int turn, const Memory& hidden) const {
    GroupedProducts p = empty_products(c_.rank, c_.d_in);
    p.lda = p.ldb = c_.d_in;
    p.ldd = c_.rank;
    for (int64_t g = 0; g < groups(); ++g) {
      p.a.push_back(x_.at(g / c_.slices * c_.tokens * c_.d_in * kSize));
      p.b.push_back(pool_.at(turn * weights_ + g * expert_));
      p.d.push_back(hidden.at(g * c_.tokens * c_.rank * kSize));
    }
    return p;
  }
  GroupedProducts expand_products(int turn, const Memory& hidden) const {
    GroupedProducts p = empty_products(c_.d_out, c_.rank);
    p.accumulate = true;
    p.lda = c_.rank;
    p.ldb = c_.d_out;
    p.ldd = c_.slices * c_.d_out;
    for (int64_t g = 0; g < groups(); ++g) {
      const int64_t request = g / c_.slices, slice = g % c_.slices;
      p.a.push_back(hidden.at(g * c_.tokens * c_.rank * kSize));
      p.b.push_back(pool_.at(turn * weights_ + g * expert_ + c_.rank * c_.d_in * kSize));
      p.d.push_back(y_.at((request * c_.tokens * c_.slices + slice) * c_.d_out * kSize));
    }
    return p;
  }
  int64_t hidden_bytes() const { return groups() * c_.tokens * c_.rank * kSize; }

  // The first row's first outputs in double.
  void check_result(const std::string& provider, const Launch& launch) const {
    const int64_t outs = 64;
    const std::vector<float> before = y_.bf16(0, outs), x = x_.bf16(0, c_.d_in);
    const std::vector<float> a = pool_.bf16(0, c_.rank * c_.d_in);
    const std::vector<float> bt = pool_.bf16(c_.rank * c_.d_in * kSize, c_.rank * c_.d_out);
    check_cuda(launch(0, nullptr), "the kernel's launch");
    check_cuda(cudaDeviceSynchronize(), "the kernel");
    const std::vector<float> got = y_.bf16(0, outs);
    std::vector<double> hidden(c_.rank);
    for (int64_t r = 0; r < c_.rank; ++r) {
      for (int64_t i = 0; i < c_.d_in; ++i) {
        hidden[r] += static_cast<double>(a[r * c_.d_in + i]) * x[i];
      }
    }
    for (int64_t j = 0; j < outs; ++j) {
      double want = c_.path == Path::kFused ? 0 : before[j];
      if (c_.path == Path::kFused) {
        const std::vector<float> w = w_.bf16(j * c_.d_in * kSize, c_.d_in);
        for (int64_t i = 0; i < c_.d_in; ++i) want += static_cast<double>(w[i]) * x[i];
      }
      for (int64_t r = 0; r < c_.rank; ++r) want += hidden[r] * bt[r * c_.d_out + j];
      check(std::abs(got[j] - want) <= 0.02 * (1 + std::abs(want)), "bench_grouped_lora_cuda",
            name_of(c_), " by ", provider, " gives ", got[j], " where ", want, " is right");
    }
  }

 private:
  int64_t groups() const { return c_.batch * c_.slices; }

  GroupedProducts empty_products(int64_t n, int64_t k) const {
    GroupedProducts p{};
    p.m = static_cast<int>(c_.tokens);
    p.n = static_cast<int>(n);
    p.k = static_cast<int>(k);
    return p;
  }

  GroupedLoraPoolParams params(int turn) const {
    GroupedLoraPoolParams p{};
    for (int64_t s = 0; s < c_.slices; ++s) {
      p.y[s] = y_.at(s * c_.d_out * kSize);
      p.y_stride[s] = c_.slices * c_.d_out;
      p.d_out[s] = c_.d_out;
      p.expert[s] = static_cast<int32_t>(s);
    }
    p.x = x_.at();
    p.x_stride = p.d_in = c_.d_in;
    p.pool = pool_.at<uint8_t>();
    p.pool_bytes = pool_.bytes();
    p.offsets = offsets_.at<int64_t>() + turn * c_.batch * c_.slices * kNumParts;
    p.ranks = ranks_.at<int32_t>();
    p.scales = p.gates = ones_.at<float>();
    p.route_of = route_of_.at<int32_t>();
    p.adapter_of = adapter_of_.at<int32_t>();
    p.num_tokens = num_tokens();
    p.num_routes = p.num_adapters = c_.batch;
    p.num_experts = p.num_slices = c_.slices;
    p.dtype = Dtype::kBFloat16;
    return p;
  }

  Case c_;
  int64_t expert_, weights_;
  int copies_;
  Memory pool_, x_, y_, w_;
  Memory offsets_{copies_ * c_.batch * c_.slices * kNumParts * 8}, ranks_{c_.batch * c_.slices * 4};
  Memory ones_{c_.batch * c_.slices * 4}, adapter_of_{c_.batch * 4}, route_of_{num_tokens() * 4};
  Scratch scratch_;
};

// ---- CUTLASS ----------------------------------------------------------------------------------

struct Rival {
  const char* name;
  bool hopper;                       // needs compute capability 9.0, else 8.0 and newer
  MakeGroupedGemm *shrink, *expand;  // null: not compiled
};

#ifdef MILORA_CUTLASS_SM90
#define MILORA_SM90_ONLY(function) function
#else
#define MILORA_SM90_ONLY(function) nullptr
#endif
const Rival kRivals[] = {
    {"cutlass_sm80", false, cutlass_sm80_shrink, cutlass_sm80_expand},
    {"cutlass_sm90", true, MILORA_SM90_ONLY(cutlass_sm90_shrink),
     MILORA_SM90_ONLY(cutlass_sm90_expand)},
    {"cutlass_sm90_swapped", true, MILORA_SM90_ONLY(cutlass_sm90_swapped_shrink),
     MILORA_SM90_ONLY(cutlass_sm90_swapped_expand)},
};
#undef MILORA_SM90_ONLY

// Both products for each copy of the weights; all share the hidden values, as turns take turns.
class CutlassPrefill {
 public:
  CutlassPrefill(const Rival& rival, const Problem& problem) : hidden_(problem.hidden_bytes()) {
    check(!rival.hopper || gpu().capability == 90, rival.name, "needs compute capability 9.0, got ",
          gpu().capability);
    check(rival.shrink != nullptr, rival.name, "was not built: sm_90a is not in the architectures");
    for (int turn = 0; turn < problem.copies(); ++turn) {
      shrink_.push_back(rival.shrink(problem.shrink_products(turn, hidden_)));
      expand_.push_back(rival.expand(problem.expand_products(turn, hidden_)));
    }
  }

  int launch(int turn, cudaStream_t stream) {
    const int error = shrink_[turn]->run(stream);
    return error == cudaSuccess ? expand_[turn]->run(stream) : error;
  }

 private:
  Memory hidden_;  // bf16, [requests, slices, tokens, rank]
  std::vector<std::unique_ptr<GroupedGemm>> shrink_, expand_;
};

// ---- cases ------------------------------------------------------------------------------------

std::vector<Case> cases_of(const Options& options) {
  if (options.quick) {
    return {{Path::kDecode, 4, 1, 1024, 1024, 32},
            {Path::kPrefill, 4, 64, 1024, 1024, 32},
            {Path::kFused, 4, 64, 1024, 1024, 32}};
  }
  std::vector<Case> cases;
  for (int64_t batch : {1, 8, 32, 64, 256}) {
    cases.push_back({Path::kDecode, batch, 1, 4096, 4096, 32});
  }
  for (int64_t rank : {8, 128, 256}) cases.push_back({Path::kDecode, 64, 1, 4096, 4096, rank});
  cases.push_back({Path::kDecode, 64, 1, 4096, 4096, 32, 3});   // q, k, v
  cases.push_back({Path::kDecode, 64, 1, 4096, 11008, 32, 2});  // gate, up
  cases.push_back({Path::kDecode, 64, 1, 11008, 4096, 32});
  for (const Path path : {Path::kPrefill, Path::kFused}) {
    cases.push_back({path, 8, 512, 4096, 4096, 32});
    cases.push_back({path, 8, 512, 4096, 11008, 32});
    cases.push_back({path, 8, 512, 11008, 4096, 32});
  }
  cases.push_back({Path::kPrefill, 8, 512, 4096, 4096, 32, 3});
  cases.push_back({Path::kPrefill, 64, 64, 4096, 4096, 32});
  cases.push_back({Path::kPrefill, 128, 16, 4096, 4096, 32});
  for (int64_t rank : {64, 128, 256}) {
    cases.push_back({Path::kPrefill, 8, 512, 4096, 4096, rank});
  }
  cases.push_back({Path::kPrefill, 8, 512, 4096, 4096, 64, 3});
  return cases;
}

void measure(const Case& c, const Options& options, Report* report) {
  Problem problem(c, options);
  const Result result = {kernel_of(c),
                         name_of(c),
                         problem.bytes(),
                         problem.flops(),
                         {{"rank", c.rank}, {"batch", c.batch}}};
  std::vector<Provider> providers = {
      {"milora", [&](int turn, cudaStream_t stream) { return problem.launch(turn, stream); }}};
  problem.check_result("milora", providers[0].launch);
  if (c.path == Path::kPrefill) {
    if (has_wgmma(0)) {
      const Launch by_wgmma = [&](int turn, cudaStream_t stream) {
        return problem.launch(turn, stream, true);
      };
      problem.check_result("wgmma", by_wgmma);
      providers.push_back({"wgmma", by_wgmma});
    } else {
      report->absent(result, "wgmma", "needs compute capability 9.0");
    }
    for (const Rival& rival : kRivals) {
      try {
        const auto made = std::make_shared<CutlassPrefill>(rival, problem);
        const Launch launch = [made](int turn, cudaStream_t stream) {
          return made->launch(turn, stream);
        };
        problem.check_result(rival.name, launch);
        providers.push_back({rival.name, launch});
      } catch (const std::exception& error) {  // a rival that cannot run does not end our bench
        report->absent(result, rival.name, error.what());
      }
    }
  }
  report->time(result, problem.copies(), providers);
}

void run(const Options& options) {
  Report report(options, "grouped_lora_cuda");
  for (const Case& c : cases_of(options)) {
    if (c.path == Path::kFused && !has_wgmma(0)) {
      std::printf("%-44s absent: needs compute capability 9.0\n", name_of(c).c_str());
      continue;
    }
    measure(c, options, &report);
  }
}

}  // namespace
}  // namespace milora::bench

int main(int argc, char** argv) {
  return milora::bench::run_bench(argc, argv, "grouped_lora", milora::bench::run);
}
