// Times the CUDA kernels of the training op grouped_lora, forward and backward, without Python and
// torch: one adapter, all tokens. "base" is a copy of as many bytes: x, y and out for the forward;
// x, dy and dx for the backward.
#include <cmath>

#include "common/check.h"
#include "cuda_harness.h"
#include "kernels/grouped_lora/cuda.h"

namespace milora::bench {
namespace {

constexpr int64_t kSize = 2;    // bytes of bf16
constexpr int64_t kShown = 64;  // elements that are compared

struct Case {
  int64_t tokens, d_in, d_out, rank;
};

class Problem {
 public:
  Problem(const Case& c, const Options& options)
      : c_(c), copies_(num_copies(c.tokens * (c.d_in + c.d_out) * kSize, options)) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(c.d_in));
    x_.random_bf16(1, 1);
    y_.random_bf16(2, 1);
    a_.random_bf16(3, scale);
    b_.random_bf16(4, scale);
    gate_.put(std::vector<float>{1.0f});
    weights_ = {a_.at(), b_.at(), static_cast<int32_t>(c.rank), 1.0f};
    grads_ = {da_.at(), db_.at()};
  }

  int copies() const { return copies_; }
  int64_t forward_bytes() const { return c_.tokens * (c_.d_in + 2 * c_.d_out) * kSize; }
  int64_t forward_flops() const { return 2 * c_.tokens * c_.rank * (c_.d_in + c_.d_out); }
  int64_t backward_bytes() const { return c_.tokens * (3 * c_.d_in + c_.d_out) * kSize; }
  // Bt dy, A x, dx, dA and dB.
  int64_t backward_flops() const { return 2 * c_.tokens * c_.rank * (3 * c_.d_in + 2 * c_.d_out); }

  int forward(int turn, cudaStream_t stream) {
    GroupedLoraParams p{};
    p.y = y_.at(turn * y_bytes());
    p.out = out_.at();
    p.x = x_.at(turn * x_bytes());
    p.adapters = &weights_;
    p.gates = gate_.at<float>();
    p.route_of = route_of_.at<int32_t>();
    p.adapter_of = adapter_of_.at<int32_t>();
    p.y_stride = p.d_out = c_.d_out;
    p.x_stride = p.d_in = c_.d_in;
    p.num_tokens = c_.tokens;
    p.num_routes = p.num_adapters = 1;
    p.dtype = Dtype::kBFloat16;
    return grouped_lora_cuda(p, forward_scratch_.of(grouped_lora_cuda_scratch(p)), stream);
  }

  int backward(int turn, cudaStream_t stream) {
    GroupedLoraBackwardParams p{};
    p.dy = y_.at(turn * y_bytes());
    p.x = x_.at(turn * x_bytes());
    p.adapters = &weights_;
    p.gates = gate_.at<float>();
    p.route_of = route_of_.at<int32_t>();
    p.adapter_of = adapter_of_.at<int32_t>();
    p.dx = dx_.at();
    p.grads = &grads_;
    p.dgates = dgates_.at<float>();
    p.dy_stride = p.d_out = c_.d_out;
    p.x_stride = p.d_in = c_.d_in;
    p.num_tokens = c_.tokens;
    p.num_routes = p.num_adapters = 1;
    p.dtype = Dtype::kBFloat16;
    void* space = backward_scratch_.of(grouped_lora_backward_cuda_scratch(p));
    return grouped_lora_backward_cuda(p, space, stream);
  }

  // The first token's first outputs and gradients of x in double.
  void check_results() {
    check_cuda(forward(0, nullptr), "the forward's launch");
    check_cuda(backward(0, nullptr), "the backward's launch");
    check_cuda(cudaDeviceSynchronize(), "the kernels");
    const std::vector<float> x = x_.bf16(0, c_.d_in), y = y_.bf16(0, c_.d_out);
    const std::vector<float> a = a_.bf16(0, c_.rank * c_.d_in), b = b_.bf16(0, c_.rank * c_.d_out);
    const std::vector<float> out = out_.bf16(0, kShown), dx = dx_.bf16(0, kShown);
    std::vector<double> hidden(c_.rank), grad(c_.rank);
    for (int64_t r = 0; r < c_.rank; ++r) {
      for (int64_t i = 0; i < c_.d_in; ++i) {
        hidden[r] += static_cast<double>(a[r * c_.d_in + i]) * x[i];
      }
      for (int64_t j = 0; j < c_.d_out; ++j) {
        grad[r] += static_cast<double>(b[j * c_.rank + r]) * y[j];
      }
    }
    for (int64_t i = 0; i < kShown; ++i) {
      double want_out = y[i], want_dx = 0;
      for (int64_t r = 0; r < c_.rank; ++r) {
        want_out += hidden[r] * b[i * c_.rank + r];
        want_dx += grad[r] * a[r * c_.d_in + i];
      }
      compare("out", out[i], want_out);
      compare("dx", dx[i], want_dx);
    }
  }

 private:
  int64_t x_bytes() const { return c_.tokens * c_.d_in * kSize; }
  int64_t y_bytes() const { return c_.tokens * c_.d_out * kSize; }

  static void compare(const char* what, float got, double want) {
    check(std::abs(got - want) <= 0.02 * (1 + std::abs(want)), "bench_train_cuda", what, " is ",
          got, " where ", want, " is right");
  }

  Case c_;
  int copies_;
  Memory x_{copies_ * x_bytes()}, y_{copies_ * y_bytes()}, out_{y_bytes()}, dx_{x_bytes()};
  Memory a_{c_.rank * c_.d_in * kSize}, b_{c_.rank * c_.d_out * kSize};
  Memory da_{c_.rank * c_.d_in * kSize}, db_{c_.rank * c_.d_out * kSize};
  // Zeros: every token has route 0, and that adapter 0.
  Memory gate_{4}, dgates_{4}, route_of_{c_.tokens * 4}, adapter_of_{4};
  LoraWeights weights_{};
  LoraGrads grads_{};
  Scratch forward_scratch_, backward_scratch_;
};

void run(const Options& options) {
  std::vector<Case> cases = {{2048, 1024, 1024, 32}};
  if (!options.quick) {
    cases = {{4096, 4096, 4096, 32},
             {4096, 4096, 11008, 32},
             {4096, 11008, 4096, 32},
             {4096, 4096, 4096, 128}};
  }
  Report report(options, "train_cuda");
  for (const Case& c : cases) {
    Problem problem(c, options);
    problem.check_results();
    const std::string shape = std::string(" ") + std::to_string(c.tokens) + " r" +
                              std::to_string(c.rank) + " " + std::to_string(c.d_in) + "-" +
                              std::to_string(c.d_out);
    report.time({"train_forward",
                 "forward" + shape,
                 problem.forward_bytes(),
                 problem.forward_flops(),
                 {{"rank", c.rank}}},
                problem.copies(),
                [&](int turn, cudaStream_t stream) { return problem.forward(turn, stream); });
    report.time({"train_backward",
                 "backward" + shape,
                 problem.backward_bytes(),
                 problem.backward_flops(),
                 {{"rank", c.rank}}},
                problem.copies(),
                [&](int turn, cudaStream_t stream) { return problem.backward(turn, stream); });
  }
}

}  // namespace
}  // namespace milora::bench

int main(int argc, char** argv) {
  return milora::bench::run_bench(argc, argv, "train", milora::bench::run);
}
