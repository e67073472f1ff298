#Benches of the CUDA kernels without Python and without torch:
#cmake - S.- B build / bench - cuda - DMILORA_BENCH = ON - DMILORA_CUDA = \
                                                          ON && cmake-- build build / bench - cuda
#build / bench - cuda / bench / cpp / bench_prompt_router_cuda-- quick
include(${PROJECT_SOURCE_DIR} / third_party / FindCutlass.cmake) set(lora ${PROJECT_SOURCE_DIR} /
                                                                     csrc / kernels / grouped_lora)
    set(router ${PROJECT_SOURCE_DIR} / csrc / kernels / prompt_router)
        set(kernels_grouped_lora ${lora} / decode / decode.cu ${lora} / prefill.cu ${lora} / sm90 /
            fused.cu) set(kernels_train ${lora} / train.cu) set(kernels_prompt_router ${router} /
                                                                forward.cu ${router} / backward.cu)

            add_library(cuda_harness OBJECT cuda_harness.cu)
                target_include_directories(cuda_harness PRIVATE ${PROJECT_SOURCE_DIR} /
                                           csrc) foreach (noun grouped_lora train prompt_router)
                    add_executable(bench_${noun} _cuda bench_${noun} _cuda.cu ${kernels_${noun}})
                        target_include_directories(bench_${noun} _cuda PRIVATE ${
                                                       PROJECT_SOURCE_DIR} /
                                                   csrc) target_include_directories(bench_${
                            noun} _cuda SYSTEM PRIVATE "${CUTLASS_INCLUDE_DIR}" ${
                            CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
                            target_compile_definitions(bench_${noun} _cuda PRIVATE MILORA_CUDA)
                                target_compile_options(bench_${
                                    noun} _cuda PRIVATE $<$<COMPILE_LANGUAGE : CUDA> : --expt -
                                                          relaxed - constexpr - lineinfo>)
                                    target_link_libraries(bench_${noun} _cuda PRIVATE cuda_harness)
                                        set_target_properties(bench_${
                                            noun} _cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
                                            endforeach()
