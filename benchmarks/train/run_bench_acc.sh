#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Gradients accumulated over 2, 4, 8, 16 micro-batches: batch 1, sequence 1024.
#
#   benchmarks/train/run_bench_acc.sh --num-layers 16 --bench_step 30
#
# Interrupted, the same command goes on. All options are those of the sweep, see below.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
sweep acc "$@"
