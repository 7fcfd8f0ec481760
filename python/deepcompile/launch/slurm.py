# SPDX-License-Identifier: Apache-2.0
"""The nodes of a Slurm allocation, from scontrol or from Slurm's compact list itself."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Mapping

from ..errors import UserError
from .hosts import Host

SCONTROL_S = 30
"""How long scontrol may take, in seconds."""
INSIDE = "Run it inside an allocation: in a script for sbatch, or under salloc"


def nodes(environ: Mapping[str, str]) -> list[Host]:
    """The allocation's nodes in Slurm's order."""
    compact = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if not compact:
        raise UserError(f"[launch] --slurm: SLURM_JOB_NODELIST is not set. {INSIDE}.")
    scontrol = shutil.which("scontrol", path=environ.get("PATH"))
    if scontrol is None:
        return [Host(name, None) for name in expand(compact)]
    try:
        done = subprocess.run(
            [scontrol, "show", "hostnames", compact],
            capture_output=True,
            text=True,
            timeout=SCONTROL_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"[launch] scontrol: {error}. Is Slurm well on this machine?") from None
    if done.returncode != 0 or not done.stdout.split():
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise UserError(f"[launch] scontrol show hostnames {compact}: {said}. {INSIDE}.")
    return [Host(name, None) for name in done.stdout.split()]


def expand(compact: str) -> list[str]:
    """``node[01-03,07],gpu5`` -> node01, node02, node03, node07, gpu5."""
    names: list[str] = []
    for word in _split(compact):
        names += _expand_one(word, compact)
    if not names:
        raise _bad(compact, "it names no node")
    return names


def _split(compact: str) -> list[str]:
    """The list's words: commas inside brackets do not separate."""
    words, start, depth = [], 0, 0
    for at, letter in enumerate(compact):
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            raise _bad(compact, "its brackets do not match")
        if letter == "," and depth == 0:
            words.append(compact[start:at])
            start = at + 1
    if depth:
        raise _bad(compact, "its brackets do not match")
    return [word for word in (*words, compact[start:]) if word]


def _expand_one(word: str, compact: str) -> list[str]:
    """All names of one word, which may have several pairs of brackets: the last varies first."""
    choices = []
    for part in re.split(r"(\[[^]]*\])", word):
        inside = part[1:-1] if part.startswith("[") else None
        choices.append([part] if inside is None else _range(inside, compact))
    return ["".join(parts) for parts in itertools.product(*choices)]


def _range(text: str, compact: str) -> list[str]:
    """``01-03,07`` -> 01, 02, 03, 07: numbers keep their width."""
    found = []
    for item in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", item)
        if not match:
            raise _bad(compact, f"{item!r} is neither a number nor a range")
        low, high = match[1], match[2] or match[1]
        if int(low) > int(high):
            raise _bad(compact, f"{item} runs backwards")
        found += [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    return found


def _bad(compact: str, why: str) -> UserError:
    return UserError(
        f"[launch] SLURM_JOB_NODELIST={compact}: {why}. Slurm writes lists such as "
        "node[01-03,07],gpu5; is the variable as Slurm set it?"
    )


def ranks_per_node(environ: Mapping[str, str]) -> str:
    """The GPUs of a node, as Slurm says: ``8``, ``a100:8`` or ``gpu:a100:8(S:0-1)``."""
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        match = re.search(r"(?:^|:)([1-9][0-9]*)(?:\(.*\))?$", environ.get(name, ""))
        if match:
            return match[1]
    raise UserError(
        "[launch] --slurm: the allocation does not say how many GPUs a node has. "
        "Give --nproc-per-node."
    )
