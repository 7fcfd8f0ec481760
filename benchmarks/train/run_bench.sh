#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Llama-3-70B and Mixtral-8x7B, batch 1, 2, 4, sequences 512, 1024, 2048, on every framework.
#
#   benchmarks/train/run_bench.sh --num-layers 16 --bench_step 30
#
# Interrupted, the same command goes on. All options are those of the sweep, see below.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
sweep bench "$@"
