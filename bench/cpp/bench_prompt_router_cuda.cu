// Times the CUDA kernels of prompt_router, forward and backward, without Python and torch: one
// router per prompt, self-attention pooling. "base" is a copy of as many bytes as H has; hidden
// states rotate over copies that no cache holds.
#include <cmath>

#include "common/check.h"
#include "cuda_harness.h"
#include "kernels/prompt_router/cuda.h"

namespace milora::bench {
namespace {

constexpr int64_t kExperts = 7;
constexpr int64_t kSize = 2;  // bytes of bf16

struct Case {
  int64_t prompts, tokens, d;
};

class Problem {
 public:
  Problem(const Case& c, const Options& options) : c_(c), copies_(num_copies(h_bytes(), options)) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(c.d));
    h_.random_bf16(1, 1);
    w_sa_.random_float(2, scale);
    w_r_.random_float(3, scale);
    coef_.random_float(4, 0.1f);
    for (Memory* upper : {&dprobs_, &dgates_, &dpooled_}) upper->random_float(5, 1);
    std::vector<int32_t> spans, router_of;
    std::vector<RouterCodes> codes;
    for (int64_t i = 0; i < c.prompts; ++i) {
      router_of.push_back(static_cast<int32_t>(i));
      spans.push_back(static_cast<int32_t>(i * c.tokens));
      spans.push_back(static_cast<int32_t>((i + 1) * c.tokens));
      codes.push_back({Pooler::kSelfAttention, Activation::kRational, RouterNorm::kNone,
                       GateKind::kProbability, 3, kExperts});
    }
    spans_.put(spans);
    router_of_.put(router_of);
    codes_.put(codes);
  }

  int copies() const { return copies_; }
  int64_t h_bytes() const { return c_.prompts * c_.tokens * c_.d * kSize; }
  // Scores and the weighted sum: two multiply-adds per element.
  int64_t flops() const { return 4 * c_.prompts * c_.tokens * c_.d; }

  int forward(int turn, cudaStream_t stream) {
    const PromptRouterParams p = params(turn);
    return prompt_router_cuda(p, forward_scratch_.of(prompt_router_cuda_scratch(p)), stream);
  }

  // Needs the probabilities of this turn's forward: any will do for the time.
  int backward(int turn, cudaStream_t stream) {
    PromptRouterBackwardParams p{};
    p.forward = params(turn);
    p.dprobs = dprobs_.at<float>();
    p.dgates = dgates_.at<float>();
    p.dpooled = dpooled_.at<float>();
    p.dh = dh_.at();
    p.dw_sa = dw_sa_.at<float>();
    p.dw_r = dw_r_.at<float>();
    p.dcoef = dcoef_.at<float>();
    void* space = backward_scratch_.of(prompt_router_backward_cuda_scratch(p.forward));
    return prompt_router_backward_cuda(p, space, stream);
  }

  // The first prompt's pooled vector in double, and that probabilities and gates are sound.
  void check_result() {
    check_cuda(forward(0, nullptr), "the forward's launch");
    check_cuda(cudaDeviceSynchronize(), "the kernel");
    const std::vector<float> h = h_.bf16(0, c_.tokens * c_.d), w_sa = w_sa_.floats(0, c_.d);
    const std::vector<float> probs = probs_.floats(0, kExperts);
    const std::vector<float> gates = gates_.floats(0, kExperts);
    const int64_t shown = std::min<int64_t>(c_.d, 64);
    const std::vector<float> pooled = pooled_.floats(0, shown);
    std::vector<double> weights(c_.tokens);
    double total = 0;
    for (int64_t t = 0; t < c_.tokens; ++t) {
      double score = 0;
      for (int64_t i = 0; i < c_.d; ++i) {
        score += static_cast<double>(h[t * c_.d + i]) * w_sa[i];
      }
      total += weights[t] = std::exp(score);
    }
    for (int64_t i = 0; i < shown; ++i) {
      double want = 0;
      for (int64_t t = 0; t < c_.tokens; ++t) want += weights[t] / total * h[t * c_.d + i];
      check(std::abs(pooled[i] - want) <= 1e-3, "bench_prompt_router_cuda", "pools to ", pooled[i],
            " where ", want, " is right");
    }
    double sum = 0;
    int kept = 0;
    for (int64_t e = 0; e < kExperts; ++e) {
      sum += probs[e];
      kept += gates[e] > 0;
    }
    check(std::abs(sum - 1) <= 1e-5 && kept == 3, "bench_prompt_router_cuda",
          "has probabilities that add up to ", sum, " and keeps ", kept);
  }

 private:
  PromptRouterParams params(int turn) const {
    PromptRouterParams p{};
    p.h = h_.at(turn * h_bytes());
    p.h_stride = p.d = c_.d;
    p.spans = spans_.at<int32_t>();
    p.router_of = router_of_.at<int32_t>();
    p.w_sa = w_sa_.at<float>();
    p.w_r = w_r_.at<float>();
    p.coef = coef_.at<float>();
    p.codes = codes_.at<RouterCodes>();
    p.probs = probs_.at<float>();
    p.gates = gates_.at<float>();
    p.pooled = pooled_.at<float>();
    p.num_tokens = c_.prompts * c_.tokens;
    p.num_prompts = p.num_routers = c_.prompts;
    p.num_experts = kExperts;
    p.dtype = Dtype::kBFloat16;
    return p;
  }

  Case c_;
  int copies_;
  Memory h_{copies_ * h_bytes()}, dh_{h_bytes()};
  Memory w_sa_{c_.prompts * c_.d * 4}, w_r_{c_.prompts * kExperts * c_.d * 4};
  Memory coef_{c_.prompts * kNumCoefs * 4}, codes_{c_.prompts * kNumCodes * 4};
  Memory dw_sa_{c_.prompts * c_.d * 4}, dw_r_{c_.prompts * kExperts * c_.d * 4};
  Memory dcoef_{c_.prompts * kNumCoefs * 4};
  Memory spans_{c_.prompts * 8}, router_of_{c_.prompts * 4};
  Memory probs_{c_.prompts * kExperts * 4}, gates_{c_.prompts * kExperts * 4};
  Memory dprobs_{c_.prompts * kExperts * 4}, dgates_{c_.prompts * kExperts * 4};
  Memory pooled_{c_.prompts * c_.d * 4}, dpooled_{c_.prompts * c_.d * 4};
  Scratch forward_scratch_, backward_scratch_;
};

void run(const Options& options) {
  std::vector<Case> cases = {{8, 128, 1024}};
  if (!options.quick) cases = {{1, 4096, 4096}, {8, 512, 4096}, {64, 64, 4096}, {8, 128, 1024}};
  Report report(options, "prompt_router_cuda");
  for (const Case& c : cases) {
    Problem problem(c, options);
    problem.check_result();
    const std::string shape = std::string(" ") + std::to_string(c.prompts) + "x" +
                              std::to_string(c.tokens) + " d" + std::to_string(c.d);
    const std::vector<std::pair<std::string, int64_t>> extra = {{"batch", c.prompts}};
    report.time({"router_forward", "forward" + shape, problem.h_bytes(), problem.flops(), extra},
                problem.copies(),
                [&](int turn, cudaStream_t stream) { return problem.forward(turn, stream); });
    // Scores' gradients need H once, the gradient of H is written.
    report.time(
        {"router_backward", "backward" + shape, 2 * problem.h_bytes(), 2 * problem.flops(), extra},
        problem.copies(),
        [&](int turn, cudaStream_t stream) { return problem.backward(turn, stream); });
  }
}

}  // namespace
}  // namespace milora::bench

int main(int argc, char** argv) {
  return milora::bench::run_bench(argc, argv, "prompt_router", milora::bench::run);
}
