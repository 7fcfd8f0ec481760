# SPDX-License-Identifier: Apache-2.0
"""Embeddings of which only the rows in use are exchanged.

A micro batch reads few rows of a large embedding, and only these have a gradient. Exchanging them
alone sums each gradient in another order, so it is no plan's choice: it is decided once, by all
ranks together, when the first training graph is captured and before it has a plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from . import _core
from .config import Config
from .distributed import Ranks
from .errors import UserError
from .params import ParamTable

Simulate = Callable[[Any], int]
"""Nanoseconds of a step with a graph of one training forward and backward."""

HOST_EXCHANGE_NS = 200_000
"""Nanoseconds for the ranks' hosts to tell each other how many rows they read, at each gather: no
machine's description has it."""


class EmbeddingRows:
    """The embeddings of one engine that are exchanged by rows."""

    def __init__(self, table: ParamTable, config: Config, ranks: Ranks, runtime: Any):
        self._table, self._ranks, self._runtime = table, ranks, runtime
        self._wanted = config.compile.embedding_rows
        self._chosen: set[int] | None = None
        """Params of the table; None: not decided yet."""
        self._why: dict[str, str] = {}

    def report(self) -> dict[str, dict[str, Any]]:
        """Member to {rows: whether only rows are exchanged, why}."""
        rows = {self._table.params[i].members[0].name for i in self._chosen or ()}
        return {name: {"rows": name in rows, "why": why} for name, why in self._why.items()}

    def mark(self, program: Any, captured: Any, simulate: Simulate) -> None:
        """Let a graph's compute-only program exchange rows where that was decided. Collective for
        the first training graph that reads an embedding, where it is."""
        reads = captured.ir.rows
        if captured.inference or not reads:
            return
        if self._chosen is None:
            decision = self._decide(program, reads, simulate) if self._ranks.rank == 0 else None
            self._adopt(*self._ranks.from_first(decision))
        for read in reads:
            if read.member.param in self._chosen and read.value is not None:
                read_rows(program, read, self._table)
            self._why.setdefault(
                self._table.member(read.member).name, "not in the graph that was decided by"
            )

    def close(self) -> None:
        """After the first step: nothing is decided any more."""
        if self._chosen is None:
            missing = self._wanted == "on" and self._ranks.world > 1
            self._adopt(set(), {}, "no training graph reads one" if missing else "")

    def _decide(
        self, program: Any, reads: list[Any], simulate: Simulate
    ) -> tuple[set[int], dict[str, str], str]:
        """(params, why by member, an error or "")."""
        chosen: set[int] = set()
        why: dict[str, str] = {}
        for read in reads:
            name = self._table.member(read.member).name
            yes, why[name] = self._choose(program, read, simulate)
            if yes:
                chosen.add(read.member.param)
                program = program.copy()
                read_rows(program, read, self._table)
        if self._wanted != "on" or chosen or self._ranks.world == 1:
            return chosen, why, ""
        return chosen, why, "; ".join(f"{name}: {text}" for name, text in why.items())

    def _choose(self, program: Any, read: Any, simulate: Simulate) -> tuple[bool, str]:
        if read.value is None:
            return False, read.why
        if self._ranks.world == 1:
            return False, "there is one rank"
        if self._wanted != "auto":
            return self._wanted == "on", f"compile.embedding_rows is {self._wanted!r}"
        return pays(program, read, self._table, simulate)

    def _adopt(self, chosen: set[int], why: dict[str, str], error: str) -> None:
        if error:
            raise UserError(
                f'[planning] compile.embedding_rows is "on", and no embedding can be exchanged by '
                f'rows: {error}. Set it to "auto".'
            )
        if chosen:
            self._runtime.exchange_rows_over(_host_group(self._ranks))
        self._chosen, self._why = chosen, why


def read_rows(program: Any, read: Any, table: ParamTable) -> None:
    """Let a graph's compute-only program exchange the rows of a RowRead with a value."""
    row = table.member(read.member).shape[1]
    program.read_rows(read.value, table.spec(read.member).name, row)


def pays(program: Any, read: Any, table: ParamTable, simulate: Simulate) -> tuple[bool, str]:
    """Whether that makes the graph's step faster, and the two times in words."""
    by_rows = program.copy()
    read_rows(by_rows, read, table)
    try:
        whole_ns = simulate(program)
        rows_ns = simulate(by_rows) + HOST_EXCHANGE_NS * program.accumulation
    except UserError as error:
        return False, f"the two could not be compared: {error}"
    times = f"simulated step {rows_ns / 1e6:.3f} ms by rows, {whole_ns / 1e6:.3f} ms whole"
    return rows_ns < whole_ns, times


def _host_group(ranks: Ranks) -> Any:
    """A group of these ranks for CPU tensors; collective."""
    if ranks.device.type == "cpu":
        return ranks.group
    members = dist.get_process_group_ranks(ranks.group)
    return dist.new_group(members, backend="gloo")


def simulator(machine: Any, update: Any, stage_pass: str) -> Simulate:
    """Steps by the stage's plan on a machine."""

    def simulate(program: Any) -> int:
        step = _core.merge_steps("step", [program], update)
        _core.analytic_costs(step, machine)
        _core.run_passes(step, [stage_pass])
        return _core.simulate(step, machine).time_ns

    return simulate
