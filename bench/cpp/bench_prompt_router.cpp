// Times the CPU kernels of prompt_router, one router per prompt, as one read of the hidden states
// ("base") would take with the same threads. Hidden states rotate over copies that no cache holds.
#include <cmath>

#include "common/check.h"
#include "harness.h"
#include "kernels/prompt_router/cpu.h"

namespace milora::bench {
namespace {

constexpr int64_t kExperts = 7;

struct Case {
  int64_t prompts, tokens, d;
};

std::string name_of(const Case& c) {
  return "forward " + std::to_string(c.prompts) + "x" + std::to_string(c.tokens) + " d" +
         std::to_string(c.d);
}

class Problem {
 public:
  Problem(const Case& c, Dtype dtype, Workers& workers) : c_(c), dtype_(dtype), workers_(workers) {
    bytes_ = c.prompts * c.tokens * c.d * element_size(dtype);
    copies_ = std::min<int64_t>(64, 1 + 2 * last_cache_bytes() / bytes_);
    h_ = random_values(copies_ * bytes_ / element_size(dtype), dtype, 1, 1);
    const float divisor = std::sqrt(static_cast<float>(c.d));
    w_sa_ = random_values(c.prompts * c.d, Dtype::kFloat32, 2, divisor);
    w_r_ = random_values(c.prompts * kExperts * c.d, Dtype::kFloat32, 3, divisor);
    coef_ = random_values(c.prompts * kNumCoefs, Dtype::kFloat32, 4, 10);
    for (int64_t i = 0; i < c.prompts; ++i) {
      router_of_.push_back(static_cast<int32_t>(i));
      spans_.push_back(static_cast<int32_t>(i * c.tokens));
      spans_.push_back(static_cast<int32_t>((i + 1) * c.tokens));
      codes_.push_back({Pooler::kSelfAttention, Activation::kRational, RouterNorm::kNone,
                        GateKind::kProbability, 3, kExperts});
      first_chunk_.push_back(static_cast<int32_t>(chunks_.size()));
      for (int64_t t = 0; t < c.tokens; t += kRouterChunk) {
        const int64_t end = std::min(t + kRouterChunk, c.tokens);
        chunks_.push_back({static_cast<int32_t>(i), static_cast<int32_t>(i * c.tokens + t),
                           static_cast<int32_t>(i * c.tokens + end)});
      }
    }
    first_chunk_.push_back(static_cast<int32_t>(chunks_.size()));
    scratch_.resize(chunks_.size() * (c.d + 2));
    probs_.resize(c.prompts * kExperts);
    gates_.resize(c.prompts * kExperts);
    pooled_.resize(c.prompts * c.d);
  }

  int64_t bytes() const { return bytes_; }
  // Scores and the weighted sum: two multiply-adds per element.
  int64_t flops() const { return 4 * c_.prompts * c_.tokens * c_.d; }

  void read() {
    turn_ = (turn_ + 1) % copies_;
    sink_ = read_all(workers_, h_.data() + turn_ * bytes_, bytes_);
  }

  void run() {
    turn_ = (turn_ + 1) % copies_;
    RouterWork work{};
    work.p.h = h_.data() + turn_ * bytes_;
    work.p.h_stride = work.p.d = c_.d;
    work.p.spans = spans_.data();
    work.p.router_of = router_of_.data();
    work.p.w_sa = reinterpret_cast<const float*>(w_sa_.data());
    work.p.w_r = reinterpret_cast<const float*>(w_r_.data());
    work.p.coef = reinterpret_cast<const float*>(coef_.data());
    work.p.codes = codes_.data();
    work.p.probs = probs_.data();
    work.p.gates = gates_.data();
    work.p.pooled = pooled_.data();
    work.p.num_tokens = c_.prompts * c_.tokens;
    work.p.num_prompts = work.p.num_routers = c_.prompts;
    work.p.num_experts = kExperts;
    work.p.dtype = dtype_;
    work.chunks = chunks_.data();
    work.first_chunk = first_chunk_.data();
    const auto num_chunks = static_cast<int64_t>(chunks_.size());
    work.maxima = scratch_.data();
    work.sums = work.maxima + num_chunks;
    work.vectors = work.sums + num_chunks;
    const PromptRouterCpu& kernels = prompt_router_cpu();
    workers_.tasks(num_chunks, [&](int64_t i) { kernels.pool(work, i, i + 1); });
    workers_.tasks(c_.prompts, [&](int64_t i) { kernels.head(work, i, i + 1); });
  }

  // The first prompt's pooled vector in double, and that probabilities and gates are sound.
  void check_result() {
    run();
    const uint8_t* h = h_.data() + turn_ * bytes_;
    std::vector<double> weights(c_.tokens);
    double total = 0;
    for (int64_t t = 0; t < c_.tokens; ++t) {
      double score = 0;
      for (int64_t i = 0; i < c_.d; ++i) {
        score += static_cast<double>(value_at(h, dtype_, t * c_.d + i)) *
                 value_at(w_sa_.data(), Dtype::kFloat32, i);
      }
      total += weights[t] = std::exp(score);
    }
    for (int64_t i = 0; i < std::min<int64_t>(c_.d, 64); ++i) {
      double want = 0;
      for (int64_t t = 0; t < c_.tokens; ++t) {
        want += weights[t] / total * value_at(h, dtype_, t * c_.d + i);
      }
      check(std::abs(pooled_[i] - want) <= 1e-3, "bench_prompt_router", name_of(c_), " pools to ",
            pooled_[i], " where ", want, " is right");
    }
    double sum = 0;
    int kept = 0;
    for (int64_t e = 0; e < kExperts; ++e) {
      sum += probs_[e];
      kept += gates_[e] > 0;
    }
    check(std::abs(sum - 1) <= 1e-5 && kept == 3, "bench_prompt_router", name_of(c_),
          " has probabilities that add up to ", sum, " and keeps ", kept);
  }

 private:
  Case c_;
  Dtype dtype_;
  Workers& workers_;
  int64_t bytes_, copies_, turn_ = 0;
  std::vector<uint8_t> h_, w_sa_, w_r_, coef_;
  std::vector<int32_t> router_of_, spans_, first_chunk_;
  std::vector<RouterCodes> codes_;
  std::vector<RouterChunk> chunks_;
  std::vector<float> scratch_, probs_, gates_, pooled_;
  volatile float sink_ = 0;
};

void run(const Options& options) {
  std::vector<Case> cases = {{8, 128, 1024}};
  if (!options.quick) {
    cases.insert(cases.end(), {{1, 128, 1024}, {64, 128, 1024}, {1, 4096, 4096}});
  }
  Workers workers(options.threads);
  Report report(options, options.threads);
  for (Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
    for (const Case& c : cases) {
      Problem problem(c, dtype, workers);
      const int repeat = options.repeat > 0 ? options.repeat : options.quick ? 20 : 100;
      const Result result = {.bench = "prompt_router_cpp",
                             .name = name_of(c),
                             .dtype = dtype,
                             .extra = {{"batch", c.prompts}}};
      time_problem(problem, result, repeat, options, report);
    }
  }
}

}  // namespace
}  // namespace milora::bench

int main(int argc, char** argv) {
  return milora::bench::run_bench(argc, argv, "prompt_router", milora::bench::run);
}
