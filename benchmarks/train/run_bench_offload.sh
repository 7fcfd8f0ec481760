#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Optimizer states on the host: Llama-3-70B, batch 1, sequence 1024.
#
#   benchmarks/train/run_bench_offload.sh --num-layers 16 --bench_step 30
#
# Interrupted, the same command goes on. All options are those of the sweep, see below.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
export PROFILE_DIR=${PROFILE_DIR:-profile_offload} LOG_BASE=${LOG_BASE:-logs_offload}
# Blocks that are moved should not be cut up.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-max_split_size_mb:128}
sweep offload "$@"
