// What the C++ benches share: options, threads, timing in turns, and the JSON lines of
// bench/measure.py.
#pragma once

#include <atomic>
#include <cstdint>
#include <fstream>
#include <functional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "common/dtype.h"

namespace milora::bench {

struct Options {
  bool quick = false;
  int threads = 1;
  int repeat = 0;  // 0: the bench's own
  std::vector<std::string> isas;
  std::string json;  // file, or empty
};

// All of the main() of bench_<noun>: its exit status, after an error in words. Exits with the usage
// for --help (0) and for a mistake (2).
int run_bench(int argc, char** argv, const char* noun, void (*run)(const Options&));

// A fixed set of threads that spin between calls: waking them is no part of a kernel.
class Workers {
 public:
  explicit Workers(int threads);
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  int count() const { return static_cast<int>(threads_.size()) + 1; }

  // Calls body() once on each thread, this one among them, and waits for all.
  void run(const std::function<void()>& body);

  // Calls task(i) for i in [0, count), handed out one by one.
  void tasks(int64_t count, const std::function<void(int64_t)>& task);

 private:
  void loop();

  std::vector<std::thread> threads_;
  const std::function<void()>* body_ = nullptr;
  std::atomic<int64_t> turn_{0};
  std::atomic<int> running_{0};
  std::atomic<bool> stop_{false};
};

// Reads `bytes` once with all threads: what a kernel that needs them all cannot beat.
float read_all(Workers& workers, const void* data, int64_t bytes);

// Seconds of each function's fastest run. They take turns, in an order that changes every round.
std::vector<double> fastest(const std::vector<std::function<void()>>& runs, int repeat);

int64_t last_cache_bytes();

// Random numbers in [-1, 1) / divisor, in the storage of `dtype`.
std::vector<uint8_t> random_values(int64_t count, Dtype dtype, uint32_t seed, float divisor);
float value_at(const uint8_t* data, Dtype dtype, int64_t index);
const char* name_of(Dtype dtype);

struct Result {
  std::string bench, name;  // `name` is the case
  Dtype dtype;
  double base = 0;     // seconds of reading the bytes once
  double seconds = 0;  // of the kernel
  int64_t bytes = 0, flops = 0;
  std::vector<std::pair<std::string, int64_t>> extra;  // rank, batch, ...
};

// Prints results and appends them to the JSON file.
class Report {
 public:
  Report(const Options& options, int threads);
  void add(const Result& result, const std::string& isa);

 private:
  void write(const Result& result, const std::string& isa, const char* provider, const char* metric,
             double value, const char* unit, double ratio, double floor);

  std::ofstream json_;
  std::string hardware_, commit_, date_;
  int threads_;
  bool quick_;
};

// Chooses the instruction set, as MILORA_CPU_ISA does.
void set_isa(const std::string& name);

// Checks and times a problem on each instruction set; it has read(), run(), check_result(), bytes()
// and flops(). `result` says what it is.
template <class Problem>
void time_problem(Problem& problem, Result result, int repeat, const Options& options,
                  Report& report) {
  result.bytes = problem.bytes();
  result.flops = problem.flops();
  for (const std::string& isa : options.isas) {
    set_isa(isa);
    problem.check_result();
    const auto times = fastest({[&] { problem.read(); }, [&] { problem.run(); }}, repeat);
    result.base = times[0];
    result.seconds = times[1];
    report.add(result, isa);
  }
}

}  // namespace milora::bench
