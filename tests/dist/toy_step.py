# SPDX-License-Identifier: Apache-2.0
"""A hand-made step for runtime tests: two linears, and a pack of a bias and a scale.

    h = relu(x @ w1.T + bias);  y = (h @ w2.T) * scale;  loss = mean((y - t)**2)

Sizes are odd, so that every shard needs padding. The codes are eager; their backward is
autograd's, so a plain module (``Reference``) is the expected result.
"""

from __future__ import annotations

from typing import Any

import torch

from deepcompile import _core, _runtime

WIDTH, HIDDEN, OUT = 29, 37, 11
PACK = "small"
OFFSETS = {"bias": 0, "scale": 48}  # elements; members start at multiples of 16
PACK_NUMEL = 48 + OUT

PLACEMENTS = {0: "replicated", 1: "whole", 3: "sharded"}  # of the weights, by stage

STEP = """
step toy world={world} accumulation={accumulation} reduce={reduce}{clip}{boundary}

param w1 {dtype} {w1}{big}
param w2 {dtype} {w2}{big}
param small {dtype} {small} {pack} (bias, scale)
"""

GRAPH = """
value x 64B
value t 64B
value h 64B
value loss 4B
value g.loss 4B
value g.h 64B
value g.w1 64B grad=w1
value g.w2 64B grad=w2
value g.bias 64B grad=small
value g.scale 64B grad=small[1]

region fwd.0 code=0 (x, w1, small) -> (h)
region fwd.1 code=1 (h, t, w2, small[1]) -> (loss)
region bwd.1 code=2 (g.loss, h, t, w2, small[1]) -> (g.h, g.w2, g.scale)
region bwd.0 code=3 (g.h, x, w1, small) -> (g.w1, g.bias)

forward 0 (x, t) -> (loss)
  run fwd.0
  run fwd.1
end
backward 0 (g.loss) -> ()
  run bwd.1
  run bwd.0
end
"""

INFERENCE = (
    GRAPH[: GRAPH.index("value g.loss")]
    + """
region fwd.0 code=0 (x, w1, small) -> (h)
region fwd.1 code=1 (h, t, w2, small[1]) -> (loss)

inference 1 (x, t) -> (loss)
  run fwd.0
  run fwd.1
end
"""
)

UPDATE = "update\nend\n"


class Reference(torch.nn.Module):
    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def values(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.3).to(dtype))

        self.w1, self.w2 = values(HIDDEN, WIDTH), values(OUT, HIDDEN)
        self.bias, self.scale = values(HIDDEN), values(OUT)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return second(first(x, self.w1, self.bias), t, self.w2, self.scale)


def first(x: torch.Tensor, w1: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.relu(x @ w1.T + bias)


def second(h: torch.Tensor, t: torch.Tensor, w2: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (((h @ w2.T) * scale - t).float() ** 2).mean()


def grads_of(fn: Any, inputs: list, wanted: list[int], cotangent: torch.Tensor) -> list:
    leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    with torch.enable_grad():
        output = fn(*leaves)
    return list(torch.autograd.grad(output, [leaves[i] for i in wanted], cotangent))


def code_first(args: list) -> list:
    x, w1, bias = args
    args.clear()
    return [first(x, w1, bias)]


def code_second(args: list) -> list:
    h, t, w2, scale = args
    args.clear()
    return [second(h, t, w2, scale)]


def code_second_backward(args: list) -> list:
    cotangent, *inputs = args
    args.clear()
    return grads_of(second, inputs, [0, 2, 3], cotangent)


def code_first_backward(args: list) -> list:
    cotangent, *inputs = args
    args.clear()
    return grads_of(first, inputs, [1, 2], cotangent)


CODES = [code_first, code_second, code_second_backward, code_first_backward]
SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}


def program_text(
    world: int,
    stage: int,
    sections: str,
    *,
    accumulation=1,
    clip=False,
    reduce="f32",
    dtype="f32",
    boundary=False,
) -> str:
    header = STEP.format(
        world=world,
        accumulation=accumulation,
        reduce=reduce,
        clip=" clip" if clip else "",
        boundary=" boundary" if boundary else "",
        dtype=dtype,
        w1=HIDDEN * WIDTH,
        w2=OUT * HIDDEN,
        small=PACK_NUMEL,
        big="" if stage == 3 else " " + PLACEMENTS[stage],
        pack=PLACEMENTS[min(stage, 1)],
    )
    return header + sections


def plan_text(
    world: int,
    stage: int,
    sections: str,
    edits: tuple[tuple[str, str], ...] = (),
    coalesce: bool = False,
    **options: Any,
) -> str:
    """``edits``: pieces of the compiled program's text and what stands in their place. Those that
    do not occur are left out. ``coalesce``: afterwards, what can start together does."""
    program = _core.StepProgram.parse(program_text(world, stage, sections, **options))
    _core.run_passes(program, ["zero0_compile" if stage == 0 else "zero3_compile"])
    if edits:
        text = str(program)
        for old, new in edits:
            text = text.replace(old, new)
        program = _core.StepProgram.parse(text)
    if coalesce:
        _core.run_passes(program, ["coalesce"])
    return _core.freeze(program).serialize()


def after(line: str, *lines: str) -> tuple[str, str]:
    return f"  {line}\n", "".join(f"  {each}\n" for each in (line, *lines))


def before(line: str, *lines: str) -> tuple[str, str]:
    return f"  {line}\n", "".join(f"  {each}\n" for each in (*lines, line))


def for_each(text: str, *lines: str) -> tuple[tuple[str, str], ...]:
    """Lines put after TEXT PARAM, for each parameter; P in them is its name."""
    return tuple(
        after(f"{text} {p}", *(line.replace("P", p) for line in lines)) for p in ("w1", "w2", PACK)
    )


def instead(text: str, new: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"  {text} {p}\n", f"  {new} {p}\n") for p in ("w1", "w2", PACK))


GATHER_AGAIN = (
    "gather w1", "wait w1", f"gather {PACK}", f"wait {PACK}",
)  # fmt: skip
LATE_GRAPH = (before("run fwd.0", *GATHER_AGAIN), before("run fwd.1", "gather w2", "wait w2"))
LATE_UPDATE = (
    *instead("update", "defer"),
    *((f"  {op} {p}\n", "") for op in ("gather", "wait") for p in ("w1", "w2", PACK)),
)

PLANS = {
    "values": (
        (
            after("run fwd.0", "offload (h)"),
            after("run fwd.1", "evict (h)"),
            before("run bwd.1", "reload (h)", "await (h)"),
        ),
        (),
    ),
    "remade": ((before("run bwd.1", *GATHER_AGAIN, "run fwd.0"),), ()),
    "states": (
        (
            before("run fwd.0", *(f"evict_states {p}" for p in ("w1", "w2", PACK))),
            after("run bwd.0", *(f"reload_states {p}" for p in ("w1", "w2", PACK))),
        ),
        tuple(
            (f"  update {p}\n", f"  await_states {p}\n  update {p}\n  offload_states {p}\n")
            for p in ("w1", "w2", PACK)
        ),
    ),
    "states brought in by the update": (
        (),
        for_each("update", "offload_states P", "evict_states P"),
    ),
    "deferred": (LATE_GRAPH, LATE_UPDATE),
    "deferred, updated in the forward": (
        (
            before("run fwd.0", "update w1", f"update {PACK}", "update w2", *GATHER_AGAIN),
            LATE_GRAPH[1],
        ),
        LATE_UPDATE,
    ),
    "early": (for_each("accumulate", "update P"), ()),
}
"""Edits of the graph's program and of the update's. None of them changes a bit."""


class Toy:
    """The runtime on this toy: parameters added, plans loaded."""

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        stage: int = 3,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        reduce: str = "f32",
        clip: float = 0.0,
        accumulation: int = 1,
        timeout_s: float = 60.0,
        group: Any = None,
        trainable: bool = True,
        codes: list | None = None,
        hyper: dict | None = None,
        plan: str = "",
        coalesce: bool = False,
        boundary: bool = False,
        gather: str = "nccl",
        reduce_over: str = "nccl",
        copy_engine_options: dict | None = None,
        recorder: Any = None,
    ):
        self.model = Reference(dtype=dtype).to(device)
        self.runtime = _runtime.Runtime(
            group, rank, world, torch.device(device), reduce, clip, accumulation, timeout_s,
            gather, reduce_over, copy_engine_options or {}, recorder,
        )  # fmt: skip
        big, pack = PLACEMENTS[stage], PLACEMENTS[min(stage, 1)]
        for name in ("w1", "w2"):
            tensor = getattr(self.model, name)
            members = [(name, tensor, 0)]
            self.runtime.add_param(name, members, tensor.numel(), big, trainable)
        members = [(name, getattr(self.model, name), at) for name, at in OFFSETS.items()]
        self.runtime.add_param(PACK, members, PACK_NUMEL, pack, trainable)
        self.set_hyper(**(hyper or {}))
        options = dict(accumulation=accumulation, clip=clip > 0, reduce=reduce, dtype=SHORT[dtype])
        options |= dict(boundary=boundary, coalesce=coalesce)
        self.accumulation = accumulation
        if trainable:
            graph_edits, update_edits = PLANS[plan] if plan else ((), ())
            graph = plan_text(world, stage, GRAPH, graph_edits, **options)
            update = plan_text(world, stage, UPDATE, update_edits, **options)
            self.graph = self.runtime.load_plan(graph, codes or CODES)
            self.update = self.runtime.load_plan(update, codes or CODES)

    def set_hyper(self, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, adamw=True):
        for name in ("w1", "w2", "bias", "scale"):
            self.runtime.set_hyper(name, lr, beta1, beta2, eps, weight_decay, adamw)

    def micro_step(self, x: torch.Tensor, t: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """Forward and backward; ``factor`` multiplies the loss (1/accumulation, loss scale)."""
        call, self.token = self.runtime.new_call(self.graph)
        (loss,) = self.runtime.run(self.graph, 0, call, [x, t])
        self.runtime.run(self.graph, 1, call, [torch.full_like(loss, factor)])
        return loss

    def step(self, **options: Any) -> dict:
        return self.runtime.step(self.update, **options)

    def train(self, steps: int, rank: int = 0, world: int = 1, **kind: Any) -> list[torch.Tensor]:
        """Losses of whole steps, each rank on its own rows."""
        losses = []
        for step in range(steps):
            for micro in range(self.accumulation):
                self.runtime.set_last_micro_batch(micro == self.accumulation - 1)
                seed = (step * self.accumulation + micro) * world + rank
                losses.append(self.micro_step(*batch(seed, **kind), 1.0 / self.accumulation))
            self.step()
        return losses

    def everything(self) -> dict[str, torch.Tensor]:
        """This rank's states and the whole weights, on the CPU."""
        found = {}
        for piece in self.runtime.pieces():
            for kind in ("weight", "master", "exp_avg", "exp_avg_sq"):
                found[f"{kind}.{piece['member']}"] = piece[kind].detach().cpu().clone()
            found[f"step.{piece['member']}"] = torch.tensor(piece["step"])
        return found | {n: v.cpu() for n, v in self.full_values().items()}

    def load(self, twin: Toy) -> None:
        """What load_checkpoint does: this toy gets the weights and states of `twin`."""
        for ours, theirs in zip(self.runtime.pieces(), twin.runtime.pieces(), strict=True):
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                ours[kind].copy_(theirs[kind])
            self.runtime.set_member_step(ours["member"], theirs["step"])
        self.runtime.masters_changed()

    def full_values(self) -> dict[str, torch.Tensor]:
        names = ["w1", "w2", PACK]
        self.runtime.gather(names)
        self.runtime.wait(names)
        values = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.runtime.release(names)
        return values


def batch(seed: int, rows: int = 6, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(rows, WIDTH, generator=generator)
    t = torch.randn(rows, OUT, generator=generator)
    return x.to(device, dtype), t.to(device, dtype)


def reseal(text: str) -> str:
    """A plan's text after an edit, with the hash (64-bit FNV-1a) of its new content."""
    body = text.split("\n", 2)[2].removesuffix("\n}\n")
    digest = 0xCBF29CE484222325
    for byte in body.encode():
        digest = ((digest ^ byte) * 0x100000001B3) % 2**64
    return f'{{\n  "hash": "{digest:016x}",\n{body}\n}}\n'
