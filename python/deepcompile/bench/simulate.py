# SPDX-License-Identifier: Apache-2.0
"""The sweep by simulation: rows as a real sweep writes them, marked as predicted.

A model is captured without weights once for each batch size and length (twice
where our planner may choose what is recomputed), and every plan is simulated on
it. Peers are schedules of the same compiled regions (peer_schedules.py).
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from .. import _core
from ..errors import UserError
from ..predict import StepOptions, capture_step, default_budget, named_plans, predict
from .conditions import Condition, local_model
from .results import Row


@dataclass(frozen=True)
class SimulatedSweep:
    """A product of lists on one machine."""

    machine: str
    """A built-in name, or a file."""
    models: tuple[str, ...] = ("llama-3-70b", "mixtral-8x7b")
    batch_sizes: tuple[int, ...] = (1, 2, 4)
    seq_lengths: tuple[int, ...] = (512, 1024, 2048)
    accumulations: tuple[int, ...] = (1,)
    num_layers: int = 0
    dtype: str = "bf16"
    checkpointing: bool = True
    """Peers and named passes compute each layer's forward again, as in the seed; auto chooses."""
    clip: bool = True
    persistence_threshold: int | None = None
    """Elements below which parameters are packed and stay whole; default: the engine's."""
    memory_budget: int | None = None
    """Bytes of a rank; default: the machine's less the engine's reserve."""

    def jobs(self) -> list[Job]:
        grid = itertools.product(self.models, self.batch_sizes, self.seq_lengths)
        return [Job(self, model, batch, seq) for model, batch, seq in grid]


@dataclass(frozen=True)
class Job:
    """What shares a capture."""

    sweep: SimulatedSweep
    model: str
    batch: int
    seq: int

    @property
    def name(self) -> str:
        return f"{self.model} batch {self.batch} sequence {self.seq}"


@dataclass(frozen=True)
class Plan:
    """One bar: a framework, and the passes that stand for it."""

    framework: str
    passes: tuple[Any, ...]
    named: tuple[str, ...] = ()
    """The condition's passes."""
    model_of: str = ""
    """How a peer is modelled."""


def plans() -> list[Plan]:
    """What is compared under activation checkpointing as the model marks it."""
    from .peer_schedules import FsdpSchedule, Zero3Schedule

    found = [
        Plan("zero3", (Zero3Schedule(),), (), "ZeRO-3's transfers, our compiled regions"),
        Plan("fsdp_c", (FsdpSchedule(),), (), "FSDP2's transfers, our compiled regions"),
    ]
    for name, passes in named_plans(3):
        if name in ("P", "S", "P+S"):
            found.append(Plan("deepcompile", tuple(passes), tuple(passes[1:])))
    return found


AUTO = Plan("deepcompile", ("auto",))


def read_machine(name: str) -> _core.Machine:
    from ..cli.files import read_machine

    return read_machine(name)


def run_job(job: Job) -> list[Row]:
    """All plans of one capture, for each accumulation."""
    sweep, machine = job.sweep, read_machine(job.sweep.machine)
    obeyed = capture(job, machine, "obey")
    chosen = capture(job, machine, "hint") if sweep.checkpointing else obeyed
    rows = []
    for accumulation in sweep.accumulations:
        each = [(plan, simulate(job, machine, obeyed, plan, accumulation)) for plan in plans()]
        rows += [to_row(job, machine, plan, accumulation, "obey", found) for plan, found in each]
        hint = simulate(job, machine, chosen, AUTO, accumulation)
        rows.append(to_row(job, machine, AUTO, accumulation, "hint", hint))
        if sweep.checkpointing:
            obey = simulate(job, machine, obeyed, AUTO, accumulation)
            best = min([("hint", hint), ("obey", obey)], key=lambda pair: _order(pair[1]))
            rows.append(to_row(job, machine, AUTO, accumulation, *best, settings="best"))
    return rows


def _order(found: dict[str, Any]) -> float:
    return found["step_ns"] if found["fits"] else float("inf")


def capture(job: Job, machine: _core.Machine, marks: str) -> _core.StepProgram:
    options = StepOptions(
        model=local_model(job.model),
        batch=job.batch,
        dtype=job.sweep.dtype,
        clip=job.sweep.clip,
        persistence_threshold=job.sweep.persistence_threshold,
        layers=job.sweep.num_layers or None,
        checkpointing=job.sweep.checkpointing,
        checkpoint_marks=marks,
    )
    return capture_step(options, job.seq, machine.ranks, machine)[0]


def simulate(
    job: Job, machine: _core.Machine, captured: _core.StepProgram, plan: Plan, accumulation: int
) -> dict[str, Any]:
    program = captured.copy()
    if plan.framework != AUTO.framework:
        program.forget_rows()  # the peers have no such thing
    program.accumulation = accumulation
    tokens = job.batch * job.seq * accumulation
    budget = job.sweep.memory_budget or default_budget(machine)
    return predict(program, plan.passes, machine, tokens, budget)


@functools.cache
def provenance() -> dict[str, Any]:
    """What made the rows of this process."""
    from .measure import commit, versions

    return {"versions": versions(), "commit": commit()}


def to_row(
    job: Job,
    machine: _core.Machine,
    plan: Plan,
    accumulation: int,
    marks: str,
    found: dict[str, Any],
    settings: str = "default",
) -> Row:
    sweep = job.sweep
    budget = sweep.memory_budget or default_budget(machine)
    condition = Condition(
        model=job.model,
        framework=plan.framework,
        passes=plan.named,
        settings=settings,
        num_layers=sweep.num_layers,
        batch_size=job.batch,
        seq_length=job.seq,
        accumulation=accumulation,
        activation_checkpointing=sweep.checkpointing,
        compile=plan.framework != "zero3",
        world=machine.ranks,
        nodes=machine.nodes,
        dtype=sweep.dtype,
    )
    facts = circumstances(job, machine, plan, marks, found["hash"])
    if not found["fits"]:
        size = _core.pretty_bytes
        why = found["note"] or (
            f"{size(found['peak_bytes'])} of {size(budget)}, {_core.pretty_nanos(found['step_ns'])}"
        )
        return Row.failed(condition, f"does not fit: {why}", **facts)
    seconds = found["step_ns"] / 1e9
    return Row(
        condition,
        median=seconds,
        mean=seconds,
        fastest=seconds,
        slowest=seconds,
        alloc_bytes=found["resident_bytes"],
        peak_bytes=found["peak_bytes"],
        tokens_per_second_per_gpu=condition.tokens / seconds,
        model_flops=known_flops(condition),
        **facts,
    )


def known_flops(condition: Condition) -> float | None:
    """None for a model type whose operations are not known; a chart of them then says so."""
    from .flops import condition_flops

    try:
        return condition_flops(condition)
    except UserError:
        return None


def circumstances(
    job: Job, machine: _core.Machine, plan: Plan, marks: str, plan_hash: str | None
) -> dict[str, Any]:
    """What a row says of where its numbers come from."""
    sweep = job.sweep
    return {
        **provenance(),
        "predicted": True,
        "machine": {
            "name": machine.name,
            "device": machine.device_name,
            "nodes": machine.nodes,
            "ranks_per_node": machine.ranks_per_node,
        },
        "effective": {
            "passes": [p if isinstance(p, str) else type(p).__name__ for p in plan.passes],
            "modelled": plan.model_of or "our own plan",
            "checkpoint_marks": marks if sweep.checkpointing else "none",
            "clip": sweep.clip,
            "memory_budget": sweep.memory_budget or default_budget(machine),
            "plan": plan_hash,
        },
    }


def check(sweep: SimulatedSweep) -> None:
    """Raises UserError for a machine or a model that is not there."""
    from ..models import config_path

    read_machine(sweep.machine)
    for model in sweep.models:
        config_path(local_model(model))


def at_a_time(jobs: Sequence[Job]) -> int:
    """How many of them run side by side."""
    forks = "fork" in multiprocessing.get_all_start_methods()
    return max(1, min(len(jobs), os.cpu_count() or 1)) if forks else 1


def run(sweep: SimulatedSweep, finished: Callable[[Job, list[Row], float], None]) -> float:
    """Simulates all, jobs side by side where the system can fork; returns the seconds it took.
    ``finished`` gets each job's rows, and the seconds that it took, as soon as they are there."""
    check(sweep)  # before the work
    start = time.monotonic()
    for job, rows, seconds in _results(sweep.jobs()):
        finished(job, rows, seconds)
    return time.monotonic() - start


def _results(jobs: list[Job]) -> Iterator[tuple[Job, list[Row], float]]:
    from ..capture import meta  # noqa: F401  starts torch, once for all

    workers = at_a_time(jobs)
    if workers < 2:
        for job in jobs:
            begun = time.monotonic()
            yield job, run_job(job), time.monotonic() - begun
        return
    # Now: autograd, which a capture uses, does not survive a later fork.
    context = multiprocessing.get_context("fork")
    # A worker that took an interruption for its job's result would go on with the next.
    ends = (signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(workers, context, signal.signal, ends) as pool:
        waiting = {pool.submit(in_worker, job): job for job in jobs}
        try:
            for done in as_completed(waiting):
                result = done.result()
                if isinstance(result, UserError):
                    raise result
                if isinstance(result, str):
                    raise RuntimeError(result)
                seconds, rows = result
                yield waiting[done], [Row.from_json(text) for text in rows], seconds
        except BrokenProcessPool:
            raise UserError(
                "[bench] a process that simulates was ended, by the system perhaps, for want of "
                "memory. Ask for fewer sizes at once."
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def in_worker(job: Job) -> tuple[float, list[str]] | UserError | str:
    """run_job and its seconds, with rows and errors in a form that another process can take."""
    begun = time.monotonic()
    try:
        rows = [row.to_json() for row in run_job(job)]
        return time.monotonic() - begun, rows
    except UserError as error:
        return error
    except Exception:
        return traceback.format_exc()
