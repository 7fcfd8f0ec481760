# SPDX-License-Identifier: Apache-2.0
"""One rank that trains conditions and measures them.

    torchrun --nproc-per-node 4 -m deepcompile.bench.worker --framework fsdp --compile ...
    torchrun --nproc-per-node 4 -m deepcompile.bench.worker --job JSON

A step's time is from a barrier, with all devices idle, to when this rank's
device is idle again. Batches are on the device before. Every rank's times are
gathered; a step counts as long as its slowest rank took. Conditions of one job
share the process group; neighbours that differ in sequence length alone (ours:
or in passes) share the model too, where the peer can.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import budget
from ..distributed import Ranks, device_of_rank, join
from ..errors import UserError, fail
from . import measure, peers, results, weights
from .arguments import parse_lm
from .batches import named_text, training_batches
from .conditions import Condition
from .flops import condition_flops
from .lines import BEGIN, ERROR_MARK, STEP_MARK
from .options import Options
from .profiling import Tracer
from .result_line import to_line
from .results import Results, Row

FIRST_WEIGHTS = "the first weights"
TRAINED_ON = "the weights that the condition before left, so losses do not compare"


@dataclass
class Run:
    """What the steps of one condition gave, on this rank."""

    times: list[float] = field(default_factory=list)
    """Seconds of each step, warm-up included."""
    host_times: list[float] = field(default_factory=list)
    """Of them, until the host had given the device all of its work: as long as the step, where the
    device waits for the host, or the host for room in the device's queue."""
    losses: list[torch.Tensor] = field(default_factory=list)
    warm_peak: int = 0
    retries: int = 0
    """Of the allocator, in the steps after the warm-up."""


def say(ranks: Ranks, text: str) -> None:
    if ranks.rank == 0:
        print(text, flush=True)


def on_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def count_steps(options: Options, per_epoch: int, accumulation: int) -> int:
    """Optimizer steps: as many as asked, if the epochs have them."""
    there = options.num_epochs * per_epoch // accumulation
    if there <= options.warmup_step:
        raise UserError(
            f"[bench] num_epochs {options.num_epochs}: {there} steps of data, and the warm-up "
            f"alone takes {options.warmup_step}. Raise it."
        )
    return min(options.bench_step, there)


def run_steps(
    peer: peers.Peer, condition: Condition, options: Options, ranks: Ranks, batches: Any
) -> Run:
    """Train; what is not in a step is not measured."""
    meter, run = measure.Meter(ranks, peer.outside_bytes, peer.recorded_peak), Run()
    steps = count_steps(options, batches.batches_per_epoch, condition.accumulation)
    before = 0
    meter.reset_peak()
    with Tracer(condition, options, ranks) as tracer:
        for number in range(steps):
            if number == options.warmup_step:
                run.warm_peak = meter.peak()
                meter.reset_peak()
                before = meter.retries()
            micro = [on_device(next(batches), ranks.device) for _ in range(condition.accumulation)]
            tracer.before(number)
            meter.begin()
            loss = peer.step(micro)
            run.host_times.append(meter.elapsed())
            run.times.append(meter.end())
            tracer.after(number)
            run.losses.append(loss)
            if ranks.rank == 0 and (number + 1) % options.print_interval == 0:
                epoch = number * condition.accumulation // batches.batches_per_epoch + 1
                print(
                    f"Epoch {epoch}, {STEP_MARK}{number + 1}, Loss: {loss.item():.6f} sync: True "
                    f"time: {run.times[-1]:.4f} alloc_mem: {meter.allocated()} "
                    f"peak_mem: {meter.peak()}",
                    flush=True,
                )
    run.retries = meter.retries() - before
    return run


def steps_in_a_row(
    peer: peers.Peer, steps: Sequence[list[dict[str, torch.Tensor]]], meter: measure.Meter
) -> float:
    """Seconds of each of `steps` (its micro-batches, on the device) on this rank, where the host
    goes on to the next as soon as it has given the device all of one's work."""
    meter.begin()
    for micro in steps:
        peer.step(micro)
    return meter.end() / len(steps)


def _in_a_row(
    peer: peers.Peer, condition: Condition, options: Options, ranks: Ranks, batches: Any
) -> float | None:
    """The slowest rank's; collective."""
    meter = measure.Meter(ranks, peer.outside_bytes, peer.recorded_peak)
    if not (meter.on_gpu and options.in_a_row):
        return None
    steps = [
        [on_device(next(batches), ranks.device) for _ in range(condition.accumulation)]
        for _ in range(options.in_a_row)
    ]
    return max(ranks.gather(steps_in_a_row(peer, steps, meter)))


def _compile_seconds(peer: peers.Peer, condition: Condition, run: Run, options: Options,
                     before: float) -> float:  # fmt: skip
    """As the framework counts it; else what the warm-up took beyond its number of steps."""
    if not condition.compile:
        return 0.0
    counted = peer.compile_times()
    if counted is not None:
        return max(0.0, sum(seconds for _, seconds in counted) - before)
    usual = statistics.median(run.times[options.warmup_step :])
    return sum(max(0.0, t - usual) for t in run.times[: options.warmup_step])


def _row(
    peer: peers.Peer, condition: Condition, options: Options, ranks: Ranks, run: Run, facts: dict
) -> Row:
    """Every rank's numbers in one row; collective."""
    meter = measure.Meter(ranks, peer.outside_bytes, peer.recorded_peak)
    memory = ranks.gather(
        (meter.allocated(), meter.peak(), run.warm_peak, meter.in_use(), measure.host_peak())
    )
    total, available = budget.host_memory()
    host = ranks.gather(statistics.median(run.host_times[options.warmup_step :]))
    losses = torch.stack([loss.float() for loss in run.losses]).cpu()
    after = peer.after()
    say(ranks, f"[bench] {condition.label} in force, as the steps showed: "
        f"{json.dumps(after, default=str)}")  # fmt: skip
    every = torch.tensor(ranks.gather(losses.tolist()))
    effective = {
        **facts,
        **after,
        "attention": options.attn_impl,
        "bench_step": len(run.times),
        "warmup_step": options.warmup_step,
        "first_step_seconds": run.times[0],
        "host_seconds_of_ranks": host,
        "alloc_bytes_of_ranks": [m[0] for m in memory],
        "peak_bytes_of_ranks": [m[1] for m in memory],
        "warmup_peak_bytes": max(m[2] for m in memory),
        "device_bytes_of_ranks": [m[3] for m in memory],
        "host_peak_bytes_of_ranks": [m[4] for m in memory],
        "host_bytes_in_use": total - available,
        "outside_bytes": peer.outside_bytes(),
        "allocator": measure.allocator(),
        "alloc_retries_of_ranks": ranks.gather(run.retries),
        "memory_is": "the allocator's" if meter.on_gpu else "the process's",
    }
    return Row.measured(
        condition,
        ranks.gather(run.times[options.warmup_step :]),
        alloc_bytes=max(m[0] for m in memory),
        peak_bytes=max(m[1] for m in memory),
        losses=every.mean(dim=0).tolist(),
        versions=measure.versions(),
        commit=measure.commit(),
        machine=measure.machine(condition),
        effective=effective,
        options=options.recorded(condition),
        model_flops=_flops(condition),
    )


def _flops(condition: Condition) -> float | None:
    """None for a model type whose operations are not known; a chart of them then says so."""
    try:
        return float(condition_flops(condition))
    except UserError:
        return None


def train(
    peer: peers.Peer, condition: Condition, options: Options, ranks: Ranks, begun: float,
    starts_from: str = FIRST_WEIGHTS,
) -> Row:  # fmt: skip
    """All steps of one condition on a ready peer. `begun`: when its set-up began."""
    vocabulary = int(getattr(weights.model_config(condition.model), "vocab_size", 256))
    text = named_text(options.dataset_name, options.dataset_problem, ranks)
    batches = training_batches(
        text, vocabulary, condition.batch_size, condition.seq_length, condition.seed, ranks
    )
    facts = {**peer.settings(), "starts_from": starts_from, **text.facts(),
             "setup_seconds": time.perf_counter() - begun}  # fmt: skip
    say(ranks, f"[bench] {condition.label} in force: {json.dumps(facts, default=str)}")
    before = sum(s for _, s in peer.compile_times() or ()) if condition.compile else 0.0
    run = run_steps(peer, condition, options, ranks, batches)
    in_a_row = _in_a_row(peer, condition, options, ranks, batches)
    row = _row(peer, condition, options, ranks, run, facts)
    row.in_a_row = in_a_row
    row.compile_seconds = _compile_seconds(peer, condition, run, options, before)
    if options.eval:  # last: it compiles, and leaves parameters whole, which is none of the steps'
        loss = peer.evaluate(on_device(next(batches), ranks.device))
        row.effective["eval_loss"] = statistics.fmean(ranks.gather(float(loss)))
    return row


def with_budget(condition: Condition, options: Options) -> Condition:
    """``budget=fsdp_c``: as much memory as that framework's default used in the same job."""
    words, folder = condition.variant.split(","), options.results
    for word in words:
        framework = word.removeprefix("budget=")
        if word == framework or framework not in ("fsdp", "fsdp_c"):
            continue
        rows = Results.load(folder) if Path(folder).is_dir() else Results()
        fits = [
            r
            for r in rows.where(
                model=condition.model, framework=framework, num_layers=condition.num_layers,
                batch_size=condition.batch_size, seq_length=condition.seq_length,
                accumulation=condition.accumulation, world=condition.world,
                settings="default", variant="", offload_adam=False, dtype=condition.dtype,
            )
            if r.ok and not r.predicted and r.peak_bytes
            and not options.differences(r.options, r.condition)
        ]  # fmt: skip
        if not fits:
            raise UserError(
                f"[bench] budget={framework}: no row of {framework} to take the peak of. Run it "
                "before."
            )
        exact = [f"budget={fits[-1].peak_bytes}" if w == word else w for w in words]
        return dataclasses.replace(condition, variant=",".join(exact))
    return condition


def same_model(a: Condition, b: Condition) -> bool:
    """Whether they differ in the length of sequences alone; ours also in passes."""
    passes = b.passes if a.ours else a.passes
    return dataclasses.replace(a, seq_length=b.seq_length, passes=passes) == b


def free(ranks: Ranks) -> None:
    """What a closed peer left."""
    torch._dynamo.reset()
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated(ranks.device) / 2**20
        say(ranks, f"[bench] {left:,.0f} MiB stay allocated after the last framework")


def run_conditions(conditions: Sequence[Condition], options: Options, ranks: Ranks) -> list[Row]:
    """Train one after another; rank 0 writes each row when it is there. Collective."""
    rows: list[Row] = []
    peer, last = None, None
    compiled: set[str] = set()
    """Frameworks that ran in this process: what they compiled serves their next condition too, out
    of the compiler's cache if not as it is."""
    for condition in conditions:
        if condition.world != ranks.world:
            raise UserError(
                f"[bench] {condition.label}: is for {condition.world} ranks, and there are "
                f"{ranks.world}. Start as many."
            )
        say(ranks, f"{BEGIN}{json.dumps(condition.as_dict())}")
        begun = time.perf_counter()
        planned = ranks.together("[bench]", lambda c=condition: with_budget(c, options))
        starts_from, goes_on = FIRST_WEIGHTS, False
        if peer is not None and same_model(last, planned) and peer.go_on(planned):
            goes_on = True
            starts_from = _restart(peer, planned, ranks)
        else:
            if peer is not None:
                peer.close()
                peer = None
                free(ranks)
            _save_weights(planned, options, ranks)
            torch.manual_seed(planned.seed)
            peer = peers.setup(planned, options, ranks)
        row = train(peer, planned, options, ranks, begun, starts_from)
        row.compile_reused = planned.compile and (goes_on or planned.framework in compiled)
        row.condition, last = condition, planned
        compiled.add(planned.framework)
        rows.append(row)
        _write(row, peer, options, ranks)
    if peer is not None:
        peer.close()
    return rows


def _restart(peer: peers.Peer, condition: Condition, ranks: Ranks) -> str:
    """What a peer that goes on begins with; collective."""
    torch.manual_seed(condition.seed)
    try:
        done = peer.restart()
    except torch.OutOfMemoryError:  # a whole parameter beside what the peer holds
        done = False
    return FIRST_WEIGHTS if all(ranks.gather(done)) else TRAINED_ON


def _save_weights(condition: Condition, options: Options, ranks: Ranks) -> None:
    if not options.save_weights:
        return

    def work() -> None:
        if ranks.rank == 0:
            given = peers.Setup(condition, dataclasses.replace(options, load_weights=False), ranks)
            path = weights.save(given.build(), weights.folder_of(condition), ranks.device)
            print(f"[bench] wrote {path}", flush=True)

    ranks.together("[bench]", work)


def _write(row: Row, peer: peers.Peer, options: Options, ranks: Ranks) -> None:
    def work() -> None:
        if ranks.rank:
            return
        results.append(options.results, row)
        line = to_line(row)
        print(line, flush=True)
        if row.condition.compile:
            stamp = datetime.now(timezone.utc).strftime("%Y%m%d%H%M%S")
            with open(Path(options.results) / "compile_time.txt", "a", encoding="utf-8") as file:
                times = peer.compile_times() or []
                file.write(f"{stamp} {row.condition.label} {row.compile_seconds} {times}\n")

    ranks.together("[bench]", work)


def prepare(options: Options, conditions: Sequence[Condition]) -> None:
    """What must be set before the process group starts."""
    from .peers import fsdp2

    for condition in conditions:
        os.environ.update(fsdp2.environment(condition))
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        import torch._inductor.config as inductor

        inductor.fallback_random = True


def start_group(conditions: Sequence[Condition], options: Options) -> None:
    """A process group of more than the device's own backend, where FSDP2 needs one."""
    import datetime

    import torch.distributed as dist

    from .peers import fsdp2

    wanted = [fsdp2.backend(c) for c in conditions if c.framework.startswith("fsdp")]
    if any(wanted) and "RANK" in os.environ:
        device = device_of_rank()
        dist.init_process_group(
            next(w for w in wanted if w),
            timeout=datetime.timedelta(seconds=options.timeout),
            device_id=device,
        )


def parse(argv: Sequence[str]) -> tuple[list[Condition], Options]:
    if argv[:1] == ["--job"]:
        try:
            job = json.loads(argv[1])
            conditions = [Condition.from_dict(c) for c in job["conditions"]]
            return conditions, Options.from_dict(job["options"])
        except (IndexError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"[bench] --job: {error}. Give what the sweep writes.") from None
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    condition, options = parse_lm(argv, world, max(1, world // max(1, local)))
    peers.check_warmup(condition, options)
    return [condition], options


def report_failure(error: BaseException) -> None:
    """One line that the sweep finds, whatever else the ranks print."""
    traceback.print_exc()
    text = " ".join(str(error).split())[:2000] or type(error).__name__
    if isinstance(error, MemoryError):
        text = f"out of memory on the host: {text}"
    line = {"rank": int(os.environ.get("RANK", "0")), "type": type(error).__name__,
            "error": text, "time": time.time()}  # fmt: skip
    sys.stderr.flush()
    os.write(1, f"\n{ERROR_MARK}{json.dumps(line)}\n".encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a job on this rank. Ends the process: what frameworks do when they are torn down is
    not measured, and may hang."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        conditions, options = parse(given)
        _die_with_parent()
        prepare(options, conditions)
        start_group(conditions, options)
        ranks = join(None, options.timeout)
        run_conditions(conditions, options, ranks)
        ranks.barrier()
        code = 0
    except SystemExit:
        raise
    except BaseException as error:
        if isinstance(error, UserError) and "RANK" not in os.environ:
            code = fail(error)  # nothing reads the marks of one that was not launched
        else:
            report_failure(error)
            code = 2 if isinstance(error, UserError) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_with_parent() -> None:
    """Linux: when torchrun is killed, its ranks are too."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    import ctypes
    import signal

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    main()
