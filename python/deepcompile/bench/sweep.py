# SPDX-License-Identifier: Apache-2.0
"""Runs a list of conditions, a process group after another, and keeps what each gave.

    python -m deepcompile.bench.sweep bench --num-layers 16

A condition whose row is there is not run again, so a sweep that was interrupted
goes on where it was; one that fails is recorded with its error, and the sweep
goes on with the next.

Torch is imported when there is something to run: whoever asks for help does not wait for it.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..cli.arguments import Parser, comma_separated, names, positive_number, positives
from ..errors import UserError, exit_code, writing
from . import beforehand, process, results, suites
from .arguments import dtype_of, learning_arguments, log_name, options_from
from .conditions import Condition
from .display import Display
from .lines import BEGIN, STEP_MARK, job_text
from .options import Options
from .process import Outcome, Place
from .results import CANNOT_RUN, Results, Row

Runner = Callable[..., Outcome]
HERE = "here"
RETRIED = ("not installed", CANNOT_RUN, "did not start", "timeout")
"""Failures that say nothing of the condition itself are tried again without being asked."""
OUT_OF_TIME = 3
"""The exit code when --time-limit left conditions."""


class TimeOver(Exception):
    """--time-limit was reached; what ran is not recorded."""


@dataclass
class Sweep:
    """A list of conditions and what is to be done with them."""

    conditions: list[Condition]
    options: Options
    place: Place
    logs: Path = Path("logs")
    timeout: float = 1800.0
    """Seconds for each condition, of a process group too."""
    deadline: float = math.inf
    """Of time.monotonic(): when all of it has to end."""
    share_process: bool = False
    force: bool = False
    retry: bool = False
    """Also those that failed before."""
    runner: Runner = process.run
    name: str = ""
    """Its suite's."""
    watch: Callable[[], str | None] = lambda: None
    """Asked once a second while a process group runs; its words end the group, as an error."""
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(
        ("measured", "failed", "skipped", "kept"), 0))  # fmt: skip

    def _all_rows(self) -> Results:
        folder = Path(self.options.results)
        return Results.load(folder) if folder.is_dir() else Results()

    def rows(self) -> Results:
        """Those that were measured with the same options, as far as they say."""
        found = self._all_rows()
        found.rows = [r for r in found if not self.options.differences(r.options, r.condition)]
        return found

    def todo(self) -> list[Condition]:
        """What is not there yet."""
        if self.force:
            return list(self.conditions)
        rows = self.rows()
        for problem in rows.problems:
            print(f"warning: {problem}", file=sys.stderr)

        def wanted(condition: Condition) -> bool:
            row = rows.find(condition)
            if row is None:
                return True
            return not row.ok and (self.retry or row.failure in RETRIED)

        return [c for c in self.conditions if wanted(c)]

    def check(self) -> None:
        """Raises the UserError that `run` begins with, before another sweep runs."""
        self._check(self.todo())

    def run(self, quiet: bool = False) -> int:
        """0: all conditions have times; 1: some have none; 3: the time was over; 130:
        interrupted."""
        todo = self.todo()
        possible = self._check(todo)
        kept = [c for c in self.conditions if c not in todo]
        self.counts["kept"] = len(kept)
        with Display(len(self.conditions), len(kept), quiet) as display:
            self._say_what_is_there(todo, kept, display)
            self._skip([c for c in todo if c not in possible], display)
            groups = suites.groups(possible, self.share_process)
            display.start_processes(len(groups))
            try:
                for group in groups:
                    self.run_group(group, display)
            except (KeyboardInterrupt, TimeOver) as stopped:
                left = len(self.conditions) - sum(self.counts.values())
                over = isinstance(stopped, TimeOver)
                why = "time limit reached" if over else "interrupted"
                display.say(f"{why}: {left} conditions left; the same command goes on")
                return OUT_OF_TIME if over else 130
            said = ", ".join(f"{n} {what}" for what, n in self.counts.items() if n)
            display.say(f"{said or 'nothing to do'}; results in {self.options.results}")
        return 1 if self.counts["failed"] else 0

    def _check(self, todo: list[Condition]) -> list[Condition]:
        """Those that can be tried here. Raises UserError, before anything is written, for options
        that none of them can have, and for what would fail in all of them."""
        from . import peers

        possible = [c for c in todo if peers.why_not(c) is None]
        for condition in possible:
            peers.check_warmup(condition, self.options)
        if self.options.engine and possible and not any(c.has_engine for c in possible):
            raise UserError(
                "[bench] --engine_config: none of these frameworks has an engine to configure; "
                "only deepcompile and deepspeed have. Leave it out."
            )
        if todo:
            beforehand.folders(self.options, self.logs)
        beforehand.models(c.model for c in possible)
        beforehand.host_memory(possible, self.place)
        return possible

    def _say_what_is_there(
        self, todo: list[Condition], kept: list[Condition], display: Display
    ) -> None:
        rows, every = self.rows(), self._all_rows()
        failed = [row for row in map(rows.find, kept) if row is not None and not row.ok]
        if len(kept) > len(failed):
            display.say(f"{len(kept) - len(failed)} conditions are measured already")
            self._say_where(rows, kept, display)
        for row in failed:
            said = f"failed before ({row.failure}), and not tried again without --retry"
            display.say(f"{suites.name(row.condition)}: {said}")
        for condition in [] if self.force else todo:
            row = every.find(condition)
            if row is not None and row.ok:
                said = "; ".join(self.options.differences(row.options, condition))
                display.say(f"{suites.name(condition)}: measured anew, as its row has {said}")

    def _say_where(self, rows: Results, kept: list[Condition], display: Display) -> None:
        """Names other devices than this host's; of other hosts' it knows nothing."""
        from . import measure

        if self.place.nodes > 1 or self.place.slurm:
            return
        found = [row.machine.get("device") for row in map(rows.find, kept) if row and row.ok]
        others = {device for device in found if device} - {measure.machine(kept[0])["device"]}
        if others:
            count = sum(device in others for device in found)
            names = ", ".join(sorted(others))
            display.say(f"{count} of them on another device ({names}): --force measures them here")

    def _skip(self, conditions: list[Condition], display: Display) -> None:
        """What cannot run here is recorded with the reason, once."""
        from . import peers

        known = {(row.condition, row.error) for row in self.rows()}
        for condition in conditions:
            reason = peers.why_not(condition)
            if (condition, reason) not in known:
                results.append(self.options.results, self.failed(condition, reason))
            self.counts["skipped"] += 1
            display.end(f"skipped {suites.name(condition)}: {reason}", 0.0, ran=False)

    def failed(self, condition: Condition, reason: str) -> Row:
        from . import measure

        return Row.failed(
            condition, reason, versions=measure.versions(), commit=measure.commit(),
            machine=measure.machine(condition), options=self.options.recorded(condition),
        )  # fmt: skip

    def run_group(self, group: list[Condition], display: Display) -> None:
        """All of a group; after a failure the rest in a new process group. Raises TimeOver, and
        UserError where the launcher starts nothing: it would not for the others either."""
        processes = 0
        while group:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise TimeOver
            display.start_processes(1 if processes else 0)  # more than were known of
            processes += 1
            log = self.logs / log_name(group[0])
            known = len(self.rows())
            done: dict[Condition, Row] = {}
            mine = set(group)  # another sweep may write into the same folder

            def look(watch: Watch, known: int = known, done: dict = done, mine: set = mine) -> None:
                for row in self.rows().rows[known:]:
                    if row.ok and row.condition in mine and row.condition not in done:
                        done[row.condition] = row
                        self.counts["measured"] += 1
                        self._remember(row)
                        took = watch.seconds(row.condition)
                        display.end(_said(row), took, first=watch.is_first(row.condition))

            watch = Watch(group, display, look, self.logs)
            outcome = self.runner(
                Place() if group[0].world == 1 else self.place,
                ["--job", job_text(group, self.options)],
                log,
                left,
                on_line=watch.line,
                watch=lambda watch=watch: self.watch() or watch.overdue(self.timeout),
            )
            watch.close()
            look(watch)
            group = [c for c in group if c not in done]
            if not group:
                return
            if outcome.stopped and watch.now in done:
                continue  # it had its row, and did not make way for the next
            if outcome.timed_out and time.monotonic() >= self.deadline:
                raise TimeOver
            error = outcome.error or "it ended without a row"
            if not (watch.started or outcome.errors or outcome.timed_out or outcome.stopped):
                if outcome.launch_error:
                    raise UserError(f"{outcome.launch_error} (log: {log})")
                error = f"did not start: {error}"
            failed, group = group[0], group[1:]
            results.append(self.options.results, self.failed(failed, error))
            self.counts["failed"] += 1
            said = f"failed {suites.name(failed)}: {error[:300]} (log: {log})"
            display.end(said, watch.seconds(failed), first=watch.is_first(failed))

    def _remember(self, row: Row) -> None:
        """That a data set was out of reach: the next process groups need not wait for it."""
        problem = row.effective.get("data_problem")
        if problem and not self.options.dataset_problem:
            self.options = dataclasses.replace(self.options, dataset_problem=str(problem))


def _said(row: Row) -> str:
    spread = f"{row.fastest * 1e3:,.1f} to {row.slowest * 1e3:,.1f}"
    return (
        f"{row.median * 1e3:,.1f} ms a step ({spread}), {row.tokens_per_second_per_gpu:,.0f} "
        f"tokens/s/GPU, peak {(row.peak_bytes or 0) / 2**30:.2f} GiB: {suites.name(row.condition)}"
    )


class Watch:
    """Follows a process group's output: which condition it is at, since when. The group's log is
    its first condition's; the others get theirs here."""

    def __init__(
        self,
        group: Sequence[Condition],
        display: Display,
        on_next: Callable[[Watch], None],
        logs: Path,
    ):
        self._display, self._on_next, self._logs = display, on_next, logs
        self._first, self._log = group[0], None
        self._begun: dict[Condition, float] = {}
        self._ended: dict[Condition, float] = {}
        self._now: Condition | None = None
        self.started = False
        """Whether a rank said which condition it is at."""
        self._enter(group[0])

    def _enter(self, condition: Condition) -> None:
        now = time.monotonic()
        if self._now is not None and self._now != condition:
            self._ended[self._now] = now
            self._on_next(self)
        if condition not in self._begun:
            self._begun[condition] = now
            self._display.begin(suites.name(condition))
        self._now = condition
        self.close()
        if condition != self._first:
            path = self._logs / log_name(condition)
            with writing("bench", path):
                self._log = path.open("w", encoding="utf-8")

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def line(self, line: str) -> None:
        _, begin, text = line.partition(BEGIN)  # behind its node's name, if there are several
        if begin:
            self.started = True
            try:
                self._enter(Condition.from_dict(json.loads(text)))
            except (ValueError, UserError):
                pass  # a torn line changes what is shown, nothing else
        elif f", {STEP_MARK}" in line:
            self._display.step("step " + line.partition(STEP_MARK)[2].partition(",")[0])
        if self._log is not None:
            self._log.write(line + "\n")

    def is_first(self, condition: Condition) -> bool:
        """Of its process group."""
        return condition == self._first

    @property
    def now(self) -> Condition:
        return self._now or self._first

    def overdue(self, limit: float) -> str | None:
        """What is said when the condition that it is at has run for longer."""
        seconds = self.seconds(self.now)
        if seconds <= limit:
            return None
        return f"timeout: no end after {seconds:.0f} s (--condition-limit {limit:g})"

    def seconds(self, condition: Condition) -> float:
        end = self._ended.get(condition, time.monotonic())
        return end - self._begun.get(condition, end)


def limit_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--time-limit", type=positive_number, metavar="SECONDS", default=math.inf,
        help="for all of it, then the same command goes on; default: none")  # fmt: skip
    add("--condition-limit", type=positive_number, metavar="SECONDS", default=1800.0,
        help="for one condition, which then has failed; default: 1800")  # fmt: skip


def parser() -> Parser:
    lines = "\n".join(f"  {name:<8}{suite.about}" for name, suite in suites.SUITES.items())
    made = Parser(
        prog="deepcompile bench",
        description=__doc__.splitlines()[0],
        epilog=f"suites:\n{lines}\n\nframeworks: {suites.__doc__.split(chr(10) + chr(10), 1)[1]}"
        "environment: NUM_NODES, NGPUS_PER_NODE, HOSTFILE, SLURM, LAUNCH_ARGS, PROFILE_DIR, MODEL",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("suite", nargs="+", choices=[*sorted(suites.SUITES), HERE],
        help="one or several, see below; here: cut where there are GPUs, else tiny")  # fmt: skip
    add("--models", "--model", type=names, help="instead of the suite's; default: $MODEL")
    add("--num-layers", type=int, help="cut every model; -N: at most N, as memory allows")
    for name, what in (("batch-sizes", "sequences a rank"), ("seq-lengths", "tokens in each"),
                       ("accumulations", "micro-batches a step")):  # fmt: skip
        add(f"--{name}", type=positives, metavar="N,M", help=f"{what}; default: the suite's")
    add("--frameworks", type=names, metavar="A,B", help="instead of the suite's")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto",
        help="auto, the default: bf16 on GPUs, fp32 on CPUs")  # fmt: skip
    add("--backend", choices=("inductor", "eager"), help="torch.compile's; default: the suite's")
    add("--logs", type=Path, default=Path(os.environ.get("LOG_BASE") or "logs"),
        help="folder; default: $LOG_BASE or logs")  # fmt: skip
    limit_arguments(made)
    add("--share-process", action=argparse.BooleanOptionalAction, default=None,
        help="conditions of one model in one process group; default: the suite's")  # fmt: skip
    add("--force", action="store_true", help="measure again what is there")
    add("--retry", action="store_true", help="try again what failed")
    add("--once", metavar="TEXT", help="only the one condition whose name has all these words")
    add("--list", action="store_true", help="print the conditions' names, run nothing")
    plain = [n for n, s in suites.SUITES.items() if s.options.get("max_grad_norm") == 0.0]
    learning_arguments(made, ", ".join(plain))
    return made


def _narrowed(suite: suites.Suite, args: argparse.Namespace) -> suites.Suite:
    changes: dict = {}
    models = args.models or comma_separated(os.environ.get("MODEL", ""))
    if models:
        depth = suite.models[0][1] if args.num_layers is None else args.num_layers
        changes["models"] = tuple((m, depth) for m in models)
    elif args.num_layers is not None:
        changes["models"] = tuple((m, args.num_layers) for m, _ in suite.models)
    if args.backend:
        changes["backend"] = args.backend
    for name in ("frameworks", "batch_sizes", "seq_lengths", "accumulations"):
        if getattr(args, name):
            changes[name] = tuple(getattr(args, name))
    return dataclasses.replace(suite, **changes)


def _only(found: list[Condition], text: str) -> list[Condition]:
    words = text.split()
    fits = [c for c in found if all(w in suites.name(c).split() for w in words)]
    if len(fits) > 1:  # "FSDP (C)" is in the name of its best settings too
        shortest = min(len(suites.name(c).split()) for c in fits)
        fits = [c for c in fits if len(suites.name(c).split()) == shortest]
    if len(fits) != 1:
        names = "; ".join(suites.name(c) for c in (fits or found))
        raise UserError(
            f"[bench] --once {text!r}: names {len(fits) or 'no'} conditions. Give words of one of: "
            f"{names}."
        )
    return fits


def _options(args: argparse.Namespace, suite: suites.Suite, given: set[str]) -> Options:
    """The suite's, but for what the command line says."""
    options = {key: value for key, value in suite.options.items() if key not in given}
    return options_from(argparse.Namespace(**{**vars(args), **options}))


def plan(argv: Sequence[str], place: Place | None = None) -> list[Sweep]:
    """The sweeps that a command line asks for, one a suite."""
    made = parser()
    args = made.parse_args(list(argv))
    place = place or process.place_from()
    deadline = time.monotonic() + args.time_limit
    given = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word[:2] == "--"}
    sweeps = []
    for suite_name in args.suite:
        suite = _narrowed(suites.SUITES[suites.here() if suite_name == HERE else suite_name], args)
        found = suites.conditions(suite, place.world, place.nodes, dtype_of(args.dtype))
        share = suite.share_process if args.share_process is None else args.share_process
        sweeps.append(Sweep(
            found, _options(args, suite, given), place, args.logs, args.condition_limit, deadline,
            share, args.force, args.retry, name=suite_name,
        ))  # fmt: skip
    if args.once is not None:
        everything = [c for s in sweeps for c in s.conditions]
        (only,) = _only(list(dict.fromkeys(everything)), args.once)
        sweeps = [next(s for s in sweeps if only in s.conditions)]
        sweeps[0].conditions = [only]
    if args.list:
        for sweep in sweeps:
            for condition in sweep.conditions:
                print(suites.name(condition))
        return []
    return sweeps


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, interrupt)
    return exit_code(lambda: run_all(sys.argv[1:] if argv is None else argv))


def run_all(argv: Sequence[str]) -> int:
    """The highest code of the planned sweeps."""
    return max(run_each(plan(argv)), default=0)


def run_each(sweeps: Sequence[Sweep]) -> list[int]:
    """The codes of those that ran: all that may begin, until the time is over or someone
    interrupts."""
    for sweep in sweeps[1:]:
        sweep.check()
    codes: list[int] = []
    for sweep in sweeps:
        codes.append(sweep.run())
        if codes[-1] in (OUT_OF_TIME, 130):
            break
    return codes


if __name__ == "__main__":
    sys.exit(main())
