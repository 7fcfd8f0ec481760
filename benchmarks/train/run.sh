#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One condition on all ranks, with the seed benchmark's options and a log under logs/.
#
#   benchmarks/train/run.sh --backend fsdp --compile --model llama-3-8b --seq-length 1024
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) help=1 ;; *) help= ;; esac
arguments=("$@")
set --
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ -z "$help" ] || usage
exec "$PYTHON" -m deepcompile.bench.one "${arguments[@]}"
