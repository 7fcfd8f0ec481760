#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One condition or a sweep on several hosts, started here over ssh by `deepcompile launch`.
#
#   NUM_NODES=4 benchmarks/train/run_multinode.sh --backend fsdp --compile --model llama-3-8b
#   NUM_NODES=4 benchmarks/train/run_multinode.sh bench --seq-lengths 1024
#   SLURM=1 benchmarks/train/run_multinode.sh bench         # with srun, in an allocation
#
# Options alone are one condition's, as in run.sh; a suite as the first word is a sweep. With one
# node (the default) it is run.sh or the sweep on this host. The working folder has to be one that
# all hosts share at the same path, with the same Python: the first host's rank 0 writes the rows,
# and the sweep reads them here. This host decides for all of them what --dtype auto is, how deep a
# model cut to memory is, and which peers can run: start on one with the same GPUs, or give --dtype
# and --num-layers.
set -euo pipefail
directory=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
case "${1:-}" in
  -h | --help | [!-]*) ;;
  *) exec "$directory/run.sh" "$@" ;;
esac
if [ "$1" = run.sh ]; then
  shift
  exec "$directory/run.sh" "$@"
fi
source "$directory/common.sh"
sweep "$@"
