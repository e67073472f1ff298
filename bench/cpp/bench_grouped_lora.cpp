// Times the CPU kernels of grouped_lora_ (decode, prefill) and of the training backward.
//
// The yardstick ("base") is one read of the bytes that a kernel must read, by the same threads:
// weights for decode, weights and activations else. Weights rotate over copies that no cache holds,
// as the layers of a model do.
#include <cmath>
#include <memory>

#include "common/check.h"
#include "harness.h"
#include "kernels/grouped_lora/tasks.h"

namespace milora::bench {
namespace {

struct Case {
  const char* kind;  // decode, prefill or backward
  int64_t batch, tokens, d_in, d_out, rank;
  int64_t slices = 1;  // modules that read the same x
};

std::string name_of(const Case& c) {
  std::string name = std::string(c.kind) + " b" + std::to_string(c.batch) + "x" +
                     std::to_string(c.tokens) + " r" + std::to_string(c.rank) + " " +
                     std::to_string(c.d_in) + "-" + std::to_string(c.d_out);
  return c.slices == 1 ? name : name + " x" + std::to_string(c.slices);
}

// One adapter per row of the batch. In the pool: copies x adapters x slices of A, then Bt.
class Inference {
 public:
  Inference(const Case& c, Dtype dtype, Workers& workers)
      : c_(c), dtype_(dtype), workers_(workers) {
    const int64_t expert = c.rank * (c.d_in + c.d_out) * element_size(dtype);
    bytes_ = c.batch * c.slices * expert;
    copies_ = std::min<int64_t>(64, 1 + 2 * last_cache_bytes() / bytes_);
    const int64_t values = copies_ * bytes_ / element_size(dtype);
    const float divisor = std::sqrt(static_cast<float>(c.d_in));
    storage_ = random_values(values + 16, dtype, 1, divisor);
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    pool_ = storage_.data() + (16 - address % 16) % 16;
    x_ = random_values(num_tokens() * c.d_in, dtype, 2, 1);
    y_.resize(c.slices);
    for (auto& y : y_) y = random_values(num_tokens() * c.d_out, dtype, 3, 1);
    for (int64_t i = 0; i < copies_ * c.batch * c.slices; ++i) {
      const int64_t a = i * expert, bt = a + c.rank * c.d_in * element_size(dtype);
      offsets_.insert(offsets_.end(), {a, bt, -1, -1, -1});
    }
    ranks_.assign(c.batch * c.slices, static_cast<int32_t>(c.rank));
    ones_.assign(c.batch * c.slices, 1.0f);
    for (int64_t row = 0; row < c.batch; ++row) {
      adapter_of_.push_back(static_cast<int32_t>(row));
      route_of_.insert(route_of_.end(), c.tokens, static_cast<int32_t>(row));
    }
  }

  int64_t num_tokens() const { return c_.batch * c_.tokens; }
  int64_t bytes() const {
    const int64_t rows = c_.d_in + c_.slices * c_.d_out;
    return bytes_ + (c_.tokens > 1 ? num_tokens() * rows * element_size(dtype_) : 0);
  }
  int64_t flops() const { return 2 * num_tokens() * c_.rank * c_.slices * (c_.d_in + c_.d_out); }

  void read() {
    turn_ = (turn_ + 1) % copies_;
    sink_ = read_all(workers_, pool_ + turn_ * bytes_, bytes_);
    if (c_.tokens == 1) return;
    sink_ = sink_ + read_all(workers_, x_.data(), static_cast<int64_t>(x_.size()));
    for (auto& y : y_) sink_ = sink_ + read_all(workers_, y.data(), static_cast<int64_t>(y.size()));
  }

  void run() {
    turn_ = (turn_ + 1) % copies_;
    GroupedLoraPoolParams p{};
    for (int64_t s = 0; s < c_.slices; ++s) {
      p.y[s] = y_[s].data();
      p.y_stride[s] = p.d_out[s] = c_.d_out;
      p.expert[s] = static_cast<int32_t>(s);
    }
    p.x = x_.data();
    p.x_stride = p.d_in = c_.d_in;
    p.pool = pool_;
    p.pool_bytes = copies_ * bytes_;
    p.offsets = offsets_.data() + turn_ * c_.batch * c_.slices * kNumParts;
    p.ranks = ranks_.data();
    p.scales = p.gates = ones_.data();
    p.route_of = route_of_.data();
    p.adapter_of = adapter_of_.data();
    p.num_tokens = num_tokens();
    p.num_routes = p.num_adapters = c_.batch;
    p.num_experts = p.num_slices = c_.slices;
    p.dtype = dtype_;

    schedule(p, &plan_);
    hidden_.resize(plan_.hidden_size);
    LoraWork work{};
    work.jobs = plan_.jobs.data();
    work.rows = plan_.rows.data();
    work.row_gates = plan_.row_gates.data();
    work.hidden = hidden_.data();
    work.x = p.x;
    work.x_stride = p.x_stride;
    work.d_in = p.d_in;
    for (int64_t s = 0; s < c_.slices; ++s) {
      work.y[s] = work.out[s] = p.y[s];
      work.y_stride[s] = work.out_stride[s] = p.y_stride[s];
    }
    work.dtype = dtype_;
    if (tasks_.cut(plan_, p.d_in, dtype_, workers_.count()) == 1) {
      tasks_.run(work);
    } else {
      workers_.run([&] { tasks_.run(work); });
    }
  }

  // The first row's first outputs in double.
  void check_result() {
    std::vector<double> hidden(c_.rank, 0.0);
    const int64_t copy = (turn_ + 1) % copies_;
    const uint8_t* a = pool_ + offsets_[copy * c_.batch * c_.slices * kNumParts];
    const uint8_t* bt = pool_ + offsets_[copy * c_.batch * c_.slices * kNumParts + 1];
    const std::vector<uint8_t> before = y_[0];
    for (int64_t r = 0; r < c_.rank; ++r) {
      for (int64_t i = 0; i < c_.d_in; ++i) {
        hidden[r] += static_cast<double>(value_at(a, dtype_, r * c_.d_in + i)) *
                     value_at(x_.data(), dtype_, i);
      }
    }
    run();
    for (int64_t j = 0; j < std::min<int64_t>(c_.d_out, 64); ++j) {
      double want = value_at(before.data(), dtype_, j);
      for (int64_t r = 0; r < c_.rank; ++r) {
        want += hidden[r] * value_at(bt, dtype_, r * c_.d_out + j);
      }
      const double error = std::abs(value_at(y_[0].data(), dtype_, j) - want);
      check(error <= 0.02 * (1 + std::abs(want)), "bench_grouped_lora", name_of(c_), " gives ",
            value_at(y_[0].data(), dtype_, j), " where ", want, " is right");
    }
  }

 private:
  Case c_;
  Dtype dtype_;
  Workers& workers_;
  int64_t bytes_, copies_, turn_ = 0;
  std::vector<uint8_t> storage_, x_;
  uint8_t* pool_;
  std::vector<std::vector<uint8_t>> y_;
  std::vector<int64_t> offsets_;
  std::vector<int32_t> ranks_, route_of_, adapter_of_;
  std::vector<float> ones_, hidden_;
  LoraSchedule plan_;
  LoraTasks tasks_;
  volatile float sink_ = 0;
};

// One adapter, every token: dx, dA and dB as the training op computes them.
class Backward {
 public:
  Backward(const Case& c, Dtype dtype, Workers& workers)
      : c_(c), dtype_(dtype), workers_(workers), num_tokens_(c.batch * c.tokens) {
    const float divisor = std::sqrt(static_cast<float>(c.d_in));
    a_ = random_values(c.rank * c.d_in, dtype, 1, divisor);
    b_ = random_values(c.d_out * c.rank, dtype, 2, divisor);
    x_ = random_values(num_tokens_ * c.d_in, dtype, 3, 1);
    dy_ = random_values(num_tokens_ * c.d_out, dtype, 4, 1);
    bt_.resize(b_.size());
    dx_.resize(x_.size());
    da_.resize(a_.size());
    db_.resize(b_.size());
    scratch_.resize(3 * num_tokens_ * c.rank + num_tokens_);
    gates_.assign(num_tokens_, 1.0f);
    for (int64_t t = 0; t < num_tokens_; ++t) rows_.push_back(static_cast<int32_t>(t));
    job_.a = a_.data();
    job_.bt = bt_.data();
    job_.a_stride = c.d_in;
    job_.bt_stride = job_.d_out = c.d_out;
    job_.scale = 1;
    job_.rank = static_cast<int32_t>(c.rank);
    job_.num_rows = num_tokens_;
  }

  int64_t bytes() const { return static_cast<int64_t>(x_.size() + dy_.size() + dx_.size()); }
  // Bt dy, A x, dx, dA and dB.
  int64_t flops() const { return 2 * num_tokens_ * c_.rank * (3 * c_.d_in + 2 * c_.d_out); }

  void read() {
    sink_ = 0;
    for (const auto* part : {&x_, &dy_, &dx_}) {
      sink_ = sink_ + read_all(workers_, part->data(), static_cast<int64_t>(part->size()));
    }
  }

  void run() {
    const GroupedLoraCpu& kernels = grouped_lora_cpu();
    constexpr int64_t kColumns = 256;
    workers_.tasks((c_.d_out + kColumns - 1) / kColumns, [&](int64_t i) {
      kernels.transpose_b(b_.data(), dtype_, c_.rank, c_.d_out, i * kColumns,
                          std::min((i + 1) * kColumns, c_.d_out), bt_.data());
    });
    const int64_t size = num_tokens_ * c_.rank;
    const LoraGrads grads{da_.data(), db_.data()};
    LoraBackwardWork work{};
    work.jobs = &job_;
    work.rows = rows_.data();
    work.row_gates = gates_.data();
    work.dx_coefs = scratch_.data();
    work.da_coefs = work.dx_coefs + size;
    work.db_coefs = work.da_coefs + size;
    work.row_dots = work.db_coefs + size;
    work.x = x_.data();
    work.dy = dy_.data();
    work.x_stride = work.d_in = c_.d_in;
    work.dy_stride = work.d_out = c_.d_out;
    work.dx = dx_.data();
    work.grads = &grads;
    work.dtype = dtype_;
    work.need_hidden = true;

    const auto units = [&](auto kernel, int64_t row_step, int64_t extent, int64_t step) {
      for (int64_t row = 0; row < num_tokens_; row += row_step) {
        for (int64_t column = 0; column < extent; column += step) {
          pieces_.emplace_back(kernel,
                               LoraUnit{0, static_cast<int32_t>(row),
                                        static_cast<int32_t>(std::min(row + row_step, num_tokens_)),
                                        static_cast<int32_t>(column),
                                        static_cast<int32_t>(std::min(column + step, extent))});
        }
      }
    };
    const auto run_all = [&] {
      workers_.tasks(static_cast<int64_t>(pieces_.size()),
                     [&](int64_t i) { pieces_[i].first(work, pieces_[i].second); });
      pieces_.clear();
    };
    units(kernels.backward_rows, kBackwardRows, 1, 1);
    run_all();
    units(kernels.backward_da, num_tokens_, c_.d_in, kColumns);
    units(kernels.backward_db, num_tokens_, c_.d_out, kColumns);
    units(kernels.backward_dx, kUnitRows, c_.d_in, c_.d_in);
    run_all();
  }

  // The first token's first gradients of x in double. The kernel adds to dx.
  void check_result() {
    std::fill(dx_.begin(), dx_.end(), uint8_t{0});
    run();
    std::vector<double> grad(c_.rank, 0.0);
    for (int64_t r = 0; r < c_.rank; ++r) {
      for (int64_t j = 0; j < c_.d_out; ++j) {
        grad[r] += static_cast<double>(value_at(b_.data(), dtype_, j * c_.rank + r)) *
                   value_at(dy_.data(), dtype_, j);
      }
    }
    for (int64_t i = 0; i < std::min<int64_t>(c_.d_in, 64); ++i) {
      double want = 0;
      for (int64_t r = 0; r < c_.rank; ++r) {
        want += grad[r] * value_at(a_.data(), dtype_, r * c_.d_in + i);
      }
      const double error = std::abs(value_at(dx_.data(), dtype_, i) - want);
      check(error <= 0.02 * (1 + std::abs(want)), "bench_grouped_lora", name_of(c_), " gives dx ",
            value_at(dx_.data(), dtype_, i), " where ", want, " is right");
    }
  }

 private:
  Case c_;
  Dtype dtype_;
  Workers& workers_;
  int64_t num_tokens_;
  std::vector<uint8_t> a_, b_, bt_, x_, dy_, dx_, da_, db_;
  std::vector<float> scratch_, gates_;
  std::vector<int32_t> rows_;
  LoraJob job_{};
  std::vector<std::pair<decltype(GroupedLoraCpu::backward_dx), LoraUnit>> pieces_;
  volatile float sink_ = 0;
};

template <class Problem>
void time_case(const Case& c, Dtype dtype, int repeat, const Options& options, Workers& workers,
               Report& report) {
  Problem problem(c, dtype, workers);
  const Result result = {.bench = "grouped_lora_cpp",
                         .name = name_of(c),
                         .dtype = dtype,
                         .extra = {{"rank", c.rank}, {"batch", c.batch}}};
  time_problem(problem, result, repeat, options, report);
}

void run(const Options& options) {
  std::vector<Case> cases = {
      {"decode", 8, 1, 1024, 1024, 32},
      {"prefill", 8, 128, 1024, 1024, 32},
      {"backward", 8, 256, 1024, 1024, 32},
  };
  if (!options.quick) {
    for (int64_t rank : {8, 64, 256}) cases.push_back({"decode", 8, 1, 1024, 1024, rank});
    for (int64_t batch : {1, 16, 64}) cases.push_back({"decode", batch, 1, 1024, 1024, 32});
    cases.push_back({"decode", 8, 1, 1024, 1024, 32, 3});  // q, k, v
    cases.push_back({"decode", 8, 1, 1024, 2816, 32, 2});  // gate, up
    cases.push_back({"decode", 8, 1, 2816, 1024, 32});
    cases.push_back({"prefill", 8, 128, 1024, 1024, 32, 3});
    cases.push_back({"prefill", 8, 128, 1024, 2816, 32, 2});
    cases.push_back({"backward", 8, 256, 1024, 2816, 32});
  }
  Workers workers(options.threads);
  Report report(options, options.threads);
  for (Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
    for (const Case& c : cases) {
      const bool decode = c.tokens == 1;
      const int own = options.quick ? (decode ? 50 : 5) : (decode ? 300 : 20);
      const int repeat = options.repeat > 0 ? options.repeat : own;
      if (std::string(c.kind) == "backward") {
        time_case<Backward>(c, dtype, repeat, options, workers, report);
      } else {
        time_case<Inference>(c, dtype, repeat, options, workers, report);
      }
    }
  }
}

}  // namespace
}  // namespace milora::bench

int main(int argc, char** argv) {
  return milora::bench::run_bench(argc, argv, "grouped_lora", milora::bench::run);
}
