# SPDX-License-Identifier: Apache-2.0
"""``deepcompile launch``: torchrun here, on the hosts of a file over ssh, or in a Slurm job.

options reads the arguments, hosts and slurm find the nodes, commands builds what runs on each,
job runs it all from here, and node is what runs on each host of a hostfile. Nothing here
starts torch but the check of torchrun's arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence


def launch(arguments: Sequence[str]) -> int:
    """Runs a job; returns its exit code. On one machine this becomes torchrun of this Python."""
    from . import options

    request = options.parse(arguments)
    if request is None:
        options.check_script(arguments)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *arguments])
    return _slurm(request) if request.slurm else _hostfile(request)


def _hostfile(request: argparse.Namespace) -> int:
    from . import commands, hosts
    from .job import Job, over_ssh

    found = hosts.read(request.hostfile)
    found = hosts.select(found, request.include, request.exclude, request.hostfile)
    found = hosts.first(found, request.num_nodes, request.hostfile)
    found = hosts.with_ranks(found, request.nproc_per_node)
    env = commands.forwarded(os.environ, request.env)
    each = [commands.ssh(request, found, index, env) for index in range(len(found))]
    if request.dry_run:
        for host, command in zip(found, each, strict=True):
            print(f"# {host.name}: {len(host.chosen)} ranks\n{commands.printed(command)}")
        return 0
    names = [host.name for host in found]
    return Job(over_ssh(names, each, request.log_dir)).run()


def _slurm(request: argparse.Namespace) -> int:
    from . import commands, hosts, slurm
    from .job import Job, under_srun

    found = hosts.select(slurm.nodes(os.environ), request.include, request.exclude, "--slurm")
    names = [host.name for host in hosts.first(found, request.num_nodes, "this allocation")]
    ranks = request.nproc_per_node or slurm.ranks_per_node(os.environ)
    command = commands.srun(request, names, ranks, os.environ)
    if request.dry_run:
        print(f"# {len(names)} nodes: {', '.join(names)}\n{commands.printed(command)}")
        return 0
    return Job([under_srun(names, command, request.log_dir)]).run()
