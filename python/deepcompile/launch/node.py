# SPDX-License-Identifier: Apache-2.0
"""What ssh starts on each host of a job: a Python command that ends when the launcher does.

Standard input comes from the launcher, which writes a byte now and then. Its end, or silence
after a first byte, means that the launcher, its machine or the connection is gone, and then
everything that was started here is ended too, however it detached itself. Without any byte, as
from a terminal, silence means nothing. Linux only (/proc, child subreaper).

Run as ``python -m deepcompile.launch.node ARGUMENTS``: it runs ``python ARGUMENTS``.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

STARTED = "deepcompile: node started"
"""The first line on standard output: the host is reached, folder and Python are there."""
GRACE_S = 15.0
"""How long processes have from SIGTERM to SIGKILL, in seconds."""
BEAT_S = 20.0
"""How often the launcher writes a byte, in seconds."""
SILENCE_S = 300.0
"""After how long without one it is gone: more than a machine that swaps, or a stop by hand."""
POLL_S = 0.1
PR_SET_CHILD_SUBREAPER = 36


def main(arguments: Sequence[str]) -> int:
    """Runs ``python ARGUMENTS``; returns its exit code, 128 + n if signal n ended it."""
    adopt_orphans()
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda signum, _frame: asked.append(signum))
    print(STARTED, flush=True)
    child = subprocess.Popen([sys.executable, *arguments], stdin=subprocess.DEVNULL)
    heard = None
    while child.poll() is None and not asked:
        ready, _, _ = select.select([0], [], [], POLL_S)
        if ready and not os.read(0, 4096):
            break
        if ready:
            heard = time.monotonic()
        if heard is not None and time.monotonic() - heard > SILENCE_S:
            break
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass  # it is killed with the others
    end_descendants()
    if child.returncode is None:
        return 128 + signal.SIGKILL
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def adopt_orphans() -> None:
    """Makes processes whose parent is gone children of this one, so that none is lost."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def end_descendants() -> None:
    """Kills what is left: ranks are leaders of sessions of their own, so no signal reaches all."""
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline:
        left = descendants(os.getpid())
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        reap()
        if not left:
            return
        time.sleep(0.02)


def reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def descendants(root: int) -> list[int]:
    """All processes below ``root``, from /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:  # it has ended meanwhile
            continue
        # "pid (any name) state parent ..."
        children.setdefault(int(text.rpartition(")")[2].split()[1]), []).append(
            int(stat.parent.name)
        )
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
