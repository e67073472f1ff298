// What the C++ benches of the CUDA kernels share: device memory, graphs in turns, JSON lines as
// bench/measure.py writes them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace milora::bench {

struct Options {
  bool quick = false;
  int repeat = 0;    // 0: 50
  std::string json;  // file, or empty
};

// All of the main() of bench_<noun>_cuda: its exit status, after an error in words. Exits with the
// usage for --help (0) and for a mistake (2).
int run_bench(int argc, char** argv, const char* noun, void (*run)(const Options&));

// Fails in words; takes a cudaError_t.
void check_cuda(int error, const char* what);

struct Gpu {
  std::string name;
  int capability;      // 90 on Hopper
  int64_t cache;       // bytes of the last level
  double bytes_per_s;  // read and written, of copying memory that no cache holds
};
const Gpu& gpu();

// Device memory; the contents are bytes of zero until they are filled.
class Memory {
 public:
  explicit Memory(int64_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  template <class T = void>
  T* at(int64_t byte = 0) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(data_) + byte);
  }
  int64_t bytes() const { return bytes_; }

  // bf16 numbers in [-1, 1) * scale.
  Memory& random_bf16(uint32_t seed, float scale);
  Memory& random_float(uint32_t seed, float scale);
  template <class T>
  Memory& put(const std::vector<T>& values) {
    copy_in(values.data(), static_cast<int64_t>(values.size() * sizeof(T)));
    return *this;
  }
  // bf16 or float as numbers, from a byte on.
  std::vector<float> bf16(int64_t byte, int64_t count) const;
  std::vector<float> floats(int64_t byte, int64_t count) const;

 private:
  void copy_in(const void* data, int64_t bytes);
  void copy_out(void* data, int64_t byte, int64_t bytes) const;

  void* data_ = nullptr;
  int64_t bytes_;
};

// A kernel's scratch, made at the first launch, which is outside of any capture.
class Scratch {
 public:
  void* of(int64_t bytes) {
    if (memory_ == nullptr) memory_ = std::make_unique<Memory>(bytes);
    return memory_->at();
  }

 private:
  std::unique_ptr<Memory> memory_;
};

// So many copies of `bytes` that none is in a cache when its turn comes.
int num_copies(int64_t bytes, const Options& options);

// One call of a kernel with the weights of this turn; returns a cudaError_t.
using Launch = std::function<int(int turn, cudaStream_t stream)>;

struct Provider {
  std::string name;  // "milora", or a rival's
  Launch launch;
};

struct Result {
  const char* kernel;  // as bench/gpu_cases.py names it
  std::string name;    // the case
  int64_t bytes, flops;
  std::vector<std::pair<std::string, int64_t>> extra;  // rank, batch, ...
};

// Times kernels and appends lines to the JSON file.
class Report {
 public:
  Report(const Options& options, const char* bench);

  // Captures each provider's launch(0 .. copies - 1) as one graph and takes the fastest of its
  // replays, all in turns with a copy of as many bytes ("base"). Runs each launch(0) once before.
  void time(const Result& result, int copies, const std::vector<Provider>& providers);
  void time(const Result& result, int copies, const Launch& launch) {
    time(result, copies, std::vector<Provider>{{"milora", launch}});
  }

  // A line that says why a provider has no time.
  void absent(const Result& result, const std::string& provider, const std::string& why);

 private:
  std::ofstream& begin_line(const Result& result, const std::string& provider, const char* metric,
                            double value, const char* unit);
  void write_time(const Result& result, const std::string& provider, double seconds, double base);

  const Options& options_;
  const char* bench_;
  std::string commit_, date_;
  std::ofstream json_;
};

}  // namespace milora::bench
