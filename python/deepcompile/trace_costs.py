# SPDX-License-Identifier: Apache-2.0
"""What a traced step says of costs, so that its own simulation takes as long as it took.

The simulator adds up instructions, each undisturbed, and slows kernels down
beside transfers. A trace has instructions as they were disturbed, and between
them time that belongs to none. So from each record's span goes what the
simulator will put back (waiting, the slowdown), and the time between goes to
what comes next: a run's or an update's launch, the user's code before a
section, the copy of a gradient into the buffer of its reduction.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import _core

TIMED = ("run", "update", "norm", "accumulate")
"""Compute's own work."""
WAITS = ("wait", "evict", "await", "evict_states", "await_states")
FREE = ("release", "defer")
LINK = ("gather", "reduce")
LEAST_SAMPLES = 3
"""Transfers of one size, before their times in the step go before those measured alone."""

SIZES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2}

Points = list[tuple[int, int]]
"""[(bytes, ns)], sizes rising."""


@dataclass
class TraceCosts:
    """Times in ns of one traced step of this rank, undisturbed."""

    runs: dict[int, int] = field(default_factory=dict)
    """By code, the median."""
    curves: dict[str, Points] = field(default_factory=dict)
    """By kind, as in _core.CostTable."""
    run_overhead: int | None = None
    sections: dict[str, int] = field(default_factory=dict)
    """By kind of section: before its first instruction, the mean."""

    def put_into(self, table: Any) -> None:
        """Set what was measured in a _core.CostTable. Of gathers and reductions, points measured
        alone stay outside of the sizes that the step has."""
        for kind, points in self.curves.items():
            if kind in LINK:
                low, high = points[0][0], points[-1][0]
                alone = [p for p in table.curve(kind) if not low <= p[0] <= high]
                points = sorted([*alone, *points])
            table.set_curve(kind, points)
        table.run_overhead_ns = self.run_overhead
        for kind in ("forward", "backward", "inference", "update"):
            table.set_section_overhead(kind, self.sections.get(kind))


@dataclass
class _Event:
    plan: int
    section: int
    index: int
    start: int
    end: int
    instr: Any
    kind: str
    """Of its section."""

    @property
    def op(self) -> str:
        return self.instr.op


class _Link:
    """When the link was busy. `size` says how much an event moves."""

    def __init__(self, events: Iterable[_Event], size: Callable[[_Event], int]) -> None:
        self.transfers: list[tuple[_Event, int]] = []
        """(event, ns on the link), in the order in which they end: one at a time. Gloo carries
        two, and the later one may end first."""
        free = 0
        for event in sorted(events, key=lambda event: event.end):
            if event.end > event.start:
                self.transfers.append((event, event.end - max(event.start, min(free, event.end))))
                free = max(free, event.end)
        alike: dict[tuple[str, int], list[int]] = defaultdict(list)
        for event, ns in self.transfers:
            alike[event.op, size(event)].append(ns)
        usual = {key: statistics.median_low(each) for key, each in alike.items()}
        # What one takes longer it waits for a rank that is late, and disturbs nothing.
        moving = [(e.end - min(ns, usual[e.op, size(e)]), e.end) for e, ns in self.transfers]
        spans = sorted((start, end) for start, end in moving if end > start)
        self.starts: list[int] = []
        self.ends: list[int] = []
        for start, end in spans:
            if self.ends and start <= self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], end)
            else:
                self.starts.append(start)
                self.ends.append(end)

    def beside(self, start: int, end: int) -> int:
        """ns of this span during which the link was busy."""
        total, at = 0, max(0, bisect_right(self.starts, start) - 1)
        while at < len(self.starts) and self.starts[at] < end:
            total += max(0, min(end, self.ends[at]) - max(start, self.starts[at]))
            at += 1
        return total


class _Reader:
    """The records of one step, read once."""

    def __init__(
        self,
        records: Iterable[Sequence[int]],
        plans: Iterable[tuple[int, Any]],
        slowdown: float,
        reductions_end: bool,
    ) -> None:
        self.programs = dict(plans)
        self.slowdown = slowdown
        instrs = {
            (plan, s): (section.kind, list(section.instrs))
            for plan, program in self.programs.items()
            for s, section in enumerate(program.sections)
        }
        self.params = {
            (plan, p.name): p for plan, program in self.programs.items() for p in program.params
        }
        self.values = {
            plan: {v.name: v.bytes for v in program.values}
            for plan, program in self.programs.items()
        }
        self.events: list[_Event] = []
        for plan, section, index, start, end, *_ in records:
            if (plan, section) in instrs:
                kind, listed = instrs[plan, section]
                self.events.append(_Event(plan, section, index, start, end, listed[index], kind))
        self.deferred = {
            e.instr.operand for _, listed in instrs.values() for e in _as_events(listed, "defer")
        }
        nothing = self._of_nothing()
        self.link = _Link(
            (
                e
                for e in self.events
                if e.op in (LINK if reductions_end else ("gather",))
                and id(e) not in nothing
                and not self.sums_locally(e.plan)
                and self.programs[e.plan].world > 1
            ),
            self.moved_bytes,
        )

    def _of_nothing(self) -> set[int]:
        """Gathers of what was whole already: their records are of no transfer. Walks the step
        twice, as what it leaves whole is so at its start."""
        whole = {p.name for p in self.params.values() if p.placement != "sharded"}
        found: set[int] = set()
        for _ in range(2):
            found.clear()
            for event in self.events:
                name = event.instr.operand
                if event.op == "gather":
                    if name in whole and name not in self.deferred:
                        found.add(id(event))
                    whole.add(name)
                elif event.op in ("release", "update"):
                    whole.discard(name)
        return found

    def sums_locally(self, plan: int) -> bool:
        """Whether a reduce may be a sum on this rank alone, which the trace does not tell apart."""
        program = self.programs[plan]
        return program.boundary and program.accumulation > 1

    def undisturbed(self, start: int, end: int) -> float:
        beside = self.link.beside(start, end)
        return end - start - beside + beside / self.slowdown

    def moved_bytes(self, event: _Event) -> int:
        """What goes on the wire of this gather or reduce: the whole parameter, or the gradient's
        whole in the reduction's type, or all ranks' rows of them."""
        param = self.params[event.plan, event.instr.operand]
        return param.gather_bytes if event.op == "gather" else param.reduce_bytes

    def result_bytes(self, event: _Event) -> int:
        """What a reduction leaves on this rank."""
        param = self.params[event.plan, event.instr.operand]
        whole = param.placement == "replicated"
        return self._reduced(event, param.full_bytes if whole else param.shard_bytes)

    def _reduced(self, event: _Event, weights: int) -> int:
        param, program = self.params[event.plan, event.instr.operand], self.programs[event.plan]
        return weights // SIZES[param.dtype] * SIZES[program.reduce_dtype]

    def stages(self, event: _Event) -> bool:
        """Whether the gradient is copied into a buffer first."""
        names = event.instr.values
        if self.params[event.plan, event.instr.operand].rows_read:
            return True
        return not (
            len(names) == 1 and self.values[event.plan][names[0]] == self.moved_bytes(event)
        )

    def visits(self) -> list[list[_Event]]:
        """Executions of sections, in order."""
        out: list[list[_Event]] = []
        for event in self.events:
            last = out[-1][-1] if out else None
            same = last and (last.plan, last.section) == (event.plan, event.section)
            if not same or event.index <= last.index:
                out.append([])
            out[-1].append(event)
        return out


def _as_events(instrs: list[Any], op: str) -> list[Any]:
    return [_Named(instr) for instr in instrs if instr.op == op]


@dataclass
class _Named:
    instr: Any


class _Gaps:
    """Time between compute's records, by what follows."""

    def __init__(self, reader: _Reader) -> None:
        self.reader = reader
        self.before: dict[str, list[float]] = defaultdict(list)
        """Launches, by instruction."""
        self.staged: list[tuple[str, int, float]] = []
        """(the instruction that follows, bytes, launch and copy) of gradients."""
        self.sections: dict[str, list[float]] = defaultdict(list)
        last = 0  # the trace begins with the step
        for visit in reader.visits():
            last = self._visit(visit, last)

    def _visit(self, visit: list[_Event], last: int) -> int:
        """Where the section's work ended, from where the one before it did."""
        first, known, chain, staged, issued = True, True, 0.0, [], None
        for event in visit:
            op = event.op
            if op in LINK:
                issued = event.start
                known = known and not self._hides_work(event)
                if op == "reduce" and self.reader.stages(event):
                    staged.append(event)
                continue
            if op not in TIMED and op not in WAITS and op not in FREE:
                continue
            gap = max(0, event.start - last)
            if op in WAITS and not first:
                gap = self._before_waiting(event, gap, last, issued)
            if first and known and not staged:
                self.sections[event.kind].append(gap)
            elif not first:
                chain += self.reader.undisturbed(last, last + gap)
            first, last, issued = False, event.end, None
            if op in FREE:
                chain += event.end - event.start
            elif op in TIMED:
                self._add(op, chain, staged, known)
                known, chain, staged = True, 0.0, []
        return last

    @staticmethod
    def _before_waiting(event: _Event, gap: int, last: int, issued: int | None) -> int:
        """The part of a gap that waiting would not have taken instead: until what is waited for
        was under way."""
        if issued is not None:
            return min(gap, max(0, issued - last))
        return gap if event.end - event.start <= gap else 0

    def _hides_work(self, event: _Event) -> bool:
        """Kernels of a transfer's own, which its record does not have."""
        if event.op == "gather":
            by_rows = self.reader.params[event.plan, event.instr.operand].rows_read
            return bool(by_rows) or event.instr.operand in self.reader.deferred
        return self.reader.sums_locally(event.plan)

    def _add(self, op: str, chain: float, staged: list[_Event], known: bool) -> None:
        if known and not staged:
            self.before[op].append(chain)
        elif known and len(staged) == 1:
            self.staged.append((op, self.reader.moved_bytes(staged[0]), chain))

    def launch(self, op: str) -> float:
        found = self.before.get(op)
        return statistics.fmean(found) if found else 0.0

    def stagings(self) -> dict[int, list[float]]:
        out: dict[int, list[float]] = defaultdict(list)
        for op, size, ns in self.staged:
            out[size].append(max(0.0, ns - self.launch(op)))
        return out


def trace_costs(
    records: Iterable[Sequence[int]],
    plans: Iterable[tuple[int, Any]],
    slowdown: float = 1.0,
    reductions_end: bool = True,
) -> TraceCosts:
    """From the runtime's records (plan, section, instruction, start ns, end ns, ...) of one step,
    times from its start, in the order of issue; `plans` is [(plan id, program)], `slowdown` what
    the simulator multiplies kernels beside transfers by. `reductions_end`: their records end when
    they do, not when they are waited for, as Gloo's; of these nothing is taken."""
    reader = _Reader(records, plans, slowdown, reductions_end)
    if not reader.events:
        return TraceCosts()
    gaps = _Gaps(reader)
    runs: dict[int, list[float]] = defaultdict(list)
    sizes: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    codes = {(k, r.name): r.code for k, p in reader.programs.items() for r in p.regions}
    reductions: dict[tuple[int, str], int] = {}
    for event in reader.events:
        key, time = (event.plan, event.instr.operand), reader.undisturbed(event.start, event.end)
        if event.op == "reduce":
            reductions[key] = event.end
        elif event.op == "run":
            runs[codes[key]].append(time)
        elif event.op == "update":
            sizes["update"][_updated_bytes(reader.params[key])].append(time)
        elif event.op == "norm":
            sizes["norm"][_core.norm_bytes(reader.programs[event.plan])].append(time)
        elif event.op == "accumulate":
            # Its span begins when compute gets there, its work when the reduction is done.
            done = max(event.start, reductions.pop(key, event.start))
            if done < event.end and not reader.sums_locally(event.plan):
                alone = reader.undisturbed(done, event.end)
                sizes["accumulate"][reader.result_bytes(event)].append(alone)
    for op, by_size in sizes.items():
        for times in by_size.values():
            times[:] = [time + gaps.launch(op) for time in times]
    sizes["staging"] = gaps.stagings()
    out = TraceCosts(
        {code: max(1, round(statistics.median(times))) for code, times in runs.items()},
        {kind: _points(by_size) for kind, by_size in sizes.items() if by_size},
        round(gaps.launch("run")) if "run" in gaps.before else None,
        {kind: round(statistics.fmean(each)) for kind, each in gaps.sections.items()},
    )
    out.curves |= _transfers(reader)
    return out


def _points(by_size: dict[int, list[float]]) -> Points:
    return [(size, round(statistics.median(by_size[size]))) for size in sorted(by_size)]


def _updated_bytes(param: Any) -> int:
    return param.full_bytes if param.placement == "replicated" else param.shard_bytes


def _transfers(reader: _Reader) -> dict[str, Points]:
    """Gathers and reductions as they took in the step, beside compute and other ranks' delays."""
    sizes: dict[str, dict[int, list[float]]] = {op: defaultdict(list) for op in LINK}
    for event, ns in reader.link.transfers:
        param = reader.params[event.plan, event.instr.operand]
        # By rows, a gather is a reduce-scatter of them, and a reduction an all-gather.
        if event.op == "gather":
            sizes["reduce" if param.rows_read else "gather"][param.gather_bytes].append(ns)
        elif param.placement != "replicated":  # else a gather follows, which has no record
            sizes["gather" if param.rows_read else "reduce"][param.reduce_bytes].append(ns)
    found = {}
    for op, by_size in sizes.items():
        enough = {size: times for size, times in by_size.items() if len(times) >= LEAST_SAMPLES}
        if enough:
            found[op] = _points(enough)
    return found
