// Instruction sets: each CPU kernel file is compiled once per set into its own namespace, and the
// set is chosen once per process, from the CPU and from MILORA_CPU_ISA.
#pragma once

#ifdef MILORA_X86
#define MILORA_FOR_EACH_ISA(X) X(baseline) X(avx2) X(avx512) X(avx512_bf16)
#else
#define MILORA_FOR_EACH_ISA(X) X(baseline)
#endif

namespace milora {

#define MILORA_ISA_ENUM(name) name,
enum class CpuIsa { MILORA_FOR_EACH_ISA(MILORA_ISA_ENUM) };
#undef MILORA_ISA_ENUM

// The set in use. Throws if MILORA_CPU_ISA names one that this CPU cannot run.
CpuIsa cpu_isa();

}  // namespace milora

// Defines `const Table& name()`, which returns the table of the instruction set in use. Each set's
// table is the variable `kTable` of namespace milora::<set>, made by the kernel file of that set.
#define MILORA_DECLARE_TABLE(isa, Table, variable) \
  namespace isa {                                  \
  extern const Table variable;                     \
  }
