# SPDX-License-Identifier: Apache-2.0
"""Finds the largest number of layers that trains, for each framework.

    python benchmarks/train/largest_depth.py --model llama-3-70b --result_dir results/depth
    python benchmarks/train/largest_depth.py --table results/depth

A trial trains some steps of a model cut to a number of layers, in a process group
of its own, and is a row like any other. Steps between depths double until one has
no room, then the gap is halved. Only a lack of memory says that a depth is too
large; any other failure ends the search of that framework. Trials that have rows
are not run again, so the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..cli.arguments import Parser, names, not_negative, part, positive
from ..errors import UserError, exit_code, writing
from . import beforehand, process, results, suites, sweep
from .arguments import dtype_of, learning_arguments, options_from
from .conditions import Condition
from .depth_table import markdown
from .display import Display
from .process import Place
from .results import Results, Row

FRAMEWORKS = ("deepcompile", "fsdp_c+offload", "fsdp_c")
"""Ours plans by what memory there is, optimizer states on the host included."""
UNDER_WAY = "trial.json"
"""In the folder of results while a trial runs, so that one that took the search down is known."""
KILLS = 2
"""Searches that ended without a word in one trial, from which on it counts as without room."""
HOST_RESERVE = 0.03
"""Part of the host's memory that a trial must leave, lest the system end more than it."""
STATE_BYTES = 16
"""Of one parameter in training: fp32 master and two moments, weight and gradient."""


# ---- the search


def bracket(tried: Mapping[int, bool]) -> tuple[int, int | None]:
    """(the most layers that train, the fewest above them that have no room)."""
    low = max((n for n, fits in tried.items() if fits), default=0)
    return low, min((n for n, fits in tried.items() if not fits and n > low), default=None)


def next_depth(tried: Mapping[int, bool], start: int, most: int, resolution: int = 1) -> int | None:
    """What to try next; None: it is known. `tried`: whether so many layers have room."""
    low, high = bracket(tried)
    if low >= most or high == 1 or (low and high is not None and high - low <= resolution):
        return None
    if low and high is not None:
        return (low + high) // 2
    depth, step = min(start, most), max(1, start // 8)
    while depth <= low:
        depth, step = depth + step, 2 * step
    while high is not None and depth >= high:
        depth, step = depth - step, 2 * step
    return min(max(depth, 1), most)


def trials_left(tried: Mapping[int, bool], start: int, most: int, resolution: int = 1) -> int:
    """About how many more: as if the next but one above the largest had no room."""
    low, high = bracket(tried)
    depth = next_depth(tried, start, most, resolution)
    if depth is None:
        return 0
    if high is not None:
        return max(1, math.ceil(math.log2((high - low) / resolution)))
    gap = depth - low if low else max(1, start // 8)
    return min(most - low, 2 + math.ceil(math.log2(max(1, gap / resolution))))


def start_depth(condition: Condition, place: Place) -> int:
    """A guess: how many layers' training state fills most of the memory there is."""
    import torch

    from .. import budget

    if not torch.cuda.is_available():
        return 1
    rest, layer = suites.elements(condition.model)
    device = 0.85 * torch.cuda.get_device_properties(0).total_memory * place.world
    host = 0.75 * budget.host_memory()[0] * place.nodes
    if condition.offload_params:
        room = host / STATE_BYTES
    elif condition.ours and not condition.passes:
        room = min((device + host) / STATE_BYTES, device / 5)
    else:
        room = device / STATE_BYTES
    return max(1, int((room - rest) // layer))


# ---- one framework


@dataclass
class Search:
    """Trials of one framework, and what they say."""

    base: Condition
    """At any depth."""
    start: int
    most: int
    retry: bool = False
    resolution: int = 1

    def next(self, found: Results) -> int | None:
        return next_depth(self.tried(found), self.start, self.most, self.resolution)

    def left(self, found: Results) -> int:
        return trials_left(self.tried(found), self.start, self.most, self.resolution)

    def at(self, layers: int) -> Condition:
        return dataclasses.replace(self.base, num_layers=layers)

    @property
    def label(self) -> str:
        return self.base.label

    def rows(self, found: Results) -> dict[int, Row]:
        """The last word on each depth."""
        same = found.latest().rows
        return {r.condition.num_layers: r for r in same
                if not r.predicted and self.at(r.condition.num_layers) == r.condition}  # fmt: skip

    def tried(self, found: Results) -> dict[int, bool]:
        return {n: row.ok for n, row in self.rows(found).items() if row.ok or row.failure == "OOM"}

    def broken(self, found: Results, known: int) -> tuple[Row, bool] | None:
        """A failure that says nothing of memory, and whether it is none of the `known` first rows
        but of this run. An older one that is tried again is left out."""
        for row in self.rows(found).values():
            new = any(row is each for each in found.rows[known:])
            old = not self.retry and row.failure not in sweep.RETRIED
            if not row.ok and row.failure != "OOM" and (new or old):
                return row, new
        return None


class Host:
    """Ends a trial before it takes the last of the host's memory."""

    def __init__(self, reserve: float):
        self._reserve = reserve

    def __call__(self) -> str | None:
        from .. import budget

        total, available = budget.host_memory()
        if available >= self._reserve * total:
            return None
        left, of = available / 2**30, total / 2**30
        return f"out of memory on the host: stopped with {left:.1f} of {of:.0f} GiB left"


@dataclass
class Depth:
    """All searches of a command line."""

    searches: list[Search]
    sweep: sweep.Sweep
    """Runs a trial."""
    beside: bool = True
    """The first framework also at the others' largest depths."""
    _killed: tuple[Condition, int] | None = None
    """The trial that searches ended in without a word, and how often."""

    @property
    def _marker(self) -> Path:
        return Path(self.sweep.options.results) / UNDER_WAY

    def interrupt(self, *_: object) -> None:
        """For signals. What is stopped on purpose was not killed in its trial."""
        self._marker.unlink(missing_ok=True)
        raise KeyboardInterrupt

    def run(self, quiet: bool = False) -> int:
        """0: all is known; 1: a search ended with an error; 3: the time was over; 130:
        interrupted."""
        from . import peers

        for search in self.searches:
            if peers.why_not(search.base) is None:
                peers.check_warmup(search.base, self.sweep.options)
        beforehand.folders(self.sweep.options, self.sweep.logs)
        known, code = len(self.sweep.rows()), 0
        try:
            self._after_a_kill()
            with Display(0, 0, quiet) as display:
                for number, search in enumerate(self.searches):
                    said = self._search(search, self.searches[number:], display, known)
                    display.say(f"{search.label}: {said}")
                    code = max(code, int(said.startswith("stopped")))
                self._at_the_others(display)
        except sweep.TimeOver:
            print("time limit reached; the same command goes on")
            return sweep.OUT_OF_TIME
        except KeyboardInterrupt:
            print("interrupted; the same command goes on")
            return 130
        return code

    def _search(self, search: Search, left: list[Search], display: Display, known: int) -> str:
        from . import peers

        reason = peers.why_not(search.base)
        if reason is not None:
            return f"skipped: {reason}"
        while True:
            found = self.sweep.rows()
            broken = search.broken(found, known)
            if broken is not None:
                row, new = broken
                again = "" if new else ". --retry tries it again"
                return f"stopped at {row.condition.num_layers} layers: {row.error[:300]}{again}"
            depth = search.next(found)
            if depth is None:
                return _known(search, found)
            display.expect(sum(s.left(found) for s in left))
            self._trial(search.at(depth), display)

    def _at_the_others(self, display: Display) -> None:
        """So that there are speeds at one depth."""
        found, first = self.sweep.rows(), self.searches[0]
        low, _ = bracket(first.tried(found))
        others = {bracket(s.tried(found))[0] for s in self.searches[1:]} if self.beside else set()
        missing = [n for n in sorted(others) if 0 < n < low and n not in first.rows(found)]
        for number, layers in enumerate(missing):
            display.expect(len(missing) - number)
            self._trial(first.at(layers), display)

    def _trial(self, condition: Condition, display: Display) -> None:
        times = 1 + (self._killed[1] if self._killed and self._killed[0] == condition else 0)
        said = {"condition": condition.as_dict(), "times": times}
        with writing("bench", self._marker):
            self._marker.parent.mkdir(parents=True, exist_ok=True)
            self._marker.write_text(json.dumps(said), encoding="utf-8")
        try:
            self.sweep.run_group([condition], display)
        finally:
            self._marker.unlink(missing_ok=True)

    def _after_a_kill(self) -> None:
        """A marker that is there: the last search ended without a word in that trial."""
        if not self._marker.is_file():
            return
        try:
            said = json.loads(self._marker.read_text(encoding="utf-8"))
            condition, times = Condition.from_dict(said["condition"]), int(said["times"])
        except (ValueError, KeyError, TypeError, UserError):
            self._marker.unlink()
            return
        self._killed = condition, times
        if times < KILLS:
            return
        error = f"killed {times} times with the search: perhaps the host was out of memory"
        results.append(self.sweep.options.results, self.sweep.failed(condition, error))
        self._marker.unlink()


def _known(search: Search, found: Results) -> str:
    low, high = bracket(search.tried(found))
    if not low:
        return "not even 1 layer has room"
    train = "1 layer trains" if low == 1 else f"{low} layers train"
    if high is None:
        return f"{train}, and --max-layers allows no more"
    return f"{train}, {high} have no room"


# ---- the command line


def parser() -> Parser:
    made = Parser(
        prog="deepcompile bench depth",
        description="Find the largest number of layers that trains, for each framework.",
        epilog=__doc__.split("\n\n", 2)[2]
        + "\nframeworks are written as in deepcompile bench --help; +offload is the framework's\n"
        "offload to the host, deepcompile:prefetch+selective_gather is ours without it.\n"
        "environment: NUM_NODES, NGPUS_PER_NODE, HOSTFILE, SLURM, LAUNCH_ARGS, PROFILE_DIR",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--model", default="llama-3-70b", help="its geometry; default: %(default)s")
    add("--frameworks", type=names, default=list(FRAMEWORKS), metavar="A,B",
        help=f"default: {','.join(FRAMEWORKS)}")  # fmt: skip
    add("--batch-size", type=positive, default=1, help="sequences a rank; default: %(default)s")
    add("--seq-length", type=positive, default=1024, help="default: %(default)s")
    add("--accumulation", type=positive, default=1, help="micro-batches; default: %(default)s")
    add("--start", type=not_negative, default=0, metavar="N",
        help="layers of the first trial; default: as memory suggests, 1 without GPUs")  # fmt: skip
    add("--max-layers", type=not_negative, default=0, metavar="N", help="default: no limit")
    add("--resolution", type=positive, default=1, metavar="N",
        help="end when the largest is known to so many layers; default: %(default)s")  # fmt: skip
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto",
        help="default: bf16 on GPUs, fp32 on CPUs")  # fmt: skip
    add("--backend", choices=("inductor", "eager"), default="inductor",
        help="torch.compile's; default: %(default)s")  # fmt: skip
    add("--host-reserve", type=part, default=HOST_RESERVE, metavar="PART",
        help="of the host's memory: a trial that leaves less is stopped, out of memory; default: "
        "%(default)s")  # fmt: skip
    add("--logs", type=Path, default=Path(os.environ.get("LOG_BASE") or "logs"),
        help="default: $LOG_BASE or logs")  # fmt: skip
    add("--retry", action="store_true", help="try again what failed for other reasons than memory")
    add("--beside", action=argparse.BooleanOptionalAction, default=True,
        help="train the first framework at the others' depths too; default: yes")  # fmt: skip
    add("--table", metavar="DIR", help="only print what the rows there say")
    sweep.limit_arguments(made)
    learning_arguments(made)
    made.set_defaults(bench_step=10, warmup_step=6, in_a_row=0, max_grad_norm=0.0, num_epochs=100)
    return made


def plan(argv: Sequence[str], place: Place | None = None) -> Depth:
    """What a command line asks for."""
    args = parser().parse_args(list(argv))
    place = place or process.place_from()
    beforehand.models([args.model])
    suite = suites.Suite(
        "", ((args.model, 1),), tuple(args.frameworks), (args.batch_size,), (args.seq_length,),
        (args.accumulation,), recompute_ours=False, backend=args.backend,
    )  # fmt: skip
    bases = suites.conditions(suite, place.world, place.nodes, dtype_of(args.dtype))
    searches = [
        Search(base, min(s, most), most, args.retry, args.resolution)
        for base in bases
        for most in [args.max_layers or 1 << 16]
        for s in [args.start or start_depth(base, place)]
    ]
    swept = sweep.Sweep(
        [], options_from(args), place, args.logs, args.condition_limit,
        time.monotonic() + args.time_limit, watch=Host(args.host_reserve),
    )  # fmt: skip
    return Depth(searches, swept, args.beside)


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    if args.table:
        print(markdown(Results.load(args.table)))
        return 0
    depth = plan(argv)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, depth.interrupt)
    code = depth.run()
    bases = [search.base for search in depth.searches]
    print("\n" + markdown(depth.sweep.rows(), bases))
    return code


if __name__ == "__main__":
    sys.exit(main())
