#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <exception>

#include "common/check.h"
#include "cuda_harness.h"

namespace milora::bench {
namespace {

constexpr int kCaches = 4;  // copies hold so many times the last cache
constexpr int kMaxCopies = 512;

// A number in [-1, 1) that depends on seed and index alone.
__device__ float random_at(uint32_t seed, int64_t index) {
  uint32_t bits = static_cast<uint32_t>(index) * 2654435761u + seed * 2246822519u + 374761393u;
  bits = (bits ^ (bits >> 15)) * 2246822519u;
  bits = (bits ^ (bits >> 13)) * 3266489917u;
  bits ^= bits >> 16;
  return static_cast<float>(bits >> 8) * (2.0f / (1 << 24)) - 1.0f;
}

__global__ void fill_bf16(uint16_t* data, int64_t count, uint32_t seed, float scale) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += step) {
    data[i] = static_cast<uint16_t>(__float_as_uint(random_at(seed, i) * scale) >> 16);
  }
}

__global__ void fill_float(float* data, int64_t count, uint32_t seed, float scale) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += step) {
    data[i] = random_at(seed, i) * scale;
  }
}

std::string first_line_of(const char* command) {
  std::FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return "";
  char line[256] = "";
  const bool read = std::fgets(line, sizeof line, pipe) != nullptr;
  pclose(pipe);
  return read ? std::string(line, std::strcspn(line, "\n")) : "";
}

Options parse(int argc, char** argv, const char* noun) {
  Options options;
  const auto usage = [&](int code) {
    std::fprintf(code == 0 ? stdout : stderr,
                 "Times the CUDA kernels of %s, without Python and torch.\n\n"
                 "usage: %s [--quick] [--repeat N] [--json FILE]\n",
                 noun, argv[0]);
    std::exit(code);
  };
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--help") usage(0);
    if (option == "--quick") {
      options.quick = true;
      continue;
    }
    if (i + 1 == argc) usage(2);
    const std::string value = argv[++i];
    if (option == "--repeat") {
      options.repeat = std::atoi(value.c_str());
    } else if (option == "--json") {
      options.json = value;
    } else {
      usage(2);
    }
  }
  if (options.repeat < 0) usage(2);
  return options;
}

// ---- graphs -----------------------------------------------------------------------------------

class Graph {
 public:
  Graph(int number, const Launch& launch) : number_(number) {
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream");
    check_cuda(launch(0, stream_), "the kernel's launch");
    check_cuda(cudaStreamSynchronize(stream_), "the kernel");
    check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal), "a capture");
    int error = cudaSuccess;
    for (int turn = 0; turn < number && error == cudaSuccess; ++turn) {
      error = launch(turn, stream_);
    }
    cudaGraph_t graph = nullptr;
    check_cuda(cudaStreamEndCapture(stream_, &graph), "the capture's end");
    check_cuda(error, "a captured launch");
    check_cuda(cudaGraphInstantiate(&graph_, graph, 0), "a graph");
    check_cuda(cudaGraphDestroy(graph), "a graph");
    check_cuda(cudaEventCreate(&begin_), "an event");
    check_cuda(cudaEventCreate(&end_), "an event");
  }
  ~Graph() {
    cudaGraphExecDestroy(graph_);
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
    cudaStreamDestroy(stream_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  // Seconds of one call.
  double replay() {
    check_cuda(cudaEventRecord(begin_, stream_), "an event");
    check_cuda(cudaGraphLaunch(graph_, stream_), "a replay");
    check_cuda(cudaEventRecord(end_, stream_), "an event");
    check_cuda(cudaEventSynchronize(end_), "the replayed kernels");
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, begin_, end_), "the time");
    return milliseconds / 1e3 / number_;
  }

 private:
  int number_;
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

// Copies half of `bytes`, which moves `bytes`; each turn has its own.
Launch copy_of(const Memory& memory, int64_t bytes) {
  const int64_t half = std::max<int64_t>(16, bytes / 32 * 16);
  const auto places = static_cast<int>(std::max<int64_t>(1, memory.bytes() / (2 * half)));
  return [&memory, half, places](int turn, cudaStream_t stream) -> int {
    const int64_t at = turn % places * 2 * half;
    return cudaMemcpyAsync(memory.at(at), memory.at(at + half), half, cudaMemcpyDeviceToDevice,
                           stream);
  };
}

Gpu find_gpu() {
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, 0), "a GPU");
  Gpu found{properties.name, 10 * properties.major + properties.minor, properties.l2CacheSize, 0};
  const Memory memory(int64_t{1} << 30);
  Graph copies(4, copy_of(memory, memory.bytes() / 4));
  double best = 1e30;
  for (int i = 0; i < 20; ++i) best = std::min(best, copies.replay());
  found.bytes_per_s = static_cast<double>(memory.bytes() / 4) / best;
  return found;
}

}  // namespace

int run_bench(int argc, char** argv, const char* noun, void (*run)(const Options&)) {
  try {
    run(parse(argc, argv, noun));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_%s_cuda: %s\n", noun, error.what());
    return EXIT_FAILURE;
  }
  return EXIT_SUCCESS;
}

void check_cuda(int error, const char* what) {
  check(error == cudaSuccess, "bench", what, " must succeed, got ",
        cudaGetErrorString(static_cast<cudaError_t>(error)));
}

const Gpu& gpu() {
  static const Gpu found = find_gpu();
  return found;
}

int num_copies(int64_t bytes, const Options& options) {
  if (options.quick) return 2;
  const int64_t wanted = (kCaches * gpu().cache + bytes - 1) / bytes;
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, kMaxCopies));
}

// ---- memory -----------------------------------------------------------------------------------

Memory::Memory(int64_t bytes) : bytes_(bytes) {
  check_cuda(cudaMalloc(&data_, std::max<int64_t>(bytes, 16)), "device memory");
  check_cuda(cudaMemset(data_, 0, std::max<int64_t>(bytes, 16)), "device memory");
}

Memory::~Memory() { cudaFree(data_); }

Memory& Memory::random_bf16(uint32_t seed, float scale) {
  fill_bf16<<<1024, 256>>>(at<uint16_t>(), bytes_ / 2, seed, scale);
  check_cuda(cudaDeviceSynchronize(), "random numbers");
  return *this;
}

Memory& Memory::random_float(uint32_t seed, float scale) {
  fill_float<<<1024, 256>>>(at<float>(), bytes_ / 4, seed, scale);
  check_cuda(cudaDeviceSynchronize(), "random numbers");
  return *this;
}

void Memory::copy_in(const void* data, int64_t bytes) {
  check(bytes <= bytes_, "bench", "values must fit into ", bytes_, " bytes, got ", bytes);
  check_cuda(cudaMemcpy(data_, data, bytes, cudaMemcpyHostToDevice), "a copy to the device");
}

void Memory::copy_out(void* data, int64_t byte, int64_t bytes) const {
  check(byte + bytes <= bytes_, "bench", "a copy must end within ", bytes_, " bytes");
  check_cuda(cudaMemcpy(data, at(byte), bytes, cudaMemcpyDeviceToHost), "a copy to the host");
}

std::vector<float> Memory::bf16(int64_t byte, int64_t count) const {
  std::vector<uint16_t> raw(count);
  copy_out(raw.data(), byte, 2 * count);
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(raw[i]) << 16;
    std::memcpy(&values[i], &bits, sizeof bits);
  }
  return values;
}

std::vector<float> Memory::floats(int64_t byte, int64_t count) const {
  std::vector<float> values(count);
  copy_out(values.data(), byte, 4 * count);
  return values;
}

// ---- report -----------------------------------------------------------------------------------

Report::Report(const Options& options, const char* bench) : options_(options), bench_(bench) {
  commit_ = first_line_of("echo ${MILORA_COMMIT:-$(git describe --always --dirty 2>/dev/null)}");
  if (commit_.empty()) commit_ = "unknown";
  const std::time_t seconds = std::time(nullptr);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S+00:00", std::gmtime(&seconds));
  date_ = text;
  std::printf("%s: copies at %.0f GB/s\n", gpu().name.c_str(), gpu().bytes_per_s / 1e9);
  if (options.json.empty()) return;
  json_.open(options.json, std::ios::app);
  check(json_.good(), "--json", "cannot write ", options.json);
}

void Report::time(const Result& r, int copies, const std::vector<Provider>& providers) {
  const Memory memory(std::min<int64_t>(r.bytes * copies, int64_t{1} << 30));
  std::vector<std::unique_ptr<Graph>> graphs;
  graphs.push_back(std::make_unique<Graph>(copies, copy_of(memory, r.bytes)));
  for (const Provider& provider : providers) {
    graphs.push_back(std::make_unique<Graph>(copies, provider.launch));
  }
  const int repeat = options_.repeat > 0 ? options_.repeat : options_.quick ? 5 : 50;
  const size_t number = graphs.size();
  std::vector<double> seconds(number, 1e30);
  for (int i = 0; i < repeat; ++i) {
    for (size_t j = 0; j < number; ++j) {  // every second round backwards
      const size_t one = i % 2 == 0 ? j : number - 1 - j;
      seconds[one] = std::min(seconds[one], graphs[one]->replay());
    }
  }
  const double base = seconds[0];
  write_time(r, "base", base, base);
  for (size_t j = 1; j < number; ++j) {
    const double share = static_cast<double>(r.bytes) / gpu().bytes_per_s / seconds[j];
    std::printf(
        "%-44s %-20s %10.2f us  %8.2f GB/s %9.2f TFLOP/s  ratio %6.3f to a copy, share %.3f\n",
        r.name.c_str(), providers[j - 1].name.c_str(), seconds[j] * 1e6,
        static_cast<double>(r.bytes) / seconds[j] / 1e9,
        static_cast<double>(r.flops) / seconds[j] / 1e12, seconds[j] / base, share);
    write_time(r, providers[j - 1].name, seconds[j], base);
  }
}

void Report::absent(const Result& r, const std::string& provider, const std::string& why) {
  std::printf("%-44s %-20s absent: %s\n", r.name.c_str(), provider.c_str(), why.c_str());
  if (!json_.is_open()) return;
  std::string reason = why;
  std::erase_if(reason, [](char c) { return c == '"' || c == '\\' || c < ' '; });
  begin_line(r, provider, "absent", 0, "") << ", \"reason\": \"" << reason << "\"}\n" << std::flush;
}

void Report::write_time(const Result& r, const std::string& provider, double seconds, double base) {
  if (!json_.is_open()) return;
  const double floor = static_cast<double>(r.bytes) / gpu().bytes_per_s;
  std::ofstream& line = begin_line(r, provider, "time", seconds * 1e6, "us");
  line << ", \"ratio\": " << seconds / base
       << ", \"ratio_to\": \"base\", \"floor\": " << floor / base
       << ", \"floor_us\": " << floor * 1e6 << ", \"bytes\": " << r.bytes
       << ", \"flops\": " << r.flops;
  if (provider != "base") line << ", \"share\": " << floor / seconds;
  line << "}\n" << std::flush;
}

// All of a line that does not depend on the metric; the caller closes it.
std::ofstream& Report::begin_line(const Result& r, const std::string& provider, const char* metric,
                                  double value, const char* unit) {
  json_ << "{\"bench\": \"" << bench_ << "\", \"case\": \"" << r.name << "\", \"provider\": \""
        << provider << "\", \"dtype\": \"bfloat16\", \"metric\": \"" << metric
        << "\", \"value\": " << value << ", \"unit\": \"" << unit << "\", \"hardware\": \""
        << gpu().name << "\", \"capability\": " << gpu().capability
        << ", \"versions\": {\"cuda\": \"" << CUDART_VERSION << "\"}, \"commit\": \"" << commit_
        << "\", \"date\": \"" << date_ << "\", \"kernel\": \"" << r.kernel
        << "\", \"quick\": " << (options_.quick ? "true" : "false");
  for (const auto& [key, amount] : r.extra) json_ << ", \"" << key << "\": " << amount;
  return json_;
}

}  // namespace milora::bench
