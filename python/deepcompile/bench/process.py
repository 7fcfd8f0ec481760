# SPDX-License-Identifier: Apache-2.0
"""One process group that trains conditions: its command, its log, its end.

Nothing outlives a call: at its time limit, or when the caller is interrupted,
the launcher is asked to stop and then killed, and its ranks with it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError, writing
from .lines import ERROR_MARK
from .results import no_room

GRACE_S = 40.0
"""How long ranks may take to stop when they are asked."""
WATCH_S = 1.0
"""How often `watch` is asked."""
TAIL = 20
"""Lines of a log that an error without a mark is looked for in."""


@dataclass(frozen=True)
class Place:
    """Where ranks run."""

    nodes: int = 1
    per_node: int = 1
    hostfile: str = ""
    """Of more than one node, unless Slurm names them. Ranks then start by `deepcompile launch`."""
    slurm: bool = False
    launcher: tuple[str, ...] = ()
    """More arguments of `deepcompile launch`."""

    @property
    def world(self) -> int:
        return self.nodes * self.per_node


def place_from(environment: Mapping[str, str] | None = None) -> Place:
    """From NUM_NODES, NGPUS_PER_NODE, HOSTFILE, SLURM and LAUNCH_ARGS. Hosts by default: all of
    HOSTFILE, or of Slurm's allocation, else this one. Ranks on each: the hostfile's slots, or
    Slurm's GPUs; on this host alone its GPUs, or 2 on a CPU."""
    from ..launch import commands

    given = os.environ if environment is None else environment
    nodes, per_node = _number(given, "NUM_NODES"), _number(given, "NGPUS_PER_NODE")
    more = tuple(commands.split(given.get("LAUNCH_ARGS", ""), "LAUNCH_ARGS"))
    if given.get("SLURM", "") not in ("", "0", "1"):
        raise UserError(f"[bench] SLURM={given['SLURM']}: must be 1 or 0.")
    if given.get("SLURM") == "1":
        place = _allocated(given, nodes, per_node, more)
    else:
        place = _listed(given.get("HOSTFILE", ""), nodes, per_node, more)
    import torch

    if place.nodes == 1 and not place.slurm:
        return dataclasses.replace(place, per_node=per_node or torch.cuda.device_count() or 2)
    if not torch.cuda.is_available():
        print(
            "warning: [bench] this host has no GPU, and it decides for all: --dtype auto is fp32, "
            "no depth is cut to a GPU's memory, and peers that need GPUs are skipped. Start on a "
            "host with GPUs, or give --dtype bf16 and --num-layers.",
            file=sys.stderr,
        )
    return place


def _number(given: Mapping[str, str], name: str) -> int:
    """A variable's value; 0: it is not set."""
    text = given.get(name, "")
    if text and not (text.isdecimal() and int(text) > 0):
        raise UserError(f"[bench] {name}={text}: must be a positive integer.")
    return int(text or 0)


def _listed(file: str, nodes: int, per_node: int, more: tuple[str, ...]) -> Place:
    """On the hosts of a file, or here: `per_node` is then open."""
    from ..launch import hosts

    if file and not nodes:
        nodes = len(hosts.read(file))
    if nodes <= 1:
        return Place(1, per_node)
    name = file or f"hostfile_n{nodes}"
    if not Path(name).is_file():
        raise UserError(
            f"[bench] NUM_NODES={nodes}: there is no hostfile {name}. Write one, with lines such "
            "as `node-0 slots=8`, or set HOSTFILE to where it is; under Slurm set SLURM=1."
        )
    found = hosts.first(hosts.read(name), nodes, name)
    slots = sorted(len(host.chosen) for host in found)
    if per_node > slots[0] or (not per_node and slots[0] < slots[-1]):
        said = f"NGPUS_PER_NODE={per_node}" if per_node else name
        raise UserError(
            f"[bench] {said}: {name} has hosts of {slots[0]} slots, and all run as many ranks. "
            f"Set NGPUS_PER_NODE to {slots[0]} or fewer."
        )
    return Place(nodes, per_node or slots[0], name, launcher=more)


def _allocated(given: Mapping[str, str], nodes: int, per_node: int, more: tuple[str, ...]) -> Place:
    """On the nodes of this Slurm allocation."""
    from ..launch import hosts, slurm

    found = hosts.first(slurm.nodes(given), nodes or None, "this allocation")
    if not per_node:
        try:
            per_node = int(slurm.ranks_per_node(given))
        except UserError:
            raise UserError(
                "[bench] SLURM=1: the allocation does not say how many GPUs a node has. Set "
                "NGPUS_PER_NODE."
            ) from None
    return Place(len(found), per_node, slurm=True, launcher=more)


def command(place: Place, arguments: Sequence[str]) -> list[str]:
    """What starts all ranks of `deepcompile.bench.worker`."""
    worker = ["-m", "deepcompile.bench.worker", *arguments]
    if place.nodes == 1 and not place.slurm:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", str(place.per_node), *worker]  # fmt: skip
    hosts = ["--slurm"] if place.slurm else ["--hostfile", place.hostfile]
    sizes = ["--num-nodes", str(place.nodes), "--nproc-per-node", str(place.per_node)]
    launch = [sys.executable, "-m", "deepcompile", "launch"]
    return [*launch, *hosts, *sizes, *place.launcher, *worker]


@dataclass
class Outcome:
    """How a process group ended."""

    code: int
    seconds: float
    timed_out: bool = False
    stopped: str | None = None
    """What the caller's watch stopped it for."""
    errors: list[dict[str, Any]] = field(default_factory=list)
    """What ranks said of their failures."""
    tail: list[str] = field(default_factory=list)
    """The log's last lines."""

    @property
    def error(self) -> str | None:
        """Why it failed, in words; None: it did not."""
        if self.stopped:
            return self.stopped
        if self.timed_out:
            return f"timeout: stopped after {self.seconds:.0f} s"
        if self.code == 0:
            return None
        short = [e for e in self.errors if no_room(str(e.get("error", "")))]
        for said in short or sorted(self.errors, key=lambda e: e.get("time", 0)):
            return f"{said['error']} (rank {said['rank']}, {said['type']})"
        if -self.code == signal.SIGKILL or any("Signal 9" in line for line in self.tail):
            return "killed by signal 9: perhaps the host was out of memory"
        last = next((line for line in reversed(self.tail) if line.strip()), "no output")
        return f"exit code {self.code}: {last.strip()[:300]}"

    @property
    def launch_error(self) -> str | None:
        """What `deepcompile launch` says of why it could not start the ranks; None: nothing."""
        said = [line for line in self.tail if "[launch]" in line] if self.code else []
        return said[-1][said[-1].index("[launch]") :].strip() if said else None


def run(
    place: Place,
    arguments: Sequence[str],
    log: Path,
    timeout: float | None = None,
    on_line: Callable[[str], None] = lambda line: None,
    environment: dict[str, str] | None = None,
    watch: Callable[[], str | None] = lambda: None,
) -> Outcome:
    """Start all ranks and wait for their end. Their output goes to `log`, and to `on_line` by
    lines. `timeout` in seconds; `on_line` may not raise. `watch` is asked once a second, and its
    words, if any, end the group: they become its error."""
    with writing("bench", log):
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("w", encoding="utf-8")
    with file:
        return _run(place, arguments, file, timeout, on_line, environment, watch)


def _run(
    place: Place, arguments: Sequence[str], file: Any, timeout: float | None, on_line: Any,
    environment: dict[str, str] | None, watch: Any,
) -> Outcome:  # fmt: skip
    begun = time.monotonic()
    env = {**os.environ, "NCCL_DEBUG": os.environ.get("NCCL_DEBUG", "WARN"), **(environment or {})}
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // place.per_node)))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [_package_root(), env.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command(place, arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a terminal's Ctrl-C comes to us alone
        preexec_fn=_die_with_parent,
        env=env,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    outcome = Outcome(0, 0.0)
    try:
        outcome.timed_out = not _follow(process, file, timeout, on_line, outcome, watch)
    finally:
        stop(process)
    outcome.code = process.returncode
    outcome.seconds = time.monotonic() - begun
    return outcome


def _package_root() -> str:
    """So that ranks import what this process did, from whatever folder they start in."""
    import deepcompile

    return str(Path(deepcompile.__file__).absolute().parents[1])


def _die_with_parent() -> None:
    """Linux: a launcher whose parent is killed is told to stop."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _follow(
    process: Any, file: Any, timeout: float | None, on_line: Any, outcome: Outcome, watch: Any
) -> bool:
    """Copy lines until the output ends, or the watch has something to say. False: the time was
    over before."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    now = time.monotonic()
    deadline = math.inf if timeout is None else now + timeout
    asked = now
    while True:
        now = time.monotonic()
        if now - asked >= WATCH_S:
            asked, outcome.stopped = now, watch()
            if outcome.stopped:
                return True
        try:
            line = lines.get(timeout=max(0.0, min(WATCH_S, deadline - now)))
        except queue.Empty:
            if time.monotonic() >= deadline:
                return False
            continue
        if line is None:
            process.wait()
            return True
        with writing("bench", file.name):
            file.write(line)
            file.flush()
        if ERROR_MARK in line:  # behind its node's name, if there are several
            outcome.errors.append(_said(line.partition(ERROR_MARK)[2]))
        elif line.strip():
            outcome.tail = [*outcome.tail[1 - TAIL :], line]
        on_line(line.rstrip("\n"))


def _said(text: str) -> dict[str, Any]:
    try:
        return {"rank": "?", "type": "?", "error": "?", **json.loads(text)}
    except ValueError:
        return {"rank": "?", "type": "?", "error": text.strip()[:300]}


def stop(process: subprocess.Popen) -> None:
    """End a launcher and its ranks, if they still run."""
    if process.poll() is not None:
        return
    process.terminate()  # torchrun then stops its ranks, which are in sessions of their own
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        process.wait()
