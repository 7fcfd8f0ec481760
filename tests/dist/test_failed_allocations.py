# SPDX-License-Identifier: Apache-2.0
"""An allocation that fails on one rank, anywhere in an instruction: it is tried again, and nothing
is summed twice or sent twice. On CPUs; most with reductions that are pushed, which take memory on
their way (see test_push_reductions.py).
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from failing_memory import FailingMemory
from ranks import run_ranks
from rows_step import RowsStep, batch, expected_gradient, shard_of
from test_push_reductions import pushing
from toy_step import Toy
from toy_step import batch as toy_batch

from deepcompile import _core, _runtime

WORLD, SHORT_RANK = 3, 1  # more than two ranks add 16-bit pieces up in memory of their own
ARMED = 1 << 40  # bytes: a limit that is never reached, so that regions can run again
PARAMS = ("p0", "p1", "p2")  # of one size, so that the third takes the first's place in the inbox
NUMEL = 1000
PIECE = 384  # elements: a third, as shards are padded

STEP = """
step sums world=3 accumulation=2 reduce=bf16 boundary
param p0 bf16 1000
param p1 bf16 1000
param p2 bf16 1000
value x 64B
value loss 4B
value g.loss 4B
value g.p0 64B grad=p0
value g.p1 64B grad=p1
value g.p2 64B grad=p2
"""
GRAPH = """
region fwd code=0 (x, p0, p1, p2) -> (loss)
region bwd code=1 (g.loss, x) -> (g.p0, g.p1, g.p2)
forward 0 (x) -> (loss)
  run fwd
end
backward 0 (g.loss) -> ()
  run bwd
end
"""
UPDATE = "update\nend\n"


def forward(args: list) -> list:
    x, *params = args
    args.clear()
    return [(sum(params) * x).float().sum()]


def backward(args: list) -> list:
    _, x = args
    args.clear()
    return [x * factor for factor in (1, 3, 5)]


class Sums:
    """Three parameters whose gradients are summed on each rank, then pushed. All three reductions
    are under way before the first is accumulated."""

    def __init__(self, rank: int, world: int, library: str, memory: FailingMemory, limit: int):
        self.memory, self.rank = memory, rank
        self.runtime = _runtime.Runtime(
            dist.group.WORLD, rank, world, torch.device("cpu"), "bf16", 0.0, 2, 20.0,
            reduce="copy_engine", copy_engine_options={"library": library, "least_bytes": 1},
        )  # fmt: skip
        self.params = {}
        for name in PARAMS:
            self.params[name] = torch.nn.Parameter(torch.ones(NUMEL, dtype=torch.bfloat16))
            self.runtime.add_param(name, [(name, self.params[name], 0)], NUMEL, "sharded", True)
            self.runtime.set_hyper(name, 1e-2, 0.9, 0.95, 1e-8, 0.0, True)
        self.graph, self.update = self._load(GRAPH), self._load(UPDATE)
        if rank == SHORT_RANK:
            self.runtime.limit_bytes(limit)

    def _load(self, sections: str) -> int:
        program = _core.StepProgram.parse(STEP + sections)
        _core.run_passes(program, ["zero3_compile"])
        text = str(program)
        if sections == GRAPH:
            text = text.replace("  accumulate p0\n", "")
            text = text.replace("  accumulate p1\n", "  accumulate p0\n  accumulate p1\n")
        program = _core.StepProgram.parse(text)
        return self.runtime.load_plan(_core.freeze(program).serialize(), [forward, backward])

    def step(self, number: int, **failing: int) -> tuple[list[torch.Tensor], int]:
        """States after a step, and how many allocations failed in its last backward."""
        for micro in range(2):
            generator = torch.Generator().manual_seed(10 * number + 3 * micro + self.rank)
            x = torch.randn(NUMEL, generator=generator).to(torch.bfloat16)
            self.runtime.set_last_micro_batch(micro == 1)
            call, token = self.runtime.new_call(self.graph)
            (loss,) = self.runtime.run(self.graph, 0, call, [x])
            if micro == 1 and failing and self.rank == SHORT_RANK:
                self.memory.fail(**failing)
            self.runtime.run(self.graph, 1, call, [torch.ones_like(loss)])
            failed = self.memory.stop()
        gradients = [self.runtime.gradient(name) for name in PARAMS]
        self.runtime.step(self.update)
        kinds = ("weight", "master", "exp_avg", "exp_avg_sq")
        states = [p[k].detach().clone() for p in self.runtime.pieces() for k in kinds]
        return gradients + states, failed


def summed(rank, world, driver, allocator, bytes, count, steps, limit=ARMED):
    """How many allocations failed in each step; whether the bits are those of a twin."""
    memory = FailingMemory(allocator)
    toy, twin = (Sums(rank, world, driver, memory, limit) for _ in range(2))
    failures, same = [], []
    for number in range(steps):
        found, failed = toy.step(number, bytes=bytes, after=number, count=count)
        expected, _ = twin.step(number)
        same.append(all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)))
        failures.append(failed)
    return failures, same, toy.runtime.relieved()["times"]


CASES = {
    "the sum of a push": (4 * PIECE, 1, 16),  # what accumulates it takes as much
    "the sum of a push, and the next by relief itself": (4 * PIECE, 2, 12),
    "a gradient beside its local sum": (4 * WORLD * PIECE, 1, 4),
    "what is sent": (2 * WORLD * PIECE, 1, 4),
    "what is received": (2 * PIECE, 1, 4),
    "what is sent, in a batch": (2 * WORLD * PIECE, 1, 4, 0),
    "what is received, in a batch": (2 * PIECE, 1, 4, 0),
}
"""What fails: bytes, how many of them, and before how many of a backward's; 0: the rank's memory
has no limit, so that its transfers go in batches."""


@pytest.mark.parametrize("what", CASES)
def test_a_local_sum_is_added_to_once(driver, failing_allocator, what):
    results = run_ranks(summed, WORLD, driver, failing_allocator, *CASES[what])
    for rank, (failures, same, times) in enumerate(results):
        assert all(same), (rank, failures, same)
        assert (sum(failures) > 2 and times > 2) == (rank == SHORT_RANK), failures


MESSAGES = ((64, 0), (256, 0), (256, 1), (256 * WORLD, 0))
"""(bytes, how many before succeed) of what the ranks' messages take: their longest, once, and on
all ranks; a handle of the driver's is sent in that too."""


def first_transfers(rank, world, driver, allocator, gather):
    """How many allocations failed while new engines set up their peers' memory, and whether their
    losses are as without."""
    memory = FailingMemory(allocator)
    kind = {"dtype": torch.bfloat16}
    options = dict(gather=gather, reduce="bf16", **kind)
    expected = pushing(rank, world, driver, **options).train(2, rank, world, **kind)
    failures, same = 0, []
    for bytes, after in MESSAGES:
        toy = pushing(rank, world, driver, **options)
        call, token = toy.runtime.new_call(toy.graph)
        if rank == SHORT_RANK:
            toy.runtime.limit_bytes(ARMED)
            memory.fail(bytes, after)
        losses = toy.runtime.run(toy.graph, 0, call, list(toy_batch(rank, **kind)))
        toy.runtime.run(toy.graph, 1, call, [torch.ones_like(losses[0])])
        failures += memory.stop()
        toy.step()
        losses.append(toy.micro_step(*toy_batch(world + rank, **kind)))
        same.append(all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True)))
    return failures, same


@pytest.mark.parametrize("gather", ["nccl", "copy_engine"])
def test_peer_memory_is_set_up_once(driver, failing_allocator, gather):
    results = run_ranks(first_transfers, WORLD, driver, failing_allocator, gather)
    for rank, (failures, same) in enumerate(results):
        assert all(same), (rank, failures, same)
        assert (failures > 2) == (rank == SHORT_RANK), failures


COUNT, ROW, NUMBERS = 10, 21, 4


def by_rows(rank, world, driver, allocator):
    """(allocations that failed, whether the mean gradient is right) of micro batches of an
    embedding whose rows are pushed. RowsStep checks what is gathered."""
    memory, found = FailingMemory(allocator), []
    batches = [batch(r, COUNT, ROW, NUMBERS) for r in range(world)]
    expected = shard_of(expected_gradient(batches, COUNT, ROW, world), rank, world)
    for after in range(14):
        step = RowsStep(rank, world, COUNT, ROW, dtype=torch.bfloat16, reduce="bf16", driver=driver)
        if rank == SHORT_RANK:
            step.runtime.limit_bytes(ARMED)
            memory.fail(4 * NUMBERS * ROW, after)  # a sum's; as much as the regions take
        step.micro_batch(*batches[rank])
        found.append((memory.stop(), torch.allclose(step.gradient(), expected)))
    return found


def test_rows_that_found_no_memory_are_waited_for_again(driver, failing_allocator):
    results = run_ranks(by_rows, WORLD, driver, failing_allocator)
    for rank, found in enumerate(results):
        assert all(right for _, right in found), found
        assert (sum(failed for failed, _ in found) > 4) == (rank == SHORT_RANK), found


def clipped(rank, world, allocator):
    """(allocations that failed, the norm) of steps that are clipped, and of a twin's."""
    memory = FailingMemory(allocator)
    toy, twin = (Toy(rank, world, group=dist.group.WORLD, clip=0.5, timeout_s=20) for _ in range(2))
    found = []
    for each in (toy, twin):
        each.train(1, rank, world)  # then there are states that relief can move
    for number in range(6):
        norms, failed = [], 0
        for each in (toy, twin):
            each.micro_step(*toy_batch(number * world + rank))
            if each is toy and rank == 1:
                toy.runtime.limit_bytes(ARMED)
                memory.fail(8, number)  # the ranks' sum, and what follows from it
            norms.append(each.step()["grad_norm"])
            failed += memory.stop()
        found.append((failed, *norms))
    ours, theirs = toy.everything(), twin.everything()
    return found, all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_squares_are_summed_over_ranks_once(failing_allocator):
    for rank, (found, same) in enumerate(run_ranks(clipped, 2, failing_allocator)):
        assert same and all(norm == expected for _, norm, expected in found), found
        assert (sum(failed for failed, *_ in found) > 2) == (rank == 1), found
