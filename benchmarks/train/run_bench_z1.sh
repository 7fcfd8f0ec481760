#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Stage 1 (and DDP) on Llama-3-8B: batch 1, 2, 4, sequences 512, 1024, 2048.
#
#   benchmarks/train/run_bench_z1.sh --num-layers 16 --bench_step 30
#
# Interrupted, the same command goes on. All options are those of the sweep, see below.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
sweep z1 "$@"
