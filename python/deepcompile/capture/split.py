# SPDX-License-Identifier: Apache-2.0
"""Cut an AOT graph into regions.

Micro-segments start where a large parameter is first used and end where a
gradient appears. A search for repeats finds the layers among them; work that
no layer owns (rotary tables, masks, seeds) moves in front, so that layers
become equal; cuts then follow ``region_bytes`` and the smallest live set.
Views, copies and constants are repeated in each region that wants them.

The result depends on the graph alone: every rank finds the same cuts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx
from torch._functorch._aot_autograd.descriptors import TangentAOTInput

from deepcompile.capture.canonical import MetaKeys, node_items
from deepcompile.capture.costs import extent_bytes
from deepcompile.capture.joint import derived, is_factory, is_getitem
from deepcompile.capture.repeats import Repeat, find_repeat
from deepcompile.capture.sources import outputs

_MIN_COVERAGE = 3
"""Micro-segments; a shorter repeat is no layer."""


@dataclass
class Region:
    """Nodes of one region, in execution order, repeated ones included."""

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    symbolic: bool
    """Whether sizes in it are symbols, which mean something in their own graph only."""


@dataclass
class _Graph:
    """What the cut needs to know about a graph."""

    params: set[fx.Node]
    """All parameter placeholders."""
    seams: set[fx.Node]
    """Those whose first use starts a micro-segment."""
    gradients: set[fx.Node]
    derived: dict[fx.Node, frozenset[fx.Node]]
    repeated: set[fx.Node]
    """Nodes that every region makes for itself."""
    keys: MetaKeys = field(default_factory=MetaKeys)

    def seam_params(self, node: fx.Node) -> set[fx.Node]:
        """Seam parameters that ``node`` reads, directly or through views and copies."""
        found: set[fx.Node] = set()
        for arg in node.all_input_nodes:
            found |= self.derived.get(arg, frozenset()) & self.seams
        return found


@dataclass
class _Segments:
    nodes: list[list[fx.Node]]
    hashes: np.ndarray
    params: list[set[fx.Node]]


def cut(
    gm: fx.GraphModule,
    params: set[fx.Node],
    seams: set[fx.Node],
    gradients: set[fx.Node],
    region_bytes: int,
) -> list[Region]:
    """Regions of ``gm`` in execution order."""
    graph = gm.graph
    from_params = derived(graph, [n for n in graph.find_nodes(op="placeholder") if n in params])
    inner = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    repeated = {n for n in inner if n in from_params or is_factory(n) or n.op == "get_attr"}
    info = _Graph(params, seams, gradients, from_params, repeated)
    body = _with_getitems([n for n in inner if n not in repeated])
    front, segments = _hoist(graph, info, body)
    groups = _group(info, segments, region_bytes)
    if front:
        groups.insert(0, front)
    return _regions(graph, info, groups)


def _with_getitems(nodes: list[fx.Node]) -> list[fx.Node]:
    """Each getitem right behind the operator whose result it takes apart."""
    placed: set[fx.Node] = set()
    ordered = []
    inside = set(nodes)

    def place(node: fx.Node) -> None:
        placed.add(node)
        ordered.append(node)
        for user in node.users:
            if is_getitem(user) and user in inside and user not in placed:
                place(user)

    for node in nodes:
        if node not in placed:
            place(node)
    return ordered


def _segment(info: _Graph, body: list[fx.Node]) -> _Segments:
    starts, seen = {0}, set()
    for i, node in enumerate(body):
        new = info.seam_params(node) - seen
        if new:
            starts.add(i)
            seen |= new
        if node in info.gradients:
            starts.add(i + 1)
    for start in sorted(starts):
        if 0 < start < len(body) and is_getitem(body[start]):
            starts.discard(start)
            while start < len(body) and is_getitem(body[start]):
                start += 1
            starts.add(start)
    bounds = sorted(s for s in starts if s < len(body)) + [len(body)]
    nodes = [body[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    ids: dict[tuple, int] = {}
    hashes = np.array([ids.setdefault(node_items(s, info.keys), len(ids)) for s in nodes])
    return _Segments(nodes, hashes, [_union(info.seam_params(n) for n in s) for s in nodes])


def _union(sets) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for s in sets:
        found |= s
    return found


def _hoist(graph: fx.Graph, info: _Graph, body: list[fx.Node]) -> tuple[list[fx.Node], _Segments]:
    """(nodes to run first, micro-segments of the rest)."""
    seeds = {n for n in body if "seed" in str(n.target) and "inductor" in str(n.target)}
    if any(a not in seeds and a.op != "placeholder" for n in seeds for a in n.all_input_nodes):
        seeds = set()
    segments = _segment(info, [n for n in body if n not in seeds])
    repeat = find_repeat(segments.hashes, 0, len(segments.nodes))
    front = set(seeds)
    if repeat is not None and repeat.coverage >= _MIN_COVERAGE:
        front |= _shared(graph, info, segments, repeat)
    if len(front) > len(seeds):
        segments = _segment(info, [n for n in body if n not in front])
    return [n for n in body if n in front], segments


def _shared(graph: fx.Graph, info: _Graph, segments: _Segments, repeat: Repeat) -> set[fx.Node]:
    """Nodes that depend on no parameter and no gradient and are used two layers apart or
    more, with what they are made from."""
    where = {n: i for i, nodes in enumerate(segments.nodes) for n in nodes}
    free: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node not in info.params and not isinstance(node.meta.get("desc"), TangentAOTInput):
                free.add(node)
        elif node.op == "call_function" and node not in info.derived:
            if all(a in free for a in node.all_input_nodes):
                free.add(node)
    wanted = []
    for node in where:
        uses = [where[u] for u in node.users if u in where] + [where[node]]
        if node in free and max(uses) - min(uses) >= 2 * repeat.period:
            wanted.append(node)
    front: set[fx.Node] = set()
    while wanted:
        node = wanted.pop()
        if node not in front and node in where:
            front.add(node)
            wanted.extend(node.all_input_nodes)
            if is_getitem(node):  # a getitem stays with its siblings
                wanted.extend(u for u in node.args[0].users if is_getitem(u))
            wanted.extend(u for u in node.users if is_getitem(u))
    return front


def _group(info: _Graph, segments: _Segments, region_bytes: int) -> list[list[fx.Node]]:
    """Join micro-segments into regions."""
    if not segments.nodes:
        return []
    sizes = {p: extent_bytes(p.meta["val"]) for p in info.seams}
    cuts = _Cuts(segments, sizes, _live_bytes(segments), region_bytes).choose()
    bounds = sorted(cuts | {0}) + [len(segments.nodes)]
    return [
        [n for s in segments.nodes[a:b] for n in s]
        for a, b in zip(bounds, bounds[1:], strict=False)
        if b > a
    ]


def _live_bytes(segments: _Segments) -> np.ndarray:
    """Bytes that cross the seam before each micro-segment (and after the last)."""
    where = {n: i for i, nodes in enumerate(segments.nodes) for n in nodes}
    change = np.zeros(len(segments.nodes) + 2, dtype=np.int64)
    for node, i in where.items():
        last = max((where[u] for u in node.users if u in where), default=i)
        if last > i:
            size = extent_bytes(node.meta.get("val"))
            change[i + 1] += size
            change[last + 1] -= size
    return np.cumsum(change)[:-1]


@dataclass
class _Cuts:
    """The choice of seams among the micro-segments' borders."""

    segments: _Segments
    sizes: dict[fx.Node, int]
    live: np.ndarray
    region_bytes: int

    def choose(self) -> set[int]:
        cuts: set[int] = set()
        todo = [(0, len(self.segments.nodes), 0)]
        while todo:
            low, high, layer = todo.pop()
            if low >= high:
                continue
            repeat = None
            if high - low > layer:  # less is a piece of a layer: what repeats in it is no layer
                repeat = find_repeat(self.segments.hashes, low, high)
            if repeat is None or repeat.coverage < _MIN_COVERAGE:
                cuts.update(self._greedy(low, high))
                continue
            first, count, offsets = self._best_phase(repeat, low, high)
            end = first + count * repeat.period
            cuts.update(first + k * repeat.period + o for k in range(count) for o in offsets)
            todo += [(low, first, repeat.period), (end, high, repeat.period)]
        return cuts

    def _greedy(self, low: int, high: int) -> list[int]:
        """Starts of regions in [low, high) that stay within region_bytes."""
        starts, held, size = [low], set(), 0
        for i in range(low, high):
            params = self.segments.params[i]
            new = sum(self.sizes[p] for p in params - held)
            if size and size + new > self.region_bytes:
                starts.append(i)
                held, size = set(), 0
                new = sum(self.sizes[p] for p in params)
            held |= params
            size += new
        return starts

    def _best_phase(self, repeat: Repeat, low: int, high: int) -> tuple[int, int, list[int]]:
        """(first layer's start, layers, cuts inside a layer): where a layer begins is free up to
        one period. Least bytes to gather first, then least bytes alive at the seams, but
        never one layer less than possible."""
        best = None
        for first in range(repeat.start, min(repeat.start + repeat.period, repeat.end)):
            count = (repeat.end - first) // repeat.period
            if count < 1:
                break
            offsets = [s - first for s in self._greedy(first, first + repeat.period)]
            seams = [first + k * repeat.period + o for k in range(count) for o in offsets]
            end = first + count * repeat.period
            bounds = ([low] if first > low else []) + seams + [end] + ([high] if end < high else [])
            gathered = sum(
                self._param_bytes(a, b) for a, b in zip(bounds, bounds[1:], strict=False)
            )
            alive = sum(int(self.live[s]) for s in [*seams, end])
            cost = (gathered, alive, first)
            if best is None or cost < best[0]:
                best = (cost, first, count, offsets)
        return best[1:]

    def _param_bytes(self, low: int, high: int) -> int:
        return sum(self.sizes[p] for p in _union(self.segments.params[low:high]))


def _regions(graph: fx.Graph, info: _Graph, groups: list[list[fx.Node]]) -> list[Region]:
    home = {n: i for i, group in enumerate(groups) for n in group}
    returned = {o for o in outputs(graph) if isinstance(o, fx.Node)}
    symbols = _symbol_nodes(graph)
    return [_region(info, home, returned, symbols, i, g) for i, g in enumerate(groups)]


def _region(
    info: _Graph,
    home: dict[fx.Node, int],
    returned: set[fx.Node],
    symbols: dict[object, fx.Node],
    index: int,
    group: list[fx.Node],
) -> Region:
    nodes: dict[fx.Node, None] = {}  # ordered set

    def place(node: fx.Node) -> None:
        for arg in node.all_input_nodes:
            if arg in info.repeated and arg not in nodes:
                place(arg)
        nodes[node] = None

    for node in group:
        place(node)
    inputs = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in nodes)
    outs = [
        n
        for n in group
        if not isinstance(n.meta.get("val"), tuple | list)  # its getitems go out instead
        and (n in returned or any(home.get(u, index) != index for u in n.users))
    ]
    free = _union(_free_symbols(n.meta.get("val")) for n in [*nodes, *inputs]) if symbols else set()
    bound = [symbols[s] for s in sorted(free, key=str) if s in symbols]
    sizes = [n for n in bound if n not in inputs and n not in nodes]
    return Region(list(nodes), [*sizes, *inputs], outs, bool(free))


def _free_symbols(value: object) -> set:
    """Symbols in a value's number, shape, strides or offset."""
    if isinstance(value, tuple | list):
        return _union(_free_symbols(v) for v in value)
    numbers = [value]
    if isinstance(value, torch.Tensor):
        numbers = [*value.shape, *value.stride(), value.storage_offset()]
    kinds = (torch.SymInt, torch.SymFloat, torch.SymBool)
    return _union(n.node.expr.free_symbols for n in numbers if isinstance(n, kinds))


def _symbol_nodes(graph: fx.Graph) -> dict[object, fx.Node]:
    """Which node carries the value of each free symbol."""
    found: dict[object, fx.Node] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
            found.setdefault(value.node.expr, node)
    return found
