#include "harness.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <exception>
#include <random>
#include <sstream>

#include "common/check.h"
#include "common/macros.h"
#include "kernels/cpu/isa.h"

// Of kernels/cpu/isa.cpp, where Python's loader finds them.
MILORA_EXPORT const char* milora_cpu_isa(const char* name, const char** error);
MILORA_EXPORT const char* milora_cpu_isas();

namespace milora::bench {
namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> words;
  std::istringstream stream(text);
  for (std::string word; std::getline(stream, word, ',');) {
    words.push_back(word.substr(std::min(word.size(), word.find_first_not_of(' '))));
  }
  return words;
}

std::string first_line_of(const char* command) {
  std::FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return "";
  char line[256] = "";
  const bool read = std::fgets(line, sizeof line, pipe) != nullptr;
  pclose(pipe);
  return read ? std::string(line, std::strcspn(line, "\n")) : "";
}

std::string processor() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown processor";
}

std::string now() {
  const std::time_t seconds = std::time(nullptr);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S+00:00", std::gmtime(&seconds));
  return text;
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + '"';
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  return text;
}

Options parse(int argc, char** argv, const char* noun) {
  Options options;
  options.threads = std::max(1u, std::thread::hardware_concurrency());
  const auto usage = [&](int code) {
    std::fprintf(code == 0 ? stdout : stderr,
                 "Times the CPU kernels of %s, without Python and torch.\n\n"
                 "usage: %s [--quick] [--threads N] [--repeat N] [--json FILE] "
                 "[--isa NAME,...|all]\n  instruction sets here: %s\n",
                 noun, argv[0], milora_cpu_isas());
    std::exit(code);
  };
  std::string isas = "best";
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--help") usage(0);
    if (option == "--quick") {
      options.quick = true;
      continue;
    }
    if (i + 1 == argc) usage(2);
    const std::string value = argv[++i];
    if (option == "--threads") {
      options.threads = std::atoi(value.c_str());
    } else if (option == "--repeat") {
      options.repeat = std::atoi(value.c_str());
    } else if (option == "--json") {
      options.json = value;
    } else if (option == "--isa") {
      isas = value;
    } else {
      usage(2);
    }
  }
  if (options.threads < 1 || options.repeat < 0) usage(2);
  const std::vector<std::string> known = split(milora_cpu_isas());
  options.isas = isas == "all" ? known : isas == "best" ? split(known.back()) : split(isas);
  for (const std::string& isa : options.isas) {
    if (std::find(known.begin(), known.end(), isa) == known.end()) usage(2);
  }
  return options;
}

}  // namespace

int run_bench(int argc, char** argv, const char* noun, void (*run)(const Options&)) {
  try {
    run(parse(argc, argv, noun));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_%s: %s\n", noun, error.what());
    return EXIT_FAILURE;
  }
  return EXIT_SUCCESS;
}

void set_isa(const std::string& name) {
  const char* error = nullptr;
  check(milora_cpu_isa(name.c_str(), &error) != nullptr, "bench", error ? error : "unknown error");
}

// ---- threads ----------------------------------------------------------------------------------

Workers::Workers(int threads) {
  for (int i = 1; i < threads; ++i) threads_.emplace_back([this] { loop(); });
}

Workers::~Workers() {
  stop_ = true;
  turn_.fetch_add(1, std::memory_order_release);
  for (std::thread& thread : threads_) thread.join();
}

void Workers::run(const std::function<void()>& body) {
  body_ = &body;
  running_.store(count() - 1, std::memory_order_relaxed);
  turn_.fetch_add(1, std::memory_order_release);
  body();
  while (running_.load(std::memory_order_acquire) != 0) std::this_thread::yield();
}

void Workers::loop() {
  for (int64_t seen = 0;; ++seen) {
    while (turn_.load(std::memory_order_acquire) == seen) std::this_thread::yield();
    if (stop_) return;
    (*body_)();
    running_.fetch_sub(1, std::memory_order_release);
  }
}

void Workers::tasks(int64_t count, const std::function<void(int64_t)>& task) {
  std::atomic<int64_t> next{0};
  run([&] {
    for (int64_t i = next++; i < count; i = next++) task(i);
  });
}

// ---- timing -----------------------------------------------------------------------------------

float read_all(Workers& workers, const void* data, int64_t bytes) {
  const auto* values = static_cast<const float*>(data);
  const int64_t count = bytes / 4, piece = 64 * 1024;
  std::atomic<float> sum{0};
  workers.tasks((count + piece - 1) / piece, [&](int64_t i) {
    constexpr int kLanes = 64;  // sums apart, so that additions do not wait for each other
    float lanes[kLanes] = {};
    const int64_t end = std::min((i + 1) * piece, count) / kLanes * kLanes;
    for (int64_t j = i * piece; j < end; j += kLanes) {
      for (int k = 0; k < kLanes; ++k) lanes[k] += values[j + k];
    }
    float total = 0;
    for (float lane : lanes) total += lane;
    sum.fetch_add(total, std::memory_order_relaxed);
  });
  return sum;
}

std::vector<double> fastest(const std::vector<std::function<void()>>& runs, int repeat) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> best(runs.size(), 1e30);
  for (const auto& run : runs) run();
  for (int round = 0; round < repeat; ++round) {
    for (size_t i = 0; i < runs.size(); ++i) {
      const size_t which = (i + round) % runs.size();
      const auto begin = Clock::now();
      runs[which]();
      const std::chrono::duration<double> spent = Clock::now() - begin;
      best[which] = std::min(best[which], spent.count());
    }
  }
  return best;
}

int64_t last_cache_bytes() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
  int64_t kilobytes = 0;
  return file >> kilobytes ? kilobytes << 10 : int64_t{64} << 20;
}

// ---- values -----------------------------------------------------------------------------------

std::vector<uint8_t> random_values(int64_t count, Dtype dtype, uint32_t seed, float divisor) {
  std::minstd_rand generator(seed + 1);
  std::vector<uint8_t> bytes(count * element_size(dtype));
  for (int64_t i = 0; i < count; ++i) {
    const float value = (static_cast<float>(generator() % 20001) / 10000 - 1) / divisor;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype == Dtype::kFloat32) {
      std::memcpy(&bytes[4 * i], &bits, 4);
    } else {  // bfloat16, rounded half up
      const auto half = static_cast<uint16_t>((bits + 0x8000) >> 16);
      std::memcpy(&bytes[2 * i], &half, 2);
    }
  }
  return bytes;
}

float value_at(const uint8_t* data, Dtype dtype, int64_t index) {
  uint32_t bits = 0;
  if (dtype == Dtype::kFloat32) {
    std::memcpy(&bits, data + 4 * index, 4);
  } else {
    uint16_t half;
    std::memcpy(&half, data + 2 * index, 2);
    bits = static_cast<uint32_t>(half) << 16;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

const char* name_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? "float32" : "bfloat16"; }

// ---- writing ----------------------------------------------------------------------------------

Report::Report(const Options& options, int threads) : threads_(threads), quick_(options.quick) {
  hardware_ = processor() + ", " + std::to_string(threads) + " threads";
  commit_ = first_line_of("echo ${MILORA_COMMIT:-$(git describe --always --dirty 2>/dev/null)}");
  if (commit_.empty()) commit_ = "unknown";
  date_ = now();
  if (options.json.empty()) return;
  json_.open(options.json, std::ios::app);
  check(json_.good(), "--json", "cannot write ", options.json);
}

void Report::add(const Result& r, const std::string& isa) {
  const double ratio = r.seconds / r.base;
  std::printf("%-44s %-9s %-12s %10.2f us  %8.2f GB/s %9.2f GFLOP/s  ratio %6.3f to base\n",
              r.name.c_str(), name_of(r.dtype), isa.c_str(), r.seconds * 1e6,
              static_cast<double>(r.bytes) / r.seconds / 1e9,
              static_cast<double>(r.flops) / r.seconds / 1e9, ratio);
  if (!json_.is_open()) return;
  write(r, isa, "base", "time", r.base * 1e6, "us", 1.0, 0.0);
  write(r, isa, "milora", "time", r.seconds * 1e6, "us", ratio, 1.0);
  const auto rate = [&](int64_t amount) { return static_cast<double>(amount) / r.seconds / 1e9; };
  write(r, isa, "milora", "bandwidth", rate(r.bytes), "GB/s", 0.0, 0.0);
  write(r, isa, "milora", "rate", rate(r.flops), "GFLOP/s", 0.0, 0.0);
}

// A ratio or floor of 0 stands for none.
void Report::write(const Result& r, const std::string& isa, const char* provider,
                   const char* metric, double value, const char* unit, double ratio, double floor) {
  json_ << "{\"bench\": " << quoted(r.bench) << ", \"case\": " << quoted(r.name + " " + isa)
        << ", \"provider\": " << quoted(provider) << ", \"dtype\": " << quoted(name_of(r.dtype))
        << ", \"metric\": " << quoted(metric) << ", \"value\": " << number(value)
        << ", \"unit\": " << quoted(unit) << ", \"ratio\": " << (ratio > 0 ? number(ratio) : "null")
        << ", \"ratio_to\": " << (ratio > 0 ? "\"base\"" : "null")
        << ", \"floor\": " << (floor > 0 ? number(floor) : "null")
        << ", \"hardware\": " << quoted(hardware_)
        << ", \"versions\": {\"compiler\": " << quoted(__VERSION__)
        << "}, \"commit\": " << quoted(commit_) << ", \"date\": " << quoted(date_)
        << ", \"isa\": " << quoted(isa) << ", \"threads\": " << threads_
        << ", \"quick\": " << (quick_ ? "true" : "false");
  for (const auto& [key, amount] : r.extra) json_ << ", " << quoted(key) << ": " << amount;
  json_ << "}\n" << std::flush;
}

}  // namespace milora::bench
