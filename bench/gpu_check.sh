#!/usr/bin/env bash
# Check and time every CUDA kernel on a GPU machine with torch >= 2.10 and no network.
#
#   bench/gpu_check.sh                     all stages, one after the other
#   bench/gpu_check.sh test bench          some of them
#   OUT=dir PYTHON=python bench/gpu_check.sh
#
# Stages, each under 8 minutes:
#   load       the library as it lies in milora/lib, built here only if there is none
#   test       the ops' tests on the GPU, against float64
#   model      routed generation and gradients of a whole model, GPU against CPU
#   sanitizer  memcheck and racecheck over the ops' tests (if compute-sanitizer is there)
#   bench      the benches on the GPU, JSON lines into $OUT/gpu.jsonl
#   report     bench/results/GPU.md from all JSON lines
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-build/gpu}"
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=()

ops_tests=(tests/test_grouped_lora.py tests/test_prompt_router.py tests/test_fused_lora.py
  tests/test_cuda_graphs.py tests/test_pool_copies.py)

stage_load() {
  if [ ! -e milora/lib/libmilora_ops.so ]; then
    MILORA_CUDA=1 "$PYTHON" setup.py --quiet build_ext --inplace || return 1
  fi
  "$PYTHON" -c '
import torch
from milora import _build
assert torch.cuda.is_available(), "torch sees no GPU"
archs = _build.cuda_archs()
assert archs, "milora/lib/libmilora_ops.so was built without CUDA: build it with MILORA_CUDA=1"
print("milora", _build.load_library().milora_version().decode(), "for", ", ".join(archs))
print("torch", torch.__version__, "on", torch.cuda.get_device_name())'
}

stage_test() { "$PYTHON" -m pytest -m cuda "${ops_tests[@]}"; }

stage_model() { "$PYTHON" -m pytest -m cuda tests/test_cuda_model.py; }

stage_sanitizer() {
  local sanitizer
  sanitizer="$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)"
  if [ -z "$sanitizer" ]; then
    echo "no compute-sanitizer on this machine: skipped"
    return 0
  fi
  local tool
  for tool in memcheck racecheck; do
    "$sanitizer" --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m pytest -m cuda -k "reference" "${ops_tests[@]}" || return 1
  done
}

stage_bench() {
  local bench
  for bench in bench/bench_*.py; do
    "$PYTHON" "$bench" --device cuda --json "$OUT/gpu.jsonl" || return 1
  done
}

stage_report() { "$PYTHON" bench/gpu_report.py "$OUT/gpu.jsonl"; }

for stage in "${@:-load test model sanitizer bench report}"; do
  for name in $stage; do
    echo "== $name"
    if "stage_$name"; then echo "== $name: ok"; else failed+=("$name"); echo "== $name: FAILED"; fi
  done
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
