# SPDX-License-Identifier: Apache-2.0
"""What transfers and regions cost on this job's machine.

Links are measured once, by real transfers of a few sizes, before the first plan
that asks. What was never measured is taken from a machine's description: the
one that the configuration names, or the built-in that resembles this one most.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import _core
from .config import Config
from .distributed import Ranks
from .errors import UserError, meant

SIZES = {"cpu": (64 << 10, 1 << 20, 4 << 20), "cuda": (64 << 10, 1 << 20, 16 << 20, 64 << 20)}
"""Bytes at which links are measured: the whole buffer of a gather or reduction. Times beyond the
last go on with the last slope."""
REPEATS = 5


def named_machine(config: Config) -> Any:
    """The machine that the configuration names, or None."""
    name = config.compile.machine
    if name is None:
        return None
    known = _core.Machine.builtin_names()
    if name in known:
        return _core.Machine.builtin(name)
    if not Path(name).exists():
        raise UserError(
            f"[config] compile.machine: {name!r} is neither a file nor a built-in machine"
            f"{meant(name, known) or ';'} built in are {', '.join(known)}"
        )
    return _core.Machine.load(name)


def builtin_text(name: str) -> str:
    """The JSON of a built-in machine."""
    return (Path(__file__).parent / "machines" / f"{name}.json").read_text(encoding="utf-8")


def machine_for(config: Config, ranks: Ranks) -> Any:
    """The configuration's machine, or the built-in that resembles this one most, with as many
    ranks as there are."""
    named = named_machine(config)
    if named is not None:
        return named
    name = "4xh200" if ranks.device.type == "cuda" else "2x-cpu"
    machine = _core.Machine.builtin(name)
    if machine.ranks >= ranks.world:
        return machine
    wider = json.loads(builtin_text(name)) | {"nodes": 1, "ranks_per_node": ranks.world}
    return _core.Machine.parse(json.dumps(wider), f"{name} with {ranks.world} ranks")


def sizes_within(device_type: str, free: int) -> list[int]:
    """The sizes, in bytes, at which links can be measured where `free` bytes are left: a transfer
    holds the whole buffer and a rank's part of it. The smallest is always among them."""
    sizes = SIZES.get(device_type, SIZES["cuda"])
    return [size for size in sizes if size == min(sizes) or 2 * size <= free]


def measure(runtime: Any, ranks: Ranks, free: int) -> Any:
    """A _core.CostTable of this job's links, the same on every rank; collective. `free`: bytes
    that this rank has left."""
    sizes = sizes_within(ranks.device.type, min(ranks.gather(free)))
    measured = ranks.from_first(runtime.measure_links(sizes, REPEATS))
    table = _core.CostTable(ranks.world)
    table.to_host_beside = measured.pop("to_host_beside", None)
    table.to_device_beside = measured.pop("to_device_beside", None)
    for kind, points in measured.items():
        table.set_curve(kind, [(int(size), int(ns)) for size, ns in points])
    return table
