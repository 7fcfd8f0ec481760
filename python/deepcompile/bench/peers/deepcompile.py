# SPDX-License-Identifier: Apache-2.0
"""This project's engine: a stage's plain plan, named passes, or the automatic plan.

The condition's passes are a schedule, as run_bench_lm.py's are: the stage's own
pass first, and from step WARMUP on with the others. Its variant is words
separated by commas: ``budget=20GiB`` (or a fraction of the device's memory), and
``name=TEXT``, which only tells rows apart.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deepcompile

from ...schedule import STAGE_PASS, WARMUP
from ..conditions import Condition
from ..options import BETAS, DECAY, EPS, merge
from ..profiling import experiment
from . import Setup
from .with_engine import EnginePeer

STAGE_PASSES = set(STAGE_PASS.values())


def schedule(condition: Condition, first: int = 0) -> list[tuple[int, list[str]]]:
    """[(step, passes)] from step `first` on."""
    stage = STAGE_PASS[condition.zero_stage]
    others = [name for name in condition.passes if name not in STAGE_PASSES]
    if condition.passes and not others:
        planned = [(first, [stage])]
    elif not others or "auto" in others:
        planned = [(first, [stage]), (first + WARMUP, ["auto"])]
    else:
        planned = [(first, [stage]), (first + WARMUP, [stage, *others])]
    return planned if first == 0 else [(0, [stage]), *planned]


def budget_of(condition: Condition) -> str | float | None:
    """What the variant says of memory, as the configuration takes it."""
    for word in condition.variant.split(","):
        if word.startswith("budget="):
            text = word.removeprefix("budget=")
            try:
                return float(text)
            except ValueError:
                return text
    return None


def configuration(setup: Setup) -> dict[str, Any]:
    """The engine's configuration for a condition."""
    condition, options = setup.condition, setup.options
    compiled: dict[str, Any] = {
        "loss_only": True,
        "timeout_s": options.timeout,
    }
    budget = budget_of(condition)
    if budget is not None:
        compiled["memory_budget"] = budget
    plans_memory = not condition.passes or "auto" in condition.passes
    if condition.activation_checkpointing and not plans_memory:
        # As the peers do: without a planner of memory, what is marked is recomputed.
        compiled["checkpoint_marks"] = "obey"
    config = {
        "train_micro_batch_size_per_gpu": condition.batch_size,
        "gradient_accumulation_steps": condition.accumulation,
        "gradient_clipping": options.max_grad_norm,
        "bf16": {"enabled": setup.dtype == torch.bfloat16},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": options.learning_rate,
                "betas": list(BETAS),
                "eps": EPS,
                "weight_decay": DECAY,
            },
        },
        "zero_optimization": {"stage": condition.zero_stage},
        "compile": compiled,
    }
    return merge(config, options.engine)


class DeepCompile(EnginePeer):
    def __init__(self, setup: Setup):
        self._setup = setup
        self._config = configuration(setup)
        model: nn.Module = setup.build()
        self._filler = model._init_weights
        self.engine, _, _, _ = deepcompile.initialize(
            model=model, config=self._config, device=setup.ranks.device
        )
        self._schedule = schedule(setup.condition)
        if setup.condition.compile:
            self.engine.compile(
                backend=setup.condition.backend,
                compile_kwargs={"dynamic": False},
                schedule=self._schedule,
            )

    def settings(self) -> dict[str, Any]:
        return {
            "schedule": [[step, list(names)] for step, names in self._schedule],
            "config": self._config,
            "communication_data_type": self.engine.config.reduce_dtype,
            "gathers": self.engine.runtime.gathers,
            "reductions": self.engine.runtime.reductions,
            "kernels": self.engine.runtime.kernels(),
            "masters": "f32",
        }

    def after(self) -> dict[str, Any]:
        """The plan that was measured, and what it was to cost."""
        if not self.engine.is_compiled:
            return {}
        if self._setup.options.profile:
            self._write_report()
        report, agreed = self.engine.compile_report(), self.engine.planner.agreed
        kept = ("plan_passes", "plans", "plan_seconds", "recompilations", "budget",
                "memory_relieved", "budgets_lowered", "plan_failures", "graph_breaks",
                "regions", "distinct_regions", "cache", "cuda_graphs")  # fmt: skip
        facts = {key: report.get(key) for key in kept}
        buffers = self.engine.runtime.buffer_report()
        facts["host_buffers"] = {k: v for k, v in buffers.items() if k.startswith("host")}
        facts["plan_pending"] = bool(self.engine.planner.pending)
        if agreed is not None:
            facts["predicted_seconds"] = (agreed.predicted_ns or 0) / 1e9
            facts["predicted_peak_bytes"] = agreed.predicted_peak
            facts["chosen"] = [t for _, what, t in agreed.reasons if not what][:3]
        return facts

    def _write_report(self) -> None:
        """The plan, and the traced step beside its simulation."""
        condition, options = self._setup.condition, self._setup.options
        folder = Path(options.profile_dir) / experiment(condition)
        self.engine.report(folder / "report.html")
        self.engine.write_trace(folder / "step.json")

    def outside_bytes(self) -> int:
        return self.engine.runtime.outside_bytes()

    def recorded_peak(self) -> int:
        return self.engine.runtime.replays()["peak_bytes"]

    def compile_times(self) -> list[tuple[str, float]]:
        return sorted(self.engine.compile_report()["stages"].items())

    def go_on(self, condition: Condition) -> bool:
        """A new schedule: the stage's plan, then what is planned for the new shape. What was
        compiled stays."""
        given = dataclasses.replace(self._setup, condition=condition)
        if configuration(given) != self._config:
            return False
        self._setup = given
        if self.engine.is_compiled:
            now = self.engine.global_steps
            self._schedule = schedule(condition, now)
            self.engine.planner.set_schedule(self._schedule, now)
        return True

    @torch.no_grad()
    def restart(self) -> bool:
        """As load_checkpoint does, but for the number of the step, by which the plan goes."""
        engine, done = self.engine, True
        engine.planner.settle()
        try:
            self._fill_pieces()
        except torch.OutOfMemoryError:
            done = False  # here; other ranks may have room, and what follows is collective
        engine.runtime.masters_changed()
        engine.runtime.set_step(0)
        engine.zero_grad()
        return done

    def _fill_pieces(self) -> None:
        """The first values into this rank's shards, and zeros into its states."""
        engine, device = self.engine, self._setup.ranks.device
        members = {m.name: m for m in map(engine.table.member, engine.table.refs())}
        name, whole = "", torch.empty(0)
        for piece in sorted(engine.runtime.pieces(), key=lambda p: p["member"]):
            if piece["member"] != name:
                name, whole = piece["member"], torch.empty(0)  # one parameter in memory at a time
                whole = self._filler.values(name, tuple(members[name].shape), device).view(-1)
            values = piece["weight"] if piece["master"] is None else piece["master"]
            values.view(-1).copy_(whole[piece["start"] : piece["start"] + values.numel()])
            for moment in (piece["exp_avg"], piece["exp_avg_sq"]):
                if moment is not None:
                    moment.zero_()


def setup(given: Setup) -> DeepCompile:
    return DeepCompile(given)
