# SPDX-License-Identifier: Apache-2.0
"""The graph of a deep model, from a capture of the same model with few layers.

Equal layers give equal regions. A capture of four layers holds them as copies
in a row, in the forward and, in reverse, in the backward. ``deepen`` puts more
copies between them. What a copy reads follows from its place: what all copies
read is shared, the rest comes from a fixed number of copies before it or, in
the backward, from the forward's copy of the same layer. What is outside of the
copies reads the nearest two at most, and never all of them: what does, or
returns something of each layer, would want the new ones too. A graph that does
not follow these rules raises ``NotRegular``; the caller then captures all layers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from deepcompile.capture.graph import GraphIR, RegionIR, SectionIR, ValueIR
from deepcompile.params import MemberRef, ParamTable


class NotRegular(Exception):
    """The layers cannot be told apart or do not follow the rules; the text says where."""


@dataclass(frozen=True)
class _Place:
    """Where a value is made. ``copy`` is None outside the block; ``slot`` is the region's place
    in its copy, or in its section."""

    half: int
    copy: int | None
    slot: int
    output: int


@dataclass
class _Half:
    """The forward or the backward: regions, with ``count`` copies of ``period`` regions from
    ``start`` on."""

    regions: list[RegionIR]
    start: int
    period: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.period * self.count

    def at(self, copy: int, slot: int) -> RegionIR:
        return self.regions[self.start + copy * self.period + slot]

    def place(self, index: int) -> tuple[int | None, int]:
        """(copy, slot) of a region."""
        if self.start <= index < self.end:
            return divmod(index - self.start, self.period)
        return None, index


@dataclass(frozen=True)
class _Rule:
    """How one operand of a copy depends on the copy's number ``j``: it is made by copy
    ``base + sign * j`` of a half, where there is one; elsewhere ``edges[j]`` has it."""

    target: _Place | None
    """Half, slot and output; None if all copies read the same, ``edges[0]``."""
    base: int
    sign: int
    edges: dict[int, str]


@dataclass(frozen=True)
class _LayerName:
    prefix: str
    number: int
    suffix: str

    def shifted(self, by: int) -> str:
        return f"{self.prefix}{self.number + by}{self.suffix}"


def layer_name(a: str, b: str) -> tuple[_LayerName, int] | None:
    """How ``a`` and ``b`` are one name of two layers: its parts and ``b``'s number less
    ``a``'s; None if they are not."""
    left, right = a.split("."), b.split(".")
    if len(left) != len(right):
        return None
    differ = [i for i, (x, y) in enumerate(zip(left, right, strict=True)) if x != y]
    if len(differ) != 1 or not (left[differ[0]].isdigit() and right[differ[0]].isdigit()):
        return None
    at = differ[0]
    prefix = "".join(f"{part}." for part in left[:at])
    suffix = "".join(f".{part}" for part in left[at + 1 :])
    return _LayerName(prefix, int(left[at]), suffix), int(right[at]) - int(left[at])


def deepen(ir: GraphIR, few: ParamTable, many: ParamTable, more: int) -> GraphIR:
    """``ir``, of a training step or an evaluation, with ``more`` more layers. ``few`` and ``many``
    are the params of the model as captured and of the deep one; ``few`` may have more than the
    graph uses. Raises NotRegular."""
    reason = "no region occurs twice in a row"
    for halves in _blocks(ir):
        try:
            return _Deepening(ir, halves, few, many, more).run()
        except NotRegular as error:
            reason = str(error)
    raise NotRegular(reason)


def _blocks(ir: GraphIR) -> Iterator[list[_Half]]:
    """Blocks to try, one for each section, those of most copies first."""
    by_name = {r.name: r for r in ir.regions}
    choices = []
    for section in ir.sections:
        regions = [by_name[name] for name in section.regions]
        codes = [r.code for r in regions]
        found = [
            _Half(regions, start, period, count)
            for period in range(1, len(codes) // 2 + 1)
            for start in range(len(codes) - 2 * period + 1)
            for count in range(2, (len(codes) - start) // period + 1)
            if codes[start : start + period] * count == codes[start : start + period * count]
            and len(set(codes[start : start + period])) == period
        ]
        choices.append(sorted(found, key=lambda h: (-h.count * h.period, h.period, h.start)))
    for halves in itertools.product(*choices):
        yield list(halves)


class _Deepening:
    """One try: the rules of the two blocks, then the deeper graph."""

    def __init__(
        self, ir: GraphIR, halves: list[_Half], few: ParamTable, many: ParamTable, more: int
    ):
        self._ir, self._halves, self._few = ir, halves, few
        self._refs = {many.member(r).name: r for r in many.refs()}
        self._values = {v.name: v for v in ir.values}
        self._places: dict[str, _Place] = {}
        for half, part in enumerate(halves):
            for index, region in enumerate(part.regions):
                copy, slot = part.place(index)
                for output, name in enumerate(region.outputs):
                    self._places[name] = _Place(half, copy, slot, output)
        self._step, self._prefixes = self._layers()
        if more % self._step:
            raise NotRegular(f"{more} more layers, but the graph repeats every {self._step}")
        self._more = more // self._step
        self._rules = {
            (half, slot, k): self._rule(half, slot, k)
            for half, part in enumerate(halves)
            for slot in range(part.period)
            for k, operand in enumerate(part.at(0, slot).inputs)
            if isinstance(operand, str)
        }
        self._many = many

    # Parameters.

    def _member_name(self, ref: MemberRef) -> str:
        return self._few.member(ref).name

    def _layers(self) -> tuple[int, set[str]]:
        """(layers in a copy, prefixes of names with a layer's number)."""
        steps, prefixes = set(), set()
        for half, part in enumerate(self._halves):
            for slot in range(part.period):
                first, second = part.at(0, slot), part.at(1, slot)
                for a, b in zip(self._members(first), self._members(second), strict=True):
                    if a == b:
                        continue
                    found = layer_name(a, b)
                    if found is None:
                        raise NotRegular(f"{a} and {b} are not one parameter of two layers")
                    prefixes.add(found[0].prefix)
                    steps.add(found[1] if half == 0 else -found[1])
        if len(steps) != 1 or min(steps) < 1:
            raise NotRegular(f"copies of a region are {sorted(steps)} layers apart")
        return steps.pop(), prefixes

    def _members(self, region: RegionIR) -> list[str]:
        """Members that a region reads, and those whose gradients it makes."""
        refs = [x for x in region.inputs if isinstance(x, MemberRef)]
        refs += [r for v in region.outputs if (r := self._values[v].grad_of) is not None]
        return [self._member_name(r) for r in refs]

    def _layer(self, name: str) -> _LayerName | None:
        """The parts of a name with a layer's number."""
        for prefix in self._prefixes:
            match = re.match(r"\d+", name[len(prefix) :]) if name.startswith(prefix) else None
            if match:
                return _LayerName(prefix, int(match.group()), name[len(prefix) + match.end() :])
        return None

    def _param(self, ref: MemberRef, by: int) -> MemberRef:
        """The member that is ``by`` layers above ``ref``, if it belongs to a layer."""
        name = self._member_name(ref)
        layer = self._layer(name)
        if layer is not None:
            name = layer.shifted(by)
        if name not in self._refs:
            raise NotRegular(f"the deep model has no parameter {name}")
        return self._refs[name]

    # Rules.

    def _rule(self, half: int, slot: int, k: int) -> _Rule:
        part = self._halves[half]
        names = [part.at(j, slot).inputs[k] for j in range(part.count)]
        if not all(isinstance(n, str) for n in names):
            raise NotRegular(f"operand {k} of {part.at(0, slot).name} is not always a value")
        if len(set(names)) == 1:
            place = self._places.get(names[0])
            if place is not None and place.copy is not None:
                raise NotRegular(f"{names[0]} is made in one layer and read in all")
            return _Rule(None, 0, 0, {0: names[0]})
        inside = [
            (j, p)
            for j, n in enumerate(names)
            if (p := self._places.get(n)) is not None and p.copy is not None
        ]
        if not inside:
            raise NotRegular(f"operand {k} of {part.at(0, slot).name} follows no rule")
        target = replace(inside[0][1], copy=0)
        sign = 1 if target.half == half else -1
        base = inside[0][1].copy - sign * inside[0][0]
        edges = {j: n for j, n in enumerate(names) if j not in dict(inside)}
        copies = self._halves[target.half].count
        fits = all(
            replace(p, copy=0) == target and p.copy == base + sign * j for j, p in inside
        ) and not any(0 <= base + sign * j < copies for j in edges)
        if not fits:
            raise NotRegular(f"operand {k} of {part.at(0, slot).name} changes from layer to layer")
        return _Rule(target, base, sign, edges)

    # The deeper graph. Copies are numbered anew: 0 .. count + more - 1.

    def run(self) -> GraphIR:
        values, regions, sections = [], [], []
        for half, section in enumerate(self._ir.sections):
            values += [self._values[name] for name in section.inputs]
            names = []
            for region, outputs in self._half(half, section.regions):
                values += outputs
                regions.append(region)
                names.append(region.name)
            returned = [self._outside(half, True, name) for name in section.outputs]
            sections.append(SectionIR(section.kind, section.inputs, returned, names))
        rows = [replace(read, member=self._param(read.member, 0)) for read in self._ir.rows]
        deep = GraphIR(self._ir.graph, values, regions, sections, rows)
        self._check_layers(deep)
        return deep

    def _check_layers(self, deep: GraphIR) -> None:
        """That every layer uses what the first one does."""
        used = {self._many.member(ref).name for ref in deep.members_used()}
        for name in self._refs:
            layer = self._layer(name)
            if layer is None:
                continue
            first = layer.shifted(-layer.number)
            if (name in used) != (first in used):
                raise NotRegular(f"{name} and {first} are not used alike")

    def _half(self, half: int, names: list[str]) -> Iterator[tuple[RegionIR, list[ValueIR]]]:
        part = self._halves[half]
        stem = names[0].rsplit(".", 1)[0]
        index = 0
        for i in range(part.start):
            yield self._end(half, part.regions[i], f"{stem}.{index}", False)
            index += 1
        for copy in range(part.count + self._more):
            for slot in range(part.period):
                yield self._copy(half, copy, slot, f"{stem}.{index}")
                index += 1
        for i in range(part.end, len(part.regions)):
            yield self._end(half, part.regions[i], f"{stem}.{index}", True)
            index += 1

    def _end(
        self, half: int, region: RegionIR, name: str, behind: bool
    ) -> tuple[RegionIR, list[ValueIR]]:
        """A region before or behind the copies."""
        high = behind == (half == 0)  # belongs to the last layers
        by = self._step * self._more if high else 0
        return self._made(region, name, by, lambda k, n: self._outside(half, behind, n), str)

    def _copy(self, half: int, copy: int, slot: int, name: str) -> tuple[RegionIR, list[ValueIR]]:
        # Layers go up with the forward's copies and down with the backward's.
        by = copy if half == 0 else self._more - copy
        return self._made(
            self._halves[half].at(0, slot),
            name,
            self._step * by,
            lambda k, n: self._operand(half, copy, slot, k),
            lambda n: self._named(n, copy),
        )

    def _made(
        self,
        template: RegionIR,
        name: str,
        by: int,
        operand: Callable[[int, str], str],
        output: Callable[[str], str],
    ) -> tuple[RegionIR, list[ValueIR]]:
        inputs = [
            self._param(x, by) if isinstance(x, MemberRef) else operand(k, x)
            for k, x in enumerate(template.inputs)
        ]
        values = []
        for old in (self._values[v] for v in template.outputs):
            grad = None if old.grad_of is None else self._param(old.grad_of, by)
            values.append(replace(old, name=output(old.name), grad_of=grad))
        made = replace(template, name=name, inputs=inputs, outputs=[v.name for v in values])
        return made, values

    def _named(self, first: str, copy: int) -> str:
        """The name in copy ``copy`` of what is called ``first`` in the first."""
        return f"{first}.{copy}" if copy else first

    def _in_copy(self, place: _Place, copy: int) -> str:
        first = self._halves[place.half].at(0, place.slot).outputs[place.output]
        return self._named(first, copy)

    def _operand(self, half: int, copy: int, slot: int, k: int) -> str:
        rule = self._rules[half, slot, k]
        if rule.target is None:
            return rule.edges[0]
        made_by = rule.base + rule.sign * copy + (self._more if rule.sign < 0 else 0)
        if 0 <= made_by < self._halves[rule.target.half].count + self._more:
            return self._in_copy(rule.target, made_by)
        # Only the first and the last copies come here; those of the last layers of a forward, and
        # of the first layers of a backward, are counted from the end.
        from_end = rule.sign < 0 and made_by < 0
        return rule.edges[copy - self._more if from_end else copy]

    def _outside(self, half: int, behind: bool, name: str) -> str:
        """What a region outside the copies, or the section's end, reads as ``name``."""
        place = self._places.get(name)
        if place is None or place.copy is None:
            return name
        low = half == 1 and behind and place.half == 0  # the backward of the first layers
        last = self._halves[place.half].count - 1
        if (place.copy if low else last - place.copy) > min(1, last - 1):
            raise NotRegular(
                f"{name}, made in one of several equal layers, is read outside of them"
            )
        return self._in_copy(place, place.copy + (0 if low else self._more))
