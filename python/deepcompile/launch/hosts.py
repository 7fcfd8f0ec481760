# SPDX-License-Identifier: Apache-2.0
"""The hosts of a job: a hostfile's lines, and which of them take part.

A line is ``name slots=N``; ``#`` starts a comment. Slots are numbered from 0 and are the
host's GPUs, one a rank.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@%-]*")
"""What ssh takes as host: a name or address, with a user before @ if need be."""

UPPER_LIMITS = ("max_slots", "max-slots")
"""Keys of Open MPI's that are read over: no host gets more ranks than it has slots."""


@dataclass(frozen=True)
class Host:
    """One host and the slots of it that take part."""

    name: str
    slots: int | None
    """How many it has; None where Slurm says, not we."""
    chosen: tuple[int, ...] = ()
    """Those that take part, ascending."""

    @property
    def partial(self) -> bool:
        return self.slots is not None and len(self.chosen) < self.slots


def read(path: str) -> list[Host]:
    """The hosts of a file, in its order."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows' editors begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or error
        raise UserError(f"[launch] {path}: cannot be read ({cause}). Check --hostfile.") from None
    return parse(text, path)


def parse(text: str, path: str) -> list[Host]:
    """The hosts of a hostfile's text; errors name ``path`` and the line."""
    found: dict[str, tuple[Host, int]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        place = f"[launch] {path}:{number}:"
        host = _host(words, place)
        if host.name in found:
            first = found[host.name][1]
            raise UserError(
                f"{place} {host.name} is there already, in line {first}. Give each host one line."
            )
        found[host.name] = (host, number)
    if not found:
        raise UserError(f"[launch] {path}: names no host. Write lines such as `node-0 slots=8`.")
    return [host for host, _ in found.values()]


def _host(words: list[str], place: str) -> Host:
    name, *facts = words
    if not NAME.fullmatch(name):
        raise UserError(f"{place} {name!r} is no host name. Write the line as `node-0 slots=8`.")
    slots = None
    for fact in facts:
        key, equals, value = fact.partition("=")
        if not equals:
            raise UserError(f"{place} {fact!r} is not key=value. Write `{name} slots=8`.")
        if key in UPPER_LIMITS:
            continue
        if key != "slots":
            raise UserError(f"{place} {key} is not a key; the one that is read is slots.")
        if slots is not None:
            raise UserError(f"{place} slots is given twice. Leave one.")
        if not re.fullmatch(r"[0-9]{1,6}", value) or int(value) < 1:
            raise UserError(f"{place} slots={value} is not a positive number: write `slots=8`.")
        slots = int(value)
    if slots is None:
        start, colon, count = name.rpartition(":")
        if colon and ":" not in start and re.fullmatch(r"[1-9][0-9]*", count):  # no IPv6 address
            raise UserError(f"{place} {name}: slots are a key: write `{start} slots={count}`.")
        raise UserError(f"{place} {name} has no slots: write `{name} slots=8`.")
    return Host(name, slots, tuple(range(slots)))


def select(
    hosts: Sequence[Host], include: Sequence[str], exclude: Sequence[str], source: str
) -> list[Host]:
    """The hosts that --include names (all without it), less what --exclude names."""
    kept = list(hosts)
    if include:
        wanted = _filters(include, hosts, "--include", source)
        kept = [
            replace(host, chosen=tuple(sorted(wanted[host.name] or host.chosen)))
            for host in hosts
            if host.name in wanted
        ]
    unwanted = _filters(exclude, hosts, "--exclude", source)
    left = []
    for host in kept:
        slots = unwanted.get(host.name, set())
        remaining = tuple(slot for slot in host.chosen if slots and slot not in slots)
        if host.name not in unwanted:
            left.append(host)
        elif remaining:
            left.append(replace(host, chosen=remaining))
    if not left:
        raise UserError("[launch] --exclude: leaves no host. Exclude less.")
    return left


def _filters(
    texts: Sequence[str], hosts: Sequence[Host], option: str, source: str
) -> dict[str, set[int]]:
    """``node-0,node-1:0,2-3`` -> {node-0: {}, node-1: {0, 2, 3}}; no slots means all of them."""
    known = {host.name: host for host in hosts}
    found: dict[str, set[int]] = {}
    for text in texts:
        name = ""
        for item in filter(None, (word.strip() for word in text.split(","))):
            if name and found[name] and re.fullmatch(r"[0-9]+(-[0-9]+)?", item):
                found[name] |= _slots(item, known[name], option)
                continue
            name, _, slots = (item, "", "") if item in known else item.rpartition(":")
            if not name:
                name, slots = item, ""
            if name not in known:
                raise UserError(
                    f"[launch] {option} {name}: is not in {source}. Its nodes: {', '.join(known)}."
                )
            found.setdefault(name, set())
            if slots or item.endswith(":"):
                found[name] |= _slots(slots, known[name], option)
    return found


def _slots(text: str, host: Host, option: str) -> set[int]:
    match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", text)
    if host.slots is None:
        raise UserError(
            f"[launch] {option} {host.name}:{text}: Slurm gives out the slots; name whole nodes."
        )
    if not match:
        raise UserError(
            f"[launch] {option} {host.name}: {text!r} is no slot. Write `{host.name}:0,2-3`."
        )
    low, high = int(match[1]), int(match[2] or match[1])
    if low > high or high >= host.slots:
        raise UserError(
            f"[launch] {option} {host.name}: has no slot {text}. It has 0 to {host.slots - 1}."
        )
    return set(range(low, high + 1))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def first(hosts: Sequence[Host], number: int | None, source: str) -> list[Host]:
    """The first ``number`` hosts; all if it is None."""
    if number is not None and number > len(hosts):
        raise UserError(
            f"[launch] --num-nodes {number}: {_count(len(hosts), 'node')} of {source} can take "
            "part. Ask for fewer."
        )
    return list(hosts[:number])


def with_ranks(hosts: Sequence[Host], text: str | None) -> list[Host]:
    """The hosts with --nproc-per-node slots each; as they are if it is None."""
    if text is None:
        return list(hosts)
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) < 1:
        raise UserError(
            f"[launch] --nproc-per-node {text}: give a positive number, or leave it out: the "
            "hostfile's slots say how many ranks run on each host."
        )
    for host in hosts:
        if int(text) > len(host.chosen):
            raise UserError(
                f"[launch] --nproc-per-node {text}: {host.name} has "
                f"{_count(len(host.chosen), 'slot')}. "
                "Ask for fewer, or change the hostfile."
            )
    return [replace(host, chosen=host.chosen[: int(text)]) for host in hosts]
