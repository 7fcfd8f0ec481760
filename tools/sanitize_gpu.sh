#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the tests of the GPU kernels under NVIDIA's compute-sanitizer: memcheck
# (what lies outside of an allocation, or is misaligned) and racecheck (shared
# memory). Ends with an error if a test fails or the sanitizer finds anything.
#
#   tools/sanitize_gpu.sh [pytest arguments]      e.g. -k squared_sum
#
# PYTHON names the Python to run (default python3); COMPUTE_SANITIZER the tool, which
# comes with the CUDA toolkit; SANITIZER_OPTIONS more options for it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
sanitizer=${COMPUTE_SANITIZER:-compute-sanitizer}
command -v "$sanitizer" >/dev/null || sanitizer=/usr/local/cuda/bin/compute-sanitizer
command -v "$sanitizer" >/dev/null || {
  echo "sanitize_gpu: compute-sanitizer is missing: install the CUDA toolkit, or set COMPUTE_SANITIZER" >&2
  exit 2
}
read -r -a options <<<"${SANITIZER_OPTIONS:-}"

check() {
  local tool=$1
  shift
  echo "== $tool =="
  "$sanitizer" --tool "$tool" --error-exitcode 99 ${options[@]+"${options[@]}"} \
    "$python" -m pytest -q -p no:cacheprovider -m "not alone" tests/gpu/test_kernels.py "$@"
}

tests=tests/gpu/test_kernels.py
# The profiler cannot run beside the sanitizer.
without=(--deselect "$tests::test_one_launch_updates_what_stands_together"
         --deselect "$tests::test_f64_parameters_stay_with_torch")
# memcheck: each tensor its own allocation, so that a step beyond one is seen; graphs need torch's
# allocator.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 check memcheck "${without[@]}" \
  --deselect "$tests::test_the_current_stream_and_cuda_graphs" "$@"
check racecheck "${without[@]}" "$@"
echo "memcheck and racecheck found nothing"
