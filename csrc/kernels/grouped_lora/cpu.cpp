// Compiled once per instruction set: CMake defines MILORA_ISA as the namespace.
#include "kernels/grouped_lora/cpu.h"

#include "kernels/grouped_lora/backward_cpu.h"
#include "kernels/grouped_lora/forward_cpu.h"

namespace milora::MILORA_ISA {

const GroupedLoraCpu kGroupedLoraCpu = {
    .shrink = shrink,
    .core = core,
    .expand = expand,
    .transpose_b = transpose_b,
    .backward_rows = backward_rows,
    .backward_dx = backward_dx,
    .backward_da = backward_da,
    .backward_db = backward_db,
};

}  // namespace milora::MILORA_ISA
