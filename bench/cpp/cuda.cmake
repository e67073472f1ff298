# Benches of the CUDA kernels without Python and without torch:
#   cmake -S . -B build/bench-cuda -DMILORA_BENCH=ON -DMILORA_CUDA=ON
#   cmake --build build/bench-cuda
#   build/bench-cuda/bench/cpp/bench_prompt_router_cuda --quick
# Most of the minutes go into CUTLASS; -DCMAKE_CUDA_ARCHITECTURES=90a-real (or another one) spares a
# third of them.
include(${PROJECT_SOURCE_DIR}/third_party/FindCutlass.cmake)
set(kernels ${PROJECT_SOURCE_DIR}/csrc/kernels)

add_library(cuda_bench OBJECT cuda_harness.cu
  ${kernels}/grouped_lora/decode/decode.cu
  ${kernels}/grouped_lora/prefill.cu
  ${kernels}/grouped_lora/sm90/fused.cu
  ${kernels}/grouped_lora/sm90/prefill.cu
  ${kernels}/grouped_lora/sm90/tensor_map.cu
  ${kernels}/grouped_lora/train.cu
  ${kernels}/prompt_router/backward.cu
  ${kernels}/prompt_router/forward.cu)
foreach(noun grouped_lora train prompt_router)
  add_executable(bench_${noun}_cuda bench_${noun}_cuda.cu)
  target_link_libraries(bench_${noun}_cuda PRIVATE cuda_bench)
endforeach()

# Rivals: one instantiation of CUTLASS a file. Ninja compiles one at a time, since those of sm_90a
# take 3.5 GB each.
set_property(GLOBAL APPEND PROPERTY JOB_POOLS cutlass=1)
add_library(cutlass_sm80 OBJECT cutlass_sm80_shrink.cu cutlass_sm80_expand.cu)
set(rivals cutlass_sm80)
if("90a-real" IN_LIST CMAKE_CUDA_ARCHITECTURES)
  add_library(cutlass_sm90 OBJECT cutlass_sm90_shrink.cu cutlass_sm90_expand.cu
    cutlass_sm90_swapped_shrink.cu cutlass_sm90_swapped_expand.cu)
  set_target_properties(cutlass_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
  target_compile_definitions(bench_grouped_lora_cuda PRIVATE MILORA_CUTLASS_SM90)
  list(APPEND rivals cutlass_sm90)
endif()
target_link_libraries(bench_grouped_lora_cuda PRIVATE ${rivals})
foreach(target IN LISTS rivals)
  set_target_properties(${target} PROPERTIES JOB_POOL_COMPILE cutlass)
endforeach()

foreach(target ${rivals} cuda_bench bench_grouped_lora_cuda bench_train_cuda bench_prompt_router_cuda)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
  target_include_directories(${target} SYSTEM PRIVATE
    "${CUTLASS_INCLUDE_DIR}" ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_compile_definitions(${target} PRIVATE MILORA_CUDA)
  target_compile_options(${target} PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:${MILORA_CUDA_OPTIONS}>")
  set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY Static)
endforeach()
