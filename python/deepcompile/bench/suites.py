# SPDX-License-Identifier: Apache-2.0
"""Which conditions a sweep runs: the seed benchmark's experiments, and ours.

A framework is written as ``key[:pass+pass][@best][/variant][~length]``: ``fsdp_c@best``,
``deepcompile:prefetch+selective_gather``, ``deepcompile/budget=20GiB``, and
``fsdp_c/overlap~1024``, which runs only where the length is 1024.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError, meant
from .arguments import check_passes
from .conditions import FRAMEWORKS, SETTINGS, Condition
from .variants import check

LLAMA_70B = "meta-llama/Meta-Llama-3-70B-Instruct"
LLAMA_8B = "meta-llama/Meta-Llama-3-8B-Instruct"
MIXTRAL = "mistralai/Mixtral-8x7B-v0.1"
LENGTHS = (512, 1024, 2048)
P, S = "prefetch", "selective_gather"
OURS = ("deepcompile:prefetch", "deepcompile:selective_gather",
        "deepcompile:prefetch+selective_gather", "deepcompile")  # fmt: skip
THEIRS = ("ds_deepcompile:prefetch", "ds_deepcompile:selective_gather",
          "ds_deepcompile:prefetch+selective_gather")  # fmt: skip
NAMED = ("fsdp_c/overlap~1024", "fsdp_c/copy_engine~1024")
"""FSDP2's variants: each is a process group of its own, and takes long to compile or a torch that
few have."""


@dataclass(frozen=True)
class Suite:
    """A product of lists, and what is the same for all of it."""

    about: str
    models: tuple[tuple[str, int], ...]
    """(model, its depth; 0: its own; below 0: at most so deep, as this machine's memory allows)."""
    frameworks: tuple[str, ...]
    batch_sizes: tuple[int, ...] = (1,)
    seq_lengths: tuple[int, ...] = LENGTHS
    accumulations: tuple[int, ...] = (1,)
    recompute: bool = True
    """Activation checkpointing, where a peer's settings are its defaults."""
    recompute_ours: bool = True
    """The same for our engine, to whose planner of memory it is a hint."""
    zero_stage: int = 3
    backend: str = "inductor"
    skip: tuple[tuple[str, int, int], ...] = ()
    """(model, batch, sequence) left out."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other values of Options than the defaults."""
    share_process: bool = False


def _table(model: str, layers: int, frameworks: tuple[str, ...] = ()) -> Suite:
    depth = f"at most {-layers} layers" if layers else "all layers"
    return Suite(
        f"FSDP2 (default, best) and ours side by side: {model}, {depth}",
        ((model, layers),),
        frameworks or ("fsdp_c", "fsdp_c@best", "deepcompile"),
        recompute_ours=False,
        options={"max_grad_norm": 0.0, "warmup_step": 14, "bench_step": 34},
        share_process=True,
    )


SUITES: dict[str, Suite] = {
    "bench": Suite(
        "the seed's run_bench.sh: two models, three batch sizes, three lengths",
        ((LLAMA_70B, 0), (MIXTRAL, 0)),
        ("zero3", "zero3_c", "zero3_c@best", "fsdp", "fsdp_c", "fsdp_c@best", *NAMED, *THEIRS,
         THEIRS[2] + "@best", *OURS),
        batch_sizes=(1, 2, 4),
        skip=((LLAMA_70B, 4, 2048),),
    ),
    "acc": Suite(
        "run_bench_acc.sh: gradients accumulated over 2, 4, 8, 16 micro-batches",
        ((LLAMA_70B, 0), (MIXTRAL, 0)),
        ("zero3", "zero3_c", "zero3_c@best", "fsdp", "fsdp_c", "fsdp_c@best", *THEIRS,
         THEIRS[2] + "@best", *OURS),
        seq_lengths=(1024,),
        accumulations=(2, 4, 8, 16),
    ),
    "offload": Suite(
        "run_bench_offload.sh: optimizer states on the host",
        ((LLAMA_70B, 0),),
        ("zero3", "zero3+offload", "fsdp+offload", "ds_deepcompile:offload_adam_states",
         "ds_deepcompile:offload_adam_states_sync", "deepcompile:offload_adam_states/budget=0.5",
         "deepcompile:offload_adam_states_sync/budget=0.5", "deepcompile/budget=0.5"),
        seq_lengths=(1024,),
    ),
    "z1": Suite(
        "run_bench_z1.sh: stage 1",
        ((LLAMA_8B, 0),),
        ("zero1", "zero1_c", "zero1_c@best", "ddp_c", "ddp_c@best", "ds_deepcompile",
         "deepcompile:zero1_compile", "deepcompile"),
        batch_sizes=(1, 2, 4),
        zero_stage=1,
    ),
    "cut": Suite(
        "FSDP2, DeepSpeed (ZeRO-3, DeepCompile) and ours, cut to this machine's memory",
        ((LLAMA_70B, -16), (MIXTRAL, -10)),
        # DeepSpeed's compile for a minute and more at each length.
        ("fsdp", "fsdp_c", "fsdp_c@best", "deepcompile:zero3_compile", *OURS, *NAMED, "zero3",
         "zero3_c", *(f"{theirs}~1024" for theirs in reversed(THEIRS)), THEIRS[2] + "@best~1024"),
        options={"max_grad_norm": 0.0, "warmup_step": 14, "bench_step": 24},
        share_process=True,
    ),
    "tiny": Suite(
        "FSDP2, DDP and ours, small enough for two CPU cores",
        (("llama-tiny", 2),),
        ("fsdp", "fsdp_c", "ddp", "deepcompile:zero3_compile", *OURS),
        batch_sizes=(2,),
        seq_lengths=(64, 128),
        recompute=False,
        options={"warmup_step": 5, "bench_step": 15},
        share_process=True,
    ),
    "w1": _table(LLAMA_70B, -16),
    "w2": _table(MIXTRAL, -10),
    "w3": _table(LLAMA_8B, 0),
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """One framework of a suite."""

    framework: str
    passes: tuple[str, ...] = ()
    settings: str = "default"
    variant: str = ""
    offload: bool = False
    length: int = 0
    """Only where a suite has this sequence length; 0: at all of them."""


def parse_spec(text: str) -> Spec:
    head, mark, length = text.partition("~")
    if mark and not (length.isdecimal() and int(length) > 0):
        raise UserError(f"[bench] framework {text!r}: ~{length} is no length; write ~1024.")
    head, _, variant = head.partition("/")
    head, _, settings = head.partition("@")
    key, _, passes = head.partition(":")
    key, _, extra = key.partition("+")
    if key not in FRAMEWORKS:
        near = meant(key, FRAMEWORKS)
        raise UserError(
            f"[bench] framework {text!r}: unknown{near or '.'} Use one of {', '.join(FRAMEWORKS)}."
        )
    if extra not in ("", "offload"):
        raise UserError(f"[bench] framework {text!r}: +{extra} is unknown; only +offload is not.")
    if settings and settings not in SETTINGS:
        raise UserError(f"[bench] framework {text!r}: @{settings} is unknown; use @best.")
    if extra and key == "deepcompile":
        raise UserError(
            f"[bench] framework {text!r}: ours moves to the host what its memory budget asks. "
            "Leave +offload out, or give /budget=."
        )
    names = check_passes([w for w in passes.split("+") if w], key)
    check(key, settings, variant, f"framework {text!r}")
    return Spec(key, names, settings or "default", variant, bool(extra), int(length or 0))


def _backend(suite: Suite, spec: Spec) -> str:
    """The suite's, but eager, as in the seed, for what Inductor does not compile of DeepSpeed's."""
    waits = "offload_adam_states_sync" in spec.passes
    return "eager" if spec.framework == "ds_deepcompile" and waits else suite.backend


@functools.lru_cache
def elements(model: str) -> tuple[int, int]:
    """Numbers of parameters: (outside of the layers, of one layer)."""
    import torch

    from .. import models
    from .weights import model_config

    def count(layers: int) -> int:
        with torch.device("meta"):
            built = models.build(model_config(model), num_layers=layers)
        return sum(p.numel() for p in built.parameters())

    one, two = count(1), count(2)
    return 2 * one - two, two - one


def fitted_depth(model: str, most: int, world: int, device_bytes: int) -> int:
    """The most layers, up to `most`, whose training state fits every rank with room to work.

    16 bytes an element (bf16 parameter, its gradient, fp32 master and two moments) over all
    ranks, and whole parameters with half as much again beside them, in 8 tenths of the memory.
    """
    rest, layer = elements(model)
    room = int(0.8 * device_bytes / (16 / world + 3))
    depth = min(most, (room - rest) // layer)
    if depth < 1:
        raise UserError(
            f"[bench] {model}: not even one layer fits {world} ranks of {device_bytes / 2**30:.0f} "
            "GiB. Use more ranks."
        )
    return depth


def here() -> str:
    """The suite that this machine can run."""
    import torch

    return "cut" if torch.cuda.is_available() else "tiny"


def depth_here(model: str, layers: int, world: int) -> int:
    """A suite's depth for this machine."""
    import torch

    if layers >= 0:
        return layers
    if not torch.cuda.is_available():
        return -layers
    memory = torch.cuda.get_device_properties(0).total_memory
    return fitted_depth(model, -layers, world, memory)


def condition_of(spec: Spec, suite: Suite, world: int, nodes: int, dtype: str,
                 **sizes: Any) -> Condition:  # fmt: skip
    key = spec.framework
    whole = key.startswith(("ddp", "single"))
    stage = 0 if whole else 3 if key.startswith("fsdp") else suite.zero_stage
    if key.startswith("zero"):
        stage = int(key[4])
    recompute = suite.recompute and (suite.recompute_ours or key != "deepcompile")
    deepspeed_offload = spec.offload and key.startswith("zero")
    return Condition(
        framework=key,
        passes=spec.passes,
        settings=spec.settings,
        variant=spec.variant,
        zero_stage=stage,
        activation_checkpointing=recompute and spec.settings == "default",
        compile=key.endswith(("_c", "deepcompile")),
        backend=_backend(suite, spec),
        offload_adam=spec.offload,
        offload_params=spec.offload and not deepspeed_offload,
        world=1 if key.startswith("single") else world,
        nodes=nodes,
        dtype=dtype,
        **sizes,
    )


def conditions(suite: Suite, world: int, nodes: int, dtype: str) -> list[Condition]:
    """All of a suite, a model after another; lengths innermost, so that neighbours share what
    was compiled."""
    found = []
    specs = [parse_spec(text) for text in suite.frameworks]
    grid = itertools.product(suite.models, suite.batch_sizes, suite.accumulations, specs)
    for (model, layers), batch, accumulation, spec in grid:
        depth = depth_here(model, layers, world)
        for length in suite.seq_lengths:
            if (model, batch, length) in suite.skip or spec.length not in (0, length):
                continue
            found.append(
                condition_of(
                    spec, suite, world, nodes, dtype, model=model, num_layers=depth,
                    batch_size=batch, accumulation=accumulation, seq_length=length,
                )
            )  # fmt: skip
    return list(dict.fromkeys(found))


def name(condition: Condition) -> str:
    """How a sweep speaks of a condition: its bar and its sizes."""
    return (
        f"{condition.model_label} {condition.label} np{condition.world} bs{condition.batch_size} "
        f"seq{condition.seq_length} acc{condition.accumulation}"
    )


def _exclusive(condition: Condition) -> bool:
    """Whether it needs a process group of its own: it changes the process, or does not give its
    memory back."""
    return condition.has_engine or bool(condition.variant)


def _budget_of_a_peer(condition: Condition) -> bool:
    return "budget=fsdp" in condition.variant


def groups(found: Sequence[Condition], share: bool) -> list[list[Condition]]:
    """Conditions by process group. Shared: those of a model that leave nothing behind, and after
    them what does: ours, one engine for all lengths and passes. What needs another's row comes
    behind it."""
    if not share:
        return [[condition] for condition in sorted(found, key=_budget_of_a_peer)]
    open_groups: dict[Any, list[Condition]] = {}
    families: dict[Any, list[Condition]] = {}
    for condition in found:
        family = dataclasses.replace(
            condition, seq_length=1, passes=() if condition.ours else condition.passes
        )
        place = (condition.model, condition.num_layers, condition.world, condition.dtype)
        if _exclusive(condition):
            families.setdefault((place, family), []).append(condition)
        else:
            open_groups.setdefault(place, []).append(condition)
    result = []
    for place, plain in open_groups.items():
        result.append(plain)
        ours = [f for f in families if f[0] == place and f[1].ours and not f[1].variant]
        if ours:
            plain += families.pop(ours[0])
    rest = sorted(families.values(), key=lambda group: _budget_of_a_peer(group[0]))
    return result + rest
