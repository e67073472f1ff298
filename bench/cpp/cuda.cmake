# Benches of the CUDA kernels without Python and without torch:
#   cmake -S . -B build/bench-cuda -DMILORA_BENCH=ON -DMILORA_CUDA=ON
#   cmake --build build/bench-cuda
#   build/bench-cuda/bench/cpp/bench_prompt_router_cuda --quick
include(${PROJECT_SOURCE_DIR}/third_party/FindCutlass.cmake)
set(kernels ${PROJECT_SOURCE_DIR}/csrc/kernels)

add_library(cuda_bench OBJECT cuda_harness.cu
  ${kernels}/grouped_lora/decode/decode.cu
  ${kernels}/grouped_lora/prefill.cu
  ${kernels}/grouped_lora/sm90/fused.cu
  ${kernels}/grouped_lora/train.cu
  ${kernels}/prompt_router/backward.cu
  ${kernels}/prompt_router/forward.cu)
foreach(noun grouped_lora train prompt_router)
  add_executable(bench_${noun}_cuda bench_${noun}_cuda.cu)
  target_link_libraries(bench_${noun}_cuda PRIVATE cuda_bench)
endforeach()
foreach(target cuda_bench bench_grouped_lora_cuda bench_train_cuda bench_prompt_router_cuda)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
  target_include_directories(${target} SYSTEM PRIVATE
    "${CUTLASS_INCLUDE_DIR}" ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_compile_definitions(${target} PRIVATE MILORA_CUDA)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -lineinfo>)
  set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY Static)
endforeach()
