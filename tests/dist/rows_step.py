# SPDX-License-Identifier: Apache-2.0
"""A hand-made step of one embedding that is exchanged by rows, for runtime tests.

    h = embedding(ids, table);  loss = sum(h * g)

so that the gradient of a row is the sum of g over the places that name it. The table's elements
are their own numbers, and g is small integers: every sum is exact, and must be met bit by bit.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from deepcompile import _core, _runtime

PROGRAM = """
step rows world={world} accumulation={accumulation} reduce={reduce}
param table {dtype} {numel}
value ids 64B{rows}
value g 64B
value loss 4B
value g.loss 4B
value g.table 64B grad=table
region fwd code=0 (ids, g, table) -> (loss)
region bwd code=1 (g.loss, ids, g) -> (g.table)
forward 0 (ids, g) -> (loss)
  run fwd
end
backward 0 (g.loss) -> ()
  run bwd
end
"""
UPDATE = """
step rows world={world} accumulation={accumulation} reduce={reduce}
param table {dtype} {numel}
update
end
"""
SHORT = {torch.float32: "f32", torch.bfloat16: "bf16"}


class RowsStep:
    """A rank's runtime with one table of `count` rows of `row` elements."""

    def __init__(
        self,
        rank: int,
        world: int,
        count: int,
        row: int,
        by_rows: bool = True,
        accumulation: int = 1,
        dtype: torch.dtype = torch.float32,
        reduce: str = "f32",
        edit: tuple[str, str] = ("", ""),
        device: str = "cpu",
        driver: str = "",
    ):
        """`edit`: a piece of the planned text, and what stands in its place. `driver`: a library
        in libcuda's place, over which reductions are pushed, the smallest too."""
        self.edit = edit
        self.count, self.row = count, row
        values = torch.arange(count * row, dtype=torch.float32)
        self.values = values.view(count, row).to(device, dtype)
        self.table = torch.nn.Parameter(self.values.clone())
        self.runtime = _runtime.Runtime(
            dist.group.WORLD, rank, world, torch.device(device), reduce, 0.0, accumulation, 20.0,
            reduce="copy_engine" if driver else "nccl",
            copy_engine_options={"library": driver, "least_bytes": 1} if driver else {},
        )  # fmt: skip
        self.runtime.add_param("table", [("table", self.table, 0)], count * row, "sharded", True)
        self.runtime.set_hyper("table", 0.5, 0.9, 0.95, 1e-8, 0.0, True)
        on_cpu = device == "cpu"
        hosts = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo")
        self.runtime.exchange_rows_over(hosts)
        fields = dict(
            world=world, accumulation=accumulation, reduce=reduce, dtype=SHORT[dtype],
            numel=count * row, rows=f" rows=table row={row}" if by_rows else "",
        )  # fmt: skip
        self.text = PROGRAM.format(**fields)
        self.plan = self._load(self.text)
        self.update = self._load(UPDATE.format(**fields))

    def _load(self, text: str) -> int:
        program = _core.StepProgram.parse(text)
        _core.run_passes(program, ["zero3_compile"])
        program = _core.StepProgram.parse(str(program).replace(*self.edit))
        return self.runtime.load_plan(_core.freeze(program).serialize(), [self._fwd, self._bwd])

    def _fwd(self, args: list) -> list:
        ids, _, table = args
        self.seen = table[ids.flatten()].clone()
        return self._fwd_unchecked(args)

    def _fwd_unchecked(self, args: list) -> list:
        ids, g, table = args
        args.clear()
        return [(torch.nn.functional.embedding(ids, table).float() * g).sum()]

    def _bwd(self, args: list) -> list:
        cotangent, ids, g = args
        args.clear()
        grads = (g * cotangent).to(self.values.dtype)
        return [torch.ops.aten.embedding_dense_backward(grads, ids, self.count, -1, False)]

    def micro_batch(self, ids: torch.Tensor, g: torch.Tensor) -> int:
        call, self.token = self.runtime.new_call(self.plan)
        (loss,) = self.runtime.run(self.plan, 0, call, [ids, g])
        assert torch.equal(self.seen, self.values[ids.flatten()]), "the rows that were gathered"
        self.runtime.run(self.plan, 1, call, [torch.ones_like(loss)])
        return call

    def gradient(self) -> torch.Tensor | None:
        return self.runtime.gradient("table")


def batch(seed: int, count: int, row: int, numbers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers, with repeats, and their gradients: integers up to 4."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, count, (1, numbers), generator=generator)
    return ids, torch.randint(-4, 5, (1, numbers, row), generator=generator).float()


def expected_gradient(
    batches: list[tuple[torch.Tensor, torch.Tensor]], count: int, row: int, world: int
) -> torch.Tensor:
    """Mean over ranks of the whole gradient of these micro batches."""
    total = torch.zeros(count, row)
    for ids, g in batches:
        total.index_add_(0, ids.flatten(), g.view(-1, row))
    return (total / world).flatten()


def shard_of(whole: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """A rank's piece, padded, as the runtime cuts it."""
    piece = -(-whole.numel() // world)
    piece = -(-piece // 64) * 64
    padded = torch.zeros(piece * world)
    padded[: whole.numel()] = whole
    return padded[rank * piece : (rank + 1) * piece]


def everything(step: RowsStep) -> torch.Tensor:
    """The whole table, gathered densely."""
    step.runtime.gather(["table"])
    step.runtime.wait(["table"])
    whole = step.table.detach().clone()
    step.runtime.release(["table"])
    return whole
