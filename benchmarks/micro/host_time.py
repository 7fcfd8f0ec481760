# SPDX-License-Identifier: Apache-2.0
"""Where does the host's time go in a step?  Train a deep but tiny Llama on the CPU.

The model has the layers of a real one and matrices of a few hundred elements, so what is left is
the host's own work: the engine, torch.compile's wrappers and autograd, the C++ executor, and the
regions. With `--regions null` every region hands out tensors made before, so that the executor
stands alone. "place" rows are exclusive: what a place called is not in it.

    python benchmarks/micro/host_time.py --layers 32 --regions real,null --json host.json
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import io
import json
import os
import platform
import pstats
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

PLACES = {
    "engine": "Python: engine.forward, backward and step, without what they call",
    "compiled": "Dynamo's guards, AOTAutograd's wrappers, autograd",
    "runner": "Python between AOTAutograd and the runtime",
    "executor": "C++: sections and the update, without regions",
    "optimizer": "Python: the optimizer's step, without the runtime's",
    "end of step": "Python: schedule, relief, report",
    "regions": "region code: Inductor's wrappers and kernels, or nothing",
}


class Clocks:
    """Exclusive time by place, in ns: entering a place stops the clock of the one around it.

    `thread`: CPU time of the thread, which other processes do not disturb as much.
    """

    def __init__(self, thread: bool):
        self._now = time.thread_time_ns if thread else time.perf_counter_ns
        self._stack: list[str] = []
        self._since = 0
        self.spent: dict[str, int] = defaultdict(int)
        self.calls: dict[str, int] = defaultdict(int)

    def _switch(self) -> None:
        now = self._now()
        if self._stack:
            self.spent[self._stack[-1]] += now - self._since
        self._since = now

    def wrap(self, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._stack.append(place)
            self.calls[place] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._stack.pop()

        timed._boxed_call = True
        return timed

    def take(self) -> dict[str, int]:
        spent, self.spent = dict(self.spent), defaultdict(int)
        self.calls = defaultdict(int)
        return spent


class TimedRuntime:
    """The engine's runtime with clocks around the calls of a step."""

    TIMED = ("run", "step", "new_call")

    def __init__(self, runtime: Any, clocks: Clocks):
        self._runtime = runtime
        for name in self.TIMED:
            setattr(self, name, clocks.wrap("executor", getattr(runtime, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)


def make_engine(args: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import deepcompile

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        use_cache=False,
    )
    compile_settings: dict[str, Any] = {"memory_budget": "8GiB"}
    if args.plan == "stage":
        compile_settings["schedule"] = [[0, ["zero3_compile"]]]
    compile_settings |= json.loads(args.compile)
    engine, _, _, _ = deepcompile.initialize(
        model=LlamaForCausalLM(config),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "gradient_clipping": 1.0 if args.clip else 0.0,
            "bf16": {"enabled": args.bf16},
            # A tiny model's matrices are below the default threshold: shard them all the same.
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": args.hidden + 1,
            },
            "compile": compile_settings,
        },
    )
    engine.compile(backend=args.backend, compile_kwargs={"options": json.loads(args.inductor)})
    return engine, torch.randint(0, 64, (1, args.seq))


def train_step(engine: Any, ids: Any) -> None:
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def replace_codes(engine: Any, replacement: Callable[[int, Any], Any]) -> None:
    """Load the plans that hold again, with other code in their regions."""
    planner = engine.planner
    for codes in {id(g.captured.codes): g.captured.codes for g in planner.graphs}.values():
        codes[:] = [replacement(i, code) for i, code in enumerate(codes)]
    planner._load_all(planner.update_program)


def null_regions(engine: Any, ids: Any) -> None:
    """Let every region hand out what it made in one step."""
    made: dict[int, Any] = {}

    def recording(index: int, code: Any) -> Callable[[list], Any]:
        def run(inputs: list) -> Any:
            made[index] = code(inputs)
            return made[index]

        return run

    def null(index: int, _code: Any) -> Callable[[list], Any]:
        outputs = made[index]

        def run(inputs: list) -> Any:
            inputs.clear()
            return outputs

        return run

    replace_codes(engine, recording)
    train_step(engine, ids)
    replace_codes(engine, null)


def put_clocks(engine: Any, clocks: Clocks) -> None:
    """Clocks around everything that a step calls."""
    replace_codes(engine, lambda _i, code: clocks.wrap("regions", code))
    timed = TimedRuntime(engine.runtime, clocks)
    for runner in engine.planner._runners:
        runner._runtime = timed
        for name in ("forward", "backward"):
            setattr(runner, name, clocks.wrap("runner", getattr(runner, name)))
    engine._compiled = clocks.wrap("compiled", engine._compiled)
    optimizer = engine.optimizer
    optimizer._update = clocks.wrap("executor", optimizer._update)
    optimizer.step = clocks.wrap("optimizer", optimizer.step)
    engine._end_step = clocks.wrap("end of step", engine._end_step)
    for name in ("forward", "backward", "step"):
        setattr(engine, name, clocks.wrap("engine", getattr(engine, name)))
    inner = engine.backward

    def backward(loss: Any) -> Any:
        tensor_backward = type(loss).backward
        type(loss).backward = clocks.wrap("compiled", tensor_backward)
        try:
            return inner(loss)
        finally:
            type(loss).backward = tensor_backward

    engine.backward = backward


def plain_times(engine: Any, ids: Any, steps: int) -> dict[str, list[float]]:
    """ms of each step and of its three parts, without clocks inside."""
    times: dict[str, list[float]] = {"forward": [], "backward": [], "step": [], "all": []}
    cpu = []
    for _ in range(steps):
        thread = time.thread_time_ns()
        start = time.perf_counter_ns()
        loss = engine(input_ids=ids, labels=ids).loss
        forward = time.perf_counter_ns()
        engine.backward(loss)
        backward = time.perf_counter_ns()
        engine.step()
        end = time.perf_counter_ns()
        cpu.append((time.thread_time_ns() - thread) / 1e6)
        parts = (forward - start, backward - forward, end - backward, end - start)
        for key, value in zip(times, parts, strict=True):
            times[key].append(value / 1e6)
    return times | {"cpu": cpu}


def instruction_times(engine: Any, ids: Any, steps: int) -> dict[str, dict[str, float]]:
    """By operation: how many a step has, and us each, from the runtime's trace (medians over
    steps of the sums). Gathers and reductions: what the transport says, not the host's time."""
    per_step: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, int] = {}
    planner = engine.planner
    plans = {g.plan_id: g.program for g in planner.graphs}
    plans[planner.update_plan_id] = planner.update_program
    for _ in range(steps):
        engine.runtime.trace(True)
        train_step(engine, ids)
        sums: dict[str, float] = defaultdict(float)
        counts = defaultdict(int)
        for plan, section, instr, start, stop, _bytes in engine.runtime.records():
            op = plans[plan].sections[section].instrs[instr].op
            sums[op] += (stop - start) / 1e3
            counts[op] += 1
        engine.runtime.trace(False)
        for op, us in sums.items():
            per_step[op].append(us)
    return {
        op: {"count": counts[op], "us_each": statistics.median(us) / counts[op]}
        for op, us in per_step.items()
    }


def place_times(engine: Any, ids: Any, steps: int, thread: bool) -> dict[str, list[float]]:
    """us by place and step."""
    clocks = Clocks(thread)
    put_clocks(engine, clocks)
    train_step(engine, ids)
    clocks.take()
    places: dict[str, list[float]] = defaultdict(list)
    for _ in range(steps):
        train_step(engine, ids)
        spent = clocks.take()
        for place in PLACES:
            places[place].append(spent.get(place, 0) / 1e3)
    return places


@contextlib.contextmanager
def python_profile(lines: int) -> Iterator[None]:
    """Print the functions that took most time of their own."""
    if not lines:
        yield
        return
    profile = cProfile.Profile()
    profile.enable()
    yield
    profile.disable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(lines)
    print(text.getvalue(), file=sys.stderr)


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(args: argparse.Namespace, regions: str) -> dict[str, Any]:
    engine, ids = make_engine(args)
    for _ in range(args.warmup):
        train_step(engine, ids)
    if regions == "null":
        null_regions(engine, ids)
        train_step(engine, ids)
    plain = plain_times(engine, ids, args.steps)
    with python_profile(args.profile):
        for _ in range(args.steps if args.profile else 0):
            train_step(engine, ids)
    instructions = instruction_times(engine, ids, args.steps)
    places = place_times(engine, ids, args.steps, args.thread_time)
    report = engine.compile_report()
    return {
        "regions": regions,
        "plan": report["plan_passes"] or ["stage"],
        "distinct_regions": report["distinct_regions"],
        "ms": {part: summary(values) for part, values in plain.items()},
        "instructions": instructions,
        "us_by_place": {place: summary(values) for place, values in places.items()},
    }


def show(row: dict[str, Any]) -> None:
    ms = row["ms"]
    print(f"\n{row['regions']} regions, plan {', '.join(map(str, row['plan']))}")
    for part, what in (("all", "step"), ("forward", ""), ("backward", ""), ("step", "update"),
                       ("cpu", "CPU time")):  # fmt: skip
        spread = ms[part]
        line = f"{spread['median']:9.3f} ms ({spread['min']:.3f} to {spread['max']:.3f})"
        print(f"  {what or part:<12} {line}")
    print(f"  {'place':<12} {'us a step':>10} {'least':>10}")
    for place, meaning in PLACES.items():
        spread = row["us_by_place"][place]
        print(f"  {place:<12} {spread['median']:10.0f} {spread['min']:10.0f}  {meaning}")
    print(f"  {'instruction':<12} {'a step':>10} {'us each':>10}")
    for op, found in sorted(row["instructions"].items()):
        print(f"  {op:<12} {found['count']:10d} {found['us_each']:10.2f}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--seq", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each kind")
    parser.add_argument(
        "--warmup", type=int, default=6, help="steps before; the plan is made in them"
    )
    parser.add_argument("--plan", default="auto", choices=["auto", "stage"])
    parser.add_argument("--regions", default="real,null", help="real, null, or both")
    parser.add_argument("--backend", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--compile", default="{}", help="JSON of more keys of the compile section")
    parser.add_argument("--inductor", default="{}", help="JSON of Inductor settings")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--clip", action="store_true", help="clip the gradient norm")
    about = "CPU time of the thread by place, where the machine is shared"
    parser.add_argument("--thread-time", action="store_true", help=about)
    parser.add_argument("--profile", type=int, default=0, help="lines of cProfile to print")
    parser.add_argument("--json", help="write the rows to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    import torch

    torch.set_num_threads(1)
    print(f"{platform.machine()}, {os.cpu_count()} cores, python {platform.python_version()}, "
          f"torch {torch.__version__}, {args.layers} layers")  # fmt: skip
    rows = []
    for regions in args.regions.split(","):
        rows.append(measure(args, regions))
        show(rows[-1])
        torch._dynamo.reset()
    if args.json:
        with open(args.json, "w") as out:
            json.dump(
                {"arguments": vars(args), "torch": torch.__version__, "rows": rows}, out, indent=1
            )


if __name__ == "__main__":
    main()
