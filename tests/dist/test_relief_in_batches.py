# SPDX-License-Identifier: Apache-2.0
"""A rank that finds no memory between two transfers that the others have given together: what it
waits for to make room must not wait for what it has yet to start. On CPUs, where an allocation of
one rank fails once and the driver's copies are a library in its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from failing_memory import FailingMemory
from ranks import run_ranks

from deepcompile import _core, _runtime

SHORT_RANK, TIMEOUT_S = 1, 10.0
EDITS = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Case:
    """A step of parameters that all are gathered in the forward, and what fails in it."""

    world: int
    params: dict[str, tuple[int, str]]
    """Name to (elements, placement)."""
    section: int
    """Of the graph: 0 the forward, 1 the backward."""
    failing: tuple[int, int]
    """Bytes of the allocation that fails, and how many of these succeed before it."""
    alone: tuple[str, ...] = ()
    """Parameters whose gradients a region of its own makes, before the others'."""
    edits: EDITS = ()
    update_edits: EDITS = ()
    in_step_bytes: int = 1 << 24

    def text(self, sections: str) -> str:
        lines = [f"step relief world={self.world} accumulation=1 reduce=bf16"]
        lines += [f"param {p} bf16 {n} {place}" for p, (n, place) in self.params.items()]
        return "\n".join(lines) + "\n" + sections

    def graph(self) -> str:
        params, later = list(self.params), [p for p in self.params if p not in self.alone]
        values = [f"value {v} 64B" for v in ("x", "loss", "g.loss")]
        values += [f"value g.{p} 64B grad={p}" for p in params]
        regions = [f"region fwd code=0 (x, {', '.join(params)}) -> (loss)"]
        made = [("bwd.0", self.alone)] * bool(self.alone) + [("bwd.1", later)]
        for code, (name, group) in enumerate(made, 1):
            grads = ", ".join(f"g.{p}" for p in group)
            regions.append(f"region {name} code={code} (g.loss, x) -> ({grads})")
        runs = "".join(f"  run {name}\n" for name, _ in made)
        sections = (
            f"forward 0 (x) -> (loss)\n  run fwd\nend\nbackward 0 (g.loss) -> ()\n{runs}end\n"
        )
        return "\n".join([*values, *regions]) + "\n" + sections

    def codes(self) -> list:
        later = [p for p in self.params if p not in self.alone]
        groups = [self.alone] * bool(self.alone) + [later]
        return [self._forward, *(self._backward(group) for group in groups)]

    @staticmethod
    def _forward(args: list) -> list:
        x, *params = args
        args.clear()
        return [x.float().sum() * sum(p.float().sum() for p in params)]

    def _backward(self, group) -> object:
        def run(args: list) -> list:
            _, x = args
            args.clear()
            scale = x.float().mean()
            return [torch.full((self.params[p][0],), float(scale)).bfloat16() for p in group]

        return run

    def plan(self, sections: str, edits: EDITS) -> str:
        program = _core.StepProgram.parse(self.text(sections))
        _core.run_passes(program, ["zero3_compile"])
        text = str(program)
        for old, new in edits:
            assert old in text, text
            text = text.replace(old, new)
        return _core.freeze(_core.StepProgram.parse(text)).serialize()


def train(rank: int, world: int, case: Case, driver: str, allocator: str) -> tuple:
    """Of one rank: how many allocations failed, how often room was made, and whether the states
    are those of a twin for whom nothing failed."""
    memory, found, failed = FailingMemory(allocator), [], 0
    for fails in (False, True):
        runtime = _runtime.Runtime(
            dist.group.WORLD, rank, world, torch.device("cpu"), "bf16", 0.0, 1, TIMEOUT_S,
            gather="copy_engine", reduce="copy_engine",
            copy_engine_options={
                "library": driver, "least_bytes": 1, "in_step_bytes": case.in_step_bytes
            },
        )  # fmt: skip
        for name, (numel, placement) in case.params.items():
            parameter = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16))
            runtime.add_param(name, [(name, parameter, 0)], numel, placement, True)
            runtime.set_hyper(name, 1e-2, 0.9, 0.95, 1e-8, 0.0, True)
        graph = runtime.load_plan(case.plan(case.graph(), case.edits), case.codes())
        update = runtime.load_plan(case.plan("update\nend\n", case.update_edits), [])
        for number in range(4):
            x = torch.randn(8, generator=torch.Generator().manual_seed(9 * number + rank))
            call, token = runtime.new_call(graph)
            inputs = [x.bfloat16()]
            for section in (0, 1):
                dist.barrier()
                bytes, after = case.failing
                if fails and number == 2 and rank == SHORT_RANK and section == case.section:
                    memory.fail(bytes, after, 1)
                outputs = runtime.run(graph, section, call, inputs)
                failed += memory.stop()
                inputs = [torch.ones_like(outputs[0])] if outputs else []
            runtime.step(update)
        runtime.settle()
        kinds = ("weight", "master", "exp_avg", "exp_avg_sq")
        found.append([p[k].detach().clone() for p in runtime.pieces() for k in kinds])
    same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    return failed, runtime.relieved()["times"], same


SHARDED = {"p0": (1000, "sharded"), "p1": (1000, "sharded"), "p2": (1000, "sharded")}
ACCUMULATES = tuple(f"  accumulate {p}\n" for p in ("p0", "p1", "p2"))
CASES = {
    # Ranks keep in step: the others' copies of the second reduction wait for this rank's, which
    # starts it once the first one's sum has made room.
    "the second of two reductions": Case(3, SHARDED, 1, (2 * 384, 1), in_step_bytes=1),
    # p1's place in the inbox is p2's, which was reduced long before and is not summed yet; p0 comes
    # first in the order of parameters.
    "a reduction whose place another has": Case(
        2, SHARDED, 1, (2 * 512, 2), alone=("p2",),
        edits=(*((line, "") for line in ACCUMULATES[::-1]), (
            "  reduce p1 (g.p1)\n",
            "  reduce p1 (g.p1)\n" + ACCUMULATES[2] + ACCUMULATES[0] + ACCUMULATES[1],
        )),
    ),
    # w is whole: waiting for its gather is waiting for the peers to have read it, and they read
    # once both are ready.
    "the gather beside one that stays": Case(
        2, {"w": (1000, "whole"), "q": (1500, "sharded")}, 0, (2 * 1536, 0),
        edits=(("forward 0 (x) -> (loss)\n  gather q\n  wait q\n",
                "forward 0 (x) -> (loss)\n  update w\n  update q\n  gather w\n  gather q\n"
                "  wait w\n  wait q\n"),),
        update_edits=(("  gather w\n  wait w\n", ""),
                      ("  update w\n  update q\n", "  defer w\n  defer q\n")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_making_room_waits_for_nothing_that_it_holds_up(driver, failing_allocator, what):
    case = CASES[what]
    found = run_ranks(train, case.world, case, driver, failing_allocator, timeout=60)
    for rank, (failed, times, same) in enumerate(found):
        assert same, (rank, found)
        assert (failed > 0 and times > 0) == (rank == SHORT_RANK), found
