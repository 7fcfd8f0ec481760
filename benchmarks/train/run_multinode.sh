#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A sweep on several hosts, started here over ssh by `deepcompile launch --hostfile`.
#
#   NUM_NODES=4 benchmarks/train/run_multinode.sh bench --seq-lengths 1024
#   NUM_NODES=4 benchmarks/train/run_multinode.sh run.sh --backend fsdp --compile
#
# The hosts are in $HOSTFILE, or hostfile_n$NUM_NODES beside this script. All of them need this
# folder at the same path. The first argument is a suite, or run.sh for one condition.
set -euo pipefail
export NUM_NODES=${NUM_NODES:-4}
directory=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export HOSTFILE=${HOSTFILE:-$directory/hostfile_n$NUM_NODES}
export NGPUS_PER_NODE=${NGPUS_PER_NODE:-8}
if [ "${1:-}" = run.sh ]; then
  shift
  exec "$directory/run.sh" "$@"
fi
source "$directory/common.sh"
if [ ! -f "$HOSTFILE" ]; then
  echo "run_multinode.sh: error: no hostfile $HOSTFILE. Write lines such as 'node-0 slots=8'." >&2
  exit 2
fi
sweep "${@:-bench}"
