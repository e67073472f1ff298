#!/usr/bin/env bash
# Check and time every CUDA kernel on a GPU machine with torch >= 2.10 and no network.
#
#   bench/gpu_check.sh                     all stages, one after the other
#   bench/gpu_check.sh test g1 report      some of them
#   bench/gpu_check.sh --list              their names
#   OUT=dir PYTHON=python bench/gpu_check.sh
#
# Stages, each stopped after LIMIT seconds (480). DEADLINE=seconds bounds the whole run: no stage
# lasts longer than what is left, and those that would start with less than 20 s are named as not
# run. The tests need pytest-timeout, and are sooner done with pytest-xdist.
#   load       the library as it lies in milora/lib, built here only if there is none; the pybind11
#              module, if it was built for another Python; what is absent. If it fails, all ends
#   test       the ops' tests on the GPU, against float64; what was seen correct, into $OUT
#   quick      every bench small, to see at once which fails; times into $OUT/quick.jsonl
#   model      routed generation and gradients of a whole model, GPU against CPU
#   memcheck, racecheck, initcheck   compute-sanitizer over the ops' tests against the reference
#   memcheck_variants, racecheck_variants, initcheck_variants   the same with rank gates and cores
#   g1 ... g5, pool   the benches of bench/bench_gpu.py
#   train      the training op beside PEFT's expression
#   cpp        the C++ benches, if build/bench-cuda has them (see bench/cpp/cuda.cmake); prefill
#              beside CUTLASS's grouped GEMM
#   report     bench/results/GPU.md from all JSON lines
# On a machine that runs commands of ten minutes at most, three of them, each with DEADLINE=580:
#   bench/gpu_check.sh load test quick model g1
#   bench/gpu_check.sh load g3 g1 g4 pool train cpp memcheck
#   bench/gpu_check.sh load g2 g5 racecheck
# Without the repository there, MILORA_COMMIT says what is measured.
# Rivals' kernels: `python bench/peers/fetch.py` on a machine with a network, then copy
# bench/peers/unpacked/ here. Without them the benches say that they are absent.
#
# compute-sanitizer before 2026.4 reports what is no error (its release notes): initcheck and
# memcheck where cp.async fills with zeros, initcheck where a kernel that is not watched has written
# what ours read.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-build/gpu}"
LIMIT="${LIMIT:-480}"
STAGES=(load test quick model memcheck racecheck initcheck memcheck_variants racecheck_variants
  initcheck_variants g1 g2 g3 g4 g5 pool train cpp report)
LINES="$OUT/gpu.jsonl"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1  # nothing here needs the network

ops_tests=(tests/test_grouped_lora.py tests/test_prompt_router.py tests/test_fused_lora.py
  tests/test_prefill_wgmma.py tests/test_cuda_graphs.py tests/test_pool_copies.py)
variants=(tests/test_rank_gates.py tests/test_cores.py)  # of grouped_lora_
bench_cases=(g1 g2 g3 g4 g5 pool)

has() {
  "$PYTHON" -c 'import sys, importlib.util as u; sys.exit(not u.find_spec(sys.argv[1]))' "$1"
}

find_sanitizer() {
  command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null
}

# As CMakeLists.txt builds it, for a library that was carried to another Python.
build_native() {  # where to
  local isas=baseline version
  [ "$(uname -m)" != x86_64 ] || isas+=,avx2,avx512,avx512_bf16
  version="$(sed -n 's/^__version__ = "\(.*\)"/\1/p' milora/_version.py)"
  # shellcheck disable=SC2046  # several options
  c++ -O2 -std=c++20 -shared -fPIC -fvisibility=hidden -Icsrc \
    $("$PYTHON" -m pybind11 --includes) -DMILORA_VERSION="\"$version\"" \
    -DMILORA_ISA_NAMES="\"$isas\"" -DMILORA_CXX_COMPILER="\"c++ $(c++ -dumpversion)\"" \
    -DMILORA_CUDA_COMPILER='"nvcc"' \
    csrc/module.cpp csrc/pool/allocator.cpp -o "$1"
}

say_what_is_absent() {
  local module
  for module in pytest_timeout xdist transformers peft triton; do
    has "$module" || echo "absent: $module"
  done
  [ -d bench/peers/unpacked ] || echo "absent: bench/peers/unpacked, so no engines in g1 and g3"
  compgen -G "build/bench-cuda/bench/cpp/bench_*_cuda" >/dev/null ||
    echo "absent: build/bench-cuda, so no stage cpp"
  find_sanitizer >/dev/null || echo "absent: compute-sanitizer"
}

stage_load() {
  local native suffix
  if [ ! -e milora/lib/libmilora_ops.so ]; then
    MILORA_CUDA=1 "$PYTHON" setup.py --quiet build_ext --inplace || return 1
  fi
  suffix="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')"
  native="milora/_native$suffix"
  [ -e "$native" ] || build_native "$native" ||
    echo "absent: $native, so no test of the adapter pool"
  say_what_is_absent
  "$PYTHON" -c '
import sys
import torch
from milora import _build
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU")
archs = _build.cuda_archs()
if not archs:
    sys.exit("milora/lib/libmilora_ops.so was built without CUDA: build it with MILORA_CUDA=1")
print("milora", _build.load_library().milora_version().decode(), "for", ", ".join(archs))
print("torch", torch.__version__, "on", torch.cuda.get_device_name())'
}

reports=()
report_tests() {  # name of the report, pytest's arguments
  local left=$((${STAGE_SECONDS:-$LIMIT} - 40 - SECONDS))
  if [ $left -lt 10 ]; then
    echo "no time left for $1"
    return 1
  fi
  reports+=("$OUT/tests/$1.xml")
  # A hang ends its process. Interrupted before the stage's end, pytest still writes its report.
  timeout --foreground -s INT -k 10 $left "$PYTHON" -m pytest -m cuda --timeout 60 \
    --timeout-method thread --junitxml="${reports[-1]}" "${@:2}"
}

# An illegal access fails all that follow it in its process. With xdist the process ends there (see
# tests/conftest.py) and another takes its other tests; not by --dist loadfile, where it would be
# given the same test again, and end again. Without xdist each file has a process of its own.
stage_test() {
  local file status=0 files=("${ops_tests[@]}" "${variants[@]}")
  rm -rf "$OUT/tests"
  if has xdist; then
    report_tests all -n 8 --max-worker-restart 100 "${files[@]}"
    status=$?
  else
    for file in "${files[@]}"; do
      report_tests "$(basename "$file" .py)" "$file" || status=1
    done
  fi
  "$PYTHON" bench/gpu_correct.py "${reports[@]}" --json "$LINES" && return $status
}

stage_quick() {
  local name failed=()
  for name in "${bench_cases[@]}"; do
    timeout --foreground -k 10 90 "$PYTHON" bench/bench_gpu.py --quick --device cuda \
      --case "$name" --json "$OUT/quick.jsonl" || failed+=("$name")
  done
  [ ${#failed[@]} = 0 ] || { echo "failed when small: ${failed[*]}"; return 1; }
}

stage_model() { "$PYTHON" -m pytest -m cuda tests/test_cuda_model.py tests/test_prepared.py; }

# Their bulk copies, mbarriers, clusters and warpgroups are hazards to a racecheck before 2026.4.
hopper_kernels=(decode_cluster_kernel shrink_wgmma_kernel expand_wgmma_kernel fused_kernel)

sanitize() {  # list of tests, tool
  local kernel sanitizer version
  local -n tests="$1"
  # torch reads what it never wrote in places of its own (padding of its allocator's blocks): only
  # this project's kernels are watched.
  local options=(--tool "$2" --error-exitcode 9 --kernel-name kernel_substring=milora)
  if ! sanitizer="$(find_sanitizer)"; then
    echo "no compute-sanitizer on this machine: skipped"
    return 0
  fi
  version="$("$sanitizer" --version | sed -n 's/.*Version \([0-9.]*\).*/\1/p')"
  if [ "$2" = racecheck ] && [ "$(printf '%s\n' "$version" 2026.4 | sort -V | head -1)" != 2026.4 ]
  then
    echo "racecheck $version: without ${hopper_kernels[*]}"
    for kernel in "${hopper_kernels[@]}"; do
      options+=(--kernel-name-exclude "kernel_substring=$kernel")
    done
  fi
  # Without torch's cache each tensor is an allocation of its own, whose end is watched.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" "${options[@]}" \
    "$PYTHON" -m pytest -m cuda -k "reference" "${tests[@]}"
}

stage_memcheck() { sanitize ops_tests memcheck; }
stage_racecheck() { sanitize ops_tests racecheck; }
stage_initcheck() { sanitize ops_tests initcheck; }
stage_memcheck_variants() { sanitize variants memcheck; }
stage_racecheck_variants() { sanitize variants racecheck; }
stage_initcheck_variants() { sanitize variants initcheck; }

bench_gpu() { "$PYTHON" bench/bench_gpu.py --device cuda --case "$1" --json "$LINES"; }
stage_g1() { bench_gpu g1; }
stage_g2() { bench_gpu g2; }
stage_g3() { bench_gpu g3; }
stage_g4() { bench_gpu g4; }
stage_g5() { bench_gpu g5; }
stage_pool() { bench_gpu pool; }

stage_train() {
  "$PYTHON" bench/bench_grouped_lora.py --device cuda --case train --dtype bfloat16 --json "$LINES"
}

stage_cpp() {
  local program found=0
  for program in build/bench-cuda/bench/cpp/bench_*_cuda; do
    [ -x "$program" ] || continue
    found=1
    "$program" --json "$LINES" || return 1
  done
  [ $found = 1 ] || echo "build/bench-cuda has no benches: skipped"
}

stage_report() { "$PYTHON" bench/gpu_report.py "$LINES"; }

case "${1:-}" in
  --list) printf '%s\n' "${STAGES[@]}"; exit 0 ;;
  --stage) mkdir -p "$OUT"; "stage_$2"; exit ;;  # one stage, in a process that can be stopped
esac

mkdir -p "$OUT"
[ $# -gt 0 ] || set -- "${STAGES[@]}"
failed=()
for name in "$@"; do
  if [[ " ${STAGES[*]} " != *" $name "* ]]; then
    echo "gpu_check: no stage is called $name; there are: ${STAGES[*]}" >&2
    exit 2
  fi
done
not_run=()
for name in "$@"; do
  begin=$SECONDS
  left=$((${DEADLINE:-1000000} - begin))
  if [ $left -lt 20 ] || [[ " ${failed[*]} " == *" load "* ]]; then
    not_run+=("$name")
    continue
  fi
  echo "== $name"
  export STAGE_SECONDS=$((left < LIMIT ? left : LIMIT))
  if timeout -k 10 "$STAGE_SECONDS" bash "bench/gpu_check.sh" --stage "$name"; then
    echo "== $name: ok, $((SECONDS - begin)) s"
  else
    failed+=("$name")
    [ $((SECONDS - begin)) -lt "$STAGE_SECONDS" ] || echo "stopped after $STAGE_SECONDS s"
    echo "== $name: FAILED, $((SECONDS - begin)) s"
  fi
done
[ ${#failed[@]} = 0 ] || echo "failed: ${failed[*]}"
[ ${#not_run[@]} = 0 ] || echo "not run: ${not_run[*]}"
[ $((${#failed[@]} + ${#not_run[@]})) = 0 ]
