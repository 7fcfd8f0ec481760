# SPDX-License-Identifier: Apache-2.0
# Sourced by the scripts here: which Python, and where the results go.
#
#   PYTHON           the Python with deepcompile (default: python3; .venv's after `make install`)
#   NUM_NODES        hosts (1; all of HOSTFILE, if that is set)
#   NGPUS_PER_NODE   ranks on each (the hostfile's slots; on one host all GPUs, or 2 on a CPU)
#   HOSTFILE         lines `node-0 slots=8`, for more than one host (hostfile_n$NUM_NODES, in this
#                    folder or beside the script)
#   SLURM            1: the nodes of this Slurm allocation instead, all or NUM_NODES of them
#   LAUNCH_ARGS      more of `deepcompile launch`: '--ssh-port 2222', '--srun-args=--mem=0'
#   PROFILE_DIR      folder of rows.jsonl, result.txt, traces; LOG_BASE  folder of logs (logs)
#   MODEL            models to run instead of the script's own, separated by commas
#   NUM_LAYERS       cut every model; -16: at most 16 layers, as this machine's memory allows
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
fi
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("deepcompile"))' ||
  export PYTHONPATH="$root/python${PYTHONPATH:+:$PYTHONPATH}"

hosts=hostfile_n${NUM_NODES:-1}  # Python takes it from this folder by itself
if [ -z "${HOSTFILE:-}" ] && [ ! -f "$hosts" ] && [ -f "$here/$hosts" ]; then
  export HOSTFILE=$here/$hosts
fi

usage() {  # the comment that the script begins with, and the variables above
  sed -n '3,/^[^#]/{/^#/{s/^# \{0,1\}//;p}}' "$0"
  echo
  sed -n '/^#   PYTHON/,/^[^#]/{/^#/{s/^# \{0,1\}//;p}}' "$here/common.sh"
}

case " $* " in
  *" --help "* | *" -h "*)
    usage
    echo
    exec "$PYTHON" -m deepcompile.bench.sweep --help
    ;;
esac

sweep() {
  exec "$PYTHON" -m deepcompile.bench.sweep "$@" ${NUM_LAYERS:+--num-layers="$NUM_LAYERS"}
}
