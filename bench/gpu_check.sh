#!/usr/bin/env bash
# Check and time every CUDA kernel on a GPU machine with torch >= 2.10 and no network.
#
#   bench/gpu_check.sh                     all stages, one after the other
#   bench/gpu_check.sh test g1 report      some of them
#   bench/gpu_check.sh --list              their names
#   OUT=dir PYTHON=python bench/gpu_check.sh
#
# Stages, each made to end within 8 minutes, and stopped after LIMIT seconds (480):
#   load       the library as it lies in milora/lib, built here only if there is none
#   test       the ops' tests on the GPU, against float64; what was seen correct, into $OUT
#   model      routed generation and gradients of a whole model, GPU against CPU
#   memcheck, racecheck, initcheck   compute-sanitizer over the ops' tests against the reference
#   memcheck_variants, racecheck_variants, initcheck_variants   the same with rank gates and cores
#   g1 ... g5, pool   the benches of bench/bench_gpu.py
#   train      the training op beside PEFT's expression
#   cpp        the C++ benches, if build/bench-cuda has them (see bench/cpp/cuda.cmake); prefill
#              beside CUTLASS's grouped GEMM
#   report     bench/results/GPU.md from all JSON lines
# Rivals' kernels: `python bench/peers/fetch.py` on a machine with a network, then copy
# bench/peers/unpacked/ here. Without them the benches say that they are absent.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-build/gpu}"
LIMIT="${LIMIT:-480}"
STAGES=(load test model memcheck racecheck initcheck memcheck_variants racecheck_variants
  initcheck_variants g1 g2 g3 g4 g5 pool train cpp report)
LINES="$OUT/gpu.jsonl"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1  # nothing here needs the network

ops_tests=(tests/test_grouped_lora.py tests/test_prompt_router.py tests/test_fused_lora.py
  tests/test_prefill_wgmma.py tests/test_cuda_graphs.py tests/test_pool_copies.py)
variants=(tests/test_rank_gates.py tests/test_cores.py)  # of grouped_lora_

stage_load() {
  if [ ! -e milora/lib/libmilora_ops.so ]; then
    MILORA_CUDA=1 "$PYTHON" setup.py --quiet build_ext --inplace || return 1
  fi
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

stage_test() {
  local status=0
  "$PYTHON" -m pytest -m cuda --junitxml="$OUT/tests.xml" "${ops_tests[@]}" \
    "${variants[@]}" || status=1
  "$PYTHON" bench/gpu_correct.py "$OUT/tests.xml" --json "$LINES" && return $status
}

stage_model() { "$PYTHON" -m pytest -m cuda tests/test_cuda_model.py; }

sanitize() {  # list of tests, tool, options
  local sanitizer
  local -n tests="$1"
  shift
  sanitizer="$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)"
  if [ -z "$sanitizer" ]; then
    echo "no compute-sanitizer on this machine: skipped"
    return 0
  fi
  # Without torch's cache each tensor is an allocation of its own, whose end is watched.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$@" --error-exitcode 9 \
    "$PYTHON" -m pytest -m cuda -k "reference" "${tests[@]}"
}

# torch reads what it never wrote in places of its own (padding of its allocator's blocks): only
# this project's kernels are watched.
initcheck=(initcheck --kernel-name kernel_substring=milora)
stage_memcheck() { sanitize ops_tests memcheck; }
stage_racecheck() { sanitize ops_tests racecheck; }
stage_initcheck() { sanitize ops_tests "${initcheck[@]}"; }
stage_memcheck_variants() { sanitize variants memcheck; }
stage_racecheck_variants() { sanitize variants racecheck; }
stage_initcheck_variants() { sanitize variants "${initcheck[@]}"; }

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
for name in "$@"; do
  echo "== $name"
  begin=$SECONDS
  timeout "$LIMIT" bash "bench/gpu_check.sh" --stage "$name"
  status=$?
  if [ $status = 0 ]; then
    echo "== $name: ok, $((SECONDS - begin)) s"
  else
    failed+=("$name")
    [ $status != 124 ] || echo "stopped after $LIMIT s"
    echo "== $name: FAILED, $((SECONDS - begin)) s"
  fi
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
