# SPDX-License-Identifier: Apache-2.0
"""The commands of a job: what runs on a host, and the ssh or srun that starts it."""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence

from ..errors import UserError
from .hosts import Host

FORWARDED = (
    "NCCL_*", "GLOO_*", "PYTHONPATH", "OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)  # fmt: skip
"""Variables that the hosts of a hostfile get without being asked for."""
SSH_OPTIONS = (
    "BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=15", "ServerAliveCountMax=3",
)  # fmt: skip
"""No passwords; a host that does not answer is given up after 10 s, one that is gone after 45 s."""
NODE_RANK = "@NODE_RANK@"


def forwarded(environ: Mapping[str, str], asked: Sequence[str]) -> dict[str, str]:
    """The variables for each host: the usual ones that are set, then those of --env."""
    found = {
        name: environ[name]
        for name in sorted(environ)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in FORWARDED)
    }
    if "PYTHONPATH" in found:  # whose folders may be relative to this one, not to --workdir
        folders = [os.path.abspath(folder) for folder in found["PYTHONPATH"].split(os.pathsep)]
        found["PYTHONPATH"] = os.pathsep.join(folders)
    return {**found, **asked_for(environ, asked)}


def asked_for(environ: Mapping[str, str], asked: Sequence[str]) -> dict[str, str]:
    """What --env NAME and --env NAME=VALUE say."""
    found = {}
    for text in asked:
        name, equals, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"[launch] --env {text}: write it as NAME or NAME=VALUE.")
        if not equals and name not in environ:
            raise UserError(
                f"[launch] --env {name}: is not set here. Set it, or give {name}=VALUE."
            )
        found[name] = value if equals else environ[name]
    return found


def torchrun(
    request: argparse.Namespace, nodes: int, rank: str, ranks: str, master: str
) -> list[str]:
    """torchrun's arguments on one node: a rendezvous that is settled beforehand."""
    return [
        "-m", "torch.distributed.run",
        "--nnodes", str(nodes), "--node-rank", rank, "--nproc-per-node", ranks,
        "--master-addr", master, "--master-port", str(request.master_port),
        *request.torchrun,
    ]  # fmt: skip


def master_address(request: argparse.Namespace, first: str) -> str:
    """Where the ranks meet: --master-addr, else the first host, without a user."""
    address = request.master_addr or first.rpartition("@")[2]
    return f"[{address}]" if ":" in address and not address.startswith("[") else address


def python(request: argparse.Namespace) -> str:
    return request.python or sys.executable


def on_host(
    request: argparse.Namespace, hosts: Sequence[Host], index: int, env: Mapping[str, str]
) -> str:
    """The line that a host's shell runs."""
    host = hosts[index]
    if host.partial:
        env = {**env, "CUDA_VISIBLE_DEVICES": ",".join(map(str, host.chosen))}
    master = master_address(request, hosts[0].name)
    arguments = torchrun(request, len(hosts), str(index), str(len(host.chosen)), master)
    settings = [f"{name}={value}" for name, value in env.items()]
    command = ["env", *settings, python(request), "-m", "deepcompile.launch.node", *arguments]
    return f"cd {shlex.quote(request.workdir)} && exec {shlex.join(command)}"


def ssh(
    request: argparse.Namespace, hosts: Sequence[Host], index: int, env: Mapping[str, str]
) -> list[str]:
    """ssh to a host; what the user says of ssh comes first, since ssh takes the first word."""
    command = ["ssh", *split(request.ssh_args, "--ssh-args")]
    if request.ssh_port is not None:
        command += ["-p", str(request.ssh_port)]
    for option in SSH_OPTIONS:
        command += ["-o", option]
    return [*command, "-T", hosts[index].name, on_host(request, hosts, index, env)]


def srun(
    request: argparse.Namespace, names: Sequence[str], ranks: str, environ: Mapping[str, str]
) -> list[str]:
    """srun of one torchrun a node. Variables travel by themselves; --env's are set there."""
    arguments = torchrun(request, len(names), NODE_RANK, ranks, master_address(request, names[0]))
    env = [f"{name}={value}" for name, value in asked_for(environ, request.env).items()]
    inside = shlex.join([*(["env", *env] if env else []), python(request), *arguments])
    inside = "exec " + inside.replace(NODE_RANK, '"$SLURM_PROCID"')
    count = len(names)
    command = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1"]
    command += [f"--nodelist={','.join(names)}", f"--chdir={request.workdir}", "--export=ALL"]
    command += ["--kill-on-bad-exit=1", "--quit-on-interrupt", "--label"]
    command += ["--cpu-bind=none"]  # or torchrun and all its ranks may share one task's core
    return [*command, *split(request.srun_args, "--srun-args"), "/bin/sh", "-c", inside]


def split(text: str, option: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"[launch] {option} {text}: {error}. Quote it as for a shell.") from None


def printed(command: Sequence[str]) -> str:
    """A command as a shell would read it."""
    return shlex.join(command)
