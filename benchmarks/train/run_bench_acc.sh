#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Gradients accumulated over 2, 4, 8, 16 micro-batches: batch 1, sequence 1024.
#
#   benchmarks/train/run_bench_acc.sh --num-layers 16 --bench_step 30
#
# Results go to profile_acc, apart from run_bench.sh's, so that the charts of `deepcompile plot
# --acc_step_eval` have the seed's names. Interrupted, the same command goes on. All options are
# those of the sweep, see below.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
export PROFILE_DIR=${PROFILE_DIR:-profile_acc}
sweep acc "$@"
