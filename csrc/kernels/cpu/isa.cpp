// Chooses the instruction set, and exports the choice to Python's loader.
#include "kernels/cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "common/check.h"
#include "common/macros.h"

namespace milora {
namespace {

struct IsaEntry {
  CpuIsa isa;
  const char* name;
};

#define MILORA_ISA_ENTRY(name) {CpuIsa::name, #name},
constexpr IsaEntry kEntries[] = {MILORA_FOR_EACH_ISA(MILORA_ISA_ENTRY)};
#undef MILORA_ISA_ENTRY

bool runs_here(CpuIsa isa) {
#ifdef MILORA_X86
  // The builtin also asks the operating system whether it saves the wide registers.
  switch (isa) {
    case CpuIsa::avx512_bf16:
      return runs_here(CpuIsa::avx512) && __builtin_cpu_supports("avx512bf16");
    case CpuIsa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case CpuIsa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case CpuIsa::baseline:
      return true;
  }
#endif
  return isa == CpuIsa::baseline;
}

std::string runnable_names() {
  std::string names;
  for (const IsaEntry& entry : kEntries) {
    if (runs_here(entry.isa)) names += (names.empty() ? "" : ", ") + std::string(entry.name);
  }
  return names;
}

CpuIsa parse(const char* name) {
  for (const IsaEntry& entry : kEntries) {
    if (std::strcmp(entry.name, name) == 0 && runs_here(entry.isa)) return entry.isa;
  }
  fail("MILORA_CPU_ISA", "must be one of ", runnable_names(), " on this CPU, got '", name, "'");
}

CpuIsa detect() {
  const char* forced = std::getenv("MILORA_CPU_ISA");
  if (forced != nullptr && *forced != '\0') return parse(forced);
  CpuIsa best = CpuIsa::baseline;
  for (const IsaEntry& entry : kEntries) {
    if (runs_here(entry.isa)) best = entry.isa;
  }
  return best;
}

constexpr int kUnset = -1;
std::atomic<int> chosen{kUnset};

}  // namespace

CpuIsa cpu_isa() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa == kUnset) {
    isa = static_cast<int>(detect());
    chosen.store(isa, std::memory_order_relaxed);
  }
  return static_cast<CpuIsa>(isa);
}

// The name of the set in use, or null after a failure, whose message then stands in *error. The
// message lives until the next call on this thread. `name` null: no change.
MILORA_EXPORT const char* milora_cpu_isa(const char* name, const char** error) {
  static thread_local std::string message;
  try {
    if (name != nullptr) chosen.store(static_cast<int>(parse(name)));
    const CpuIsa isa = cpu_isa();
    for (const IsaEntry& entry : kEntries) {
      if (entry.isa == isa) return entry.name;
    }
  } catch (const std::exception& exception) {
    message = exception.what();
  }
  *error = message.c_str();
  return nullptr;
}

// Comma-separated names of the sets that this CPU can run.
MILORA_EXPORT const char* milora_cpu_isas() {
  static const std::string names = runnable_names();
  return names.c_str();
}

}  // namespace milora
