# SPDX-License-Identifier: Apache-2.0
"""The arguments of ``deepcompile launch``: ours, torchrun's, the script's."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence

from ..cli.arguments import Parser, positive, whole_number
from ..errors import UserError

EXAMPLES = """\
On one machine all arguments are torchrun's. With --hostfile or --slurm, those of torchrun
that are not about nodes and rendezvous may be given too, before the script.

examples:
  deepcompile launch --nproc-per-node 4 train.py --config ds_config.json
  deepcompile launch --hostfile hosts train.py --config ds_config.json
  deepcompile launch --hostfile hosts --include node-0,node-1:0-3 --dry-run train.py
  deepcompile launch --slurm --nproc-per-node 8 train.py
  deepcompile launch --nnodes 2 --nproc-per-node 8 --rdzv-endpoint host:29500 train.py"""

SETTLED = (
    "--nnodes", "--node-rank", "--standalone", "--local-addr",
    "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--rdzv-conf",
)  # fmt: skip
"""Options of torchrun that the launcher gives itself."""
EXCLUSIVE = (
    "--hostfile", "--slurm", "--include", "--exclude", "--num-nodes", "--env", "--workdir",
    "--python", "--ssh-port", "--ssh-args", "--srun-args", "--dry-run",
)  # fmt: skip
"""Our options that torchrun does not have."""
SHARED = ("--nproc-per-node", "--master-addr", "--master-port", "--log-dir")
"""Those that it has too: on one machine they are its own."""
RANKS_WORDS = ("auto", "gpu", "cpu", "xpu")
"""What torchrun takes for --nproc-per-node besides numbers."""
WITHOUT_VALUE = ("--slurm", "--dry-run")


def add_to(parser: argparse.ArgumentParser) -> None:
    """Our options."""
    add = parser.add_argument_group("several machines").add_argument
    add("--hostfile", metavar="FILE", help="lines such as `node-0 slots=8`: start over ssh")
    add("--slurm", action="store_true", help="start on the nodes of this Slurm allocation")
    nodes = "node[:slots], e.g. node-0,node-1:0,2-3; may be given again"
    add("--include", metavar="NODES", action="append", default=[], help=f"only these: {nodes}")
    add("--exclude", metavar="NODES", action="append", default=[], help="not these, likewise")
    add("--num-nodes", metavar="N", type=positive, help="only the first N of them")
    text = "ranks on each node; default: its slots, or the GPUs that Slurm gave"
    add("--nproc-per-node", "--nproc_per_node", metavar="N", help=text)
    text = "where the ranks meet; default: the first node's name"
    add("--master-addr", "--master_addr", metavar="HOST", help=text)
    text = "a free port there; default: 29500"
    add("--master-port", "--master_port", metavar="PORT", type=port, default=29500, help=text)
    text = "a variable for all nodes, from here without =V; may be given again; NCCL_*, GLOO_*, "
    text += "PYTHONPATH, OMP_NUM_THREADS and PYTORCH_*ALLOC_CONF go by themselves"
    add("--env", metavar="NAME[=V]", action="append", default=[], help=text)
    text = "folder to start in on each node; default: this one"
    add("--workdir", metavar="DIR", default=os.getcwd(), help=text)
    add("--python", metavar="FILE", help="Python on each node; default: this one's path")
    text = "one file a node, NODE.log; without it, the other nodes' lines start with [NODE]"
    add("--log-dir", "--log_dir", metavar="DIR", help=text)
    add("--ssh-port", metavar="PORT", type=port, help="ssh's port")
    text = "more arguments for ssh, as one word: --ssh-args='-i key'"
    add("--ssh-args", metavar="ARGS", default="", help=text)
    add("--srun-args", metavar="ARGS", default="", help="more arguments for srun, as one word")
    add("--dry-run", action="store_true", help="print the commands, start nothing")


def port(text: str) -> int:
    value = whole_number(text)
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port: give 1 to 65535")
    return value


def parse(arguments: Sequence[str]) -> argparse.Namespace | None:
    """What is asked for; None if it is torchrun on this machine alone.

    ``torchrun`` in the result holds torchrun's options, the script and its arguments.
    """
    ours = Parser(prog="deepcompile launch", add_help=False, allow_abbrev=False)
    add_to(ours)
    if not any(word.partition("=")[0] in EXCLUSIVE for word in arguments):
        return None
    at = _script_at(arguments)
    head = arguments[:at]
    request, others = ours.parse_known_args(head)
    if not (request.hostfile or request.slurm):
        used = [word.partition("=")[0] for word in head]
        used = [word for word in used if word in EXCLUSIVE]
        if used:
            raise UserError(f"[launch] {used[0]}: needs --hostfile or --slurm beside it.")
        return None
    if request.hostfile and request.slurm:
        raise UserError(
            "[launch] --hostfile, --slurm: both say where the nodes are. Give one of them."
        )
    for word in others:
        name = word.partition("=")[0].replace("_", "-")
        if name == "--max-restarts":
            raise UserError(
                "[launch] --max-restarts: ranks on several machines cannot be restarted in place: "
                "the first failure ends the job. Start it again from its last checkpoint."
            )
        if name in SETTLED:
            raise UserError(
                f"[launch] {name}: the launcher sets it. Use --num-nodes, --master-addr and "
                "--master-port."
            )
    if request.slurm and request.nproc_per_node is not None:
        check_ranks(request.nproc_per_node)
    request.torchrun = [*others, *arguments[at:]]
    request.workdir = os.path.abspath(request.workdir)
    return request


def check_script(arguments: Sequence[str]) -> None:
    """An error if the script is not there, or a number of ranks is none; what stands behind other
    options of torchrun is its affair."""
    at = 0
    while at < len(arguments) and arguments[at].startswith("-"):
        name, equals, value = arguments[at].partition("=")
        name = name.replace("_", "-")
        if name not in (*SHARED, *SETTLED):
            return
        alone = bool(equals) or name == "--standalone"
        if name == "--nproc-per-node":
            check_ranks(value if equals else " ".join(arguments[at + 1 : at + 2]))
        at += 1 if alone else 2
    if at >= len(arguments):
        raise UserError("[launch] script: is missing. Give one after the options.")
    if not os.path.exists(arguments[at]):
        raise UserError(
            f"[launch] {arguments[at]}: there is no such script in {os.getcwd()}. Check the path."
        )


def check_ranks(text: str) -> None:
    """An error unless torchrun takes this as --nproc-per-node."""
    if text not in RANKS_WORDS and not re.fullmatch(r"0*[1-9][0-9]{0,5}", text):
        raise UserError(
            f"[launch] --nproc-per-node {text or '(nothing)'}: give a positive number, or one of "
            f"{', '.join(RANKS_WORDS)}."
        )


def _script_at(arguments: Sequence[str]) -> int:
    """Where the script stands, after all options."""
    at = 0
    while at < len(arguments) and arguments[at].startswith("-"):
        name, equals, _ = arguments[at].partition("=")
        if name.replace("_", "-") not in (*EXCLUSIVE, *SHARED):
            return _script_after_torchruns(arguments)
        at += 1 if equals or name in WITHOUT_VALUE else 2
    if at >= len(arguments):
        raise UserError("[launch] script: is missing. Give one after the options.")
    return at


def _script_after_torchruns(arguments: Sequence[str]) -> int:
    """The same where there are options of torchrun: its parser knows which of them take a value."""
    from torch.distributed.run import get_args_parser

    parser = Parser(
        prog="deepcompile launch",
        parents=[get_args_parser()],
        add_help=False,
        conflict_handler="resolve",
        allow_abbrev=False,
    )
    add_to(parser)
    parsed = parser.parse_args(list(arguments))
    at = len(arguments) - len(parsed.training_script_args) - 1
    if arguments[at] != parsed.training_script:
        raise UserError(
            f"[launch] {parsed.training_script}: stands among options. Put it after all of them."
        )
    return at
