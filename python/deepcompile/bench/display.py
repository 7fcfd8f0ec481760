# SPDX-License-Identifier: Apache-2.0
"""What a sweep shows: a live bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text


def duration(seconds: float) -> str:
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    return (
        f"{minutes} min {seconds:02} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02} min"
    )


class Display:
    """Counts conditions; those that were measured before count as done, and take no time."""

    def __init__(self, total: int, done: int, quiet: bool = False, at_a_time: int = 1):
        self._console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._total, self._done, self._at_a_time = total, done, at_a_time
        self._took: dict[bool, list[float]] = {True: [], False: []}
        self._firsts: int | None = None
        self._bar: Progress | None = None
        self._task = None
        self._shown = ""
        if sys.stdout.isatty() and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                TimeElapsedColumn(), TextColumn("{task.fields[left]}"), console=self._console,
            )  # fmt: skip

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._task = self._bar.add_task("", total=self._total, completed=self._done, left="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def left(self) -> str:
        """The time left, by what conditions took so far: those that are first in a process, which
        compile for the others, and the others; those side by side share the time."""
        first, later = (sum(t) / len(t) if t else None for t in self._took.values())
        if first is None and later is None:
            return "time left unknown"
        rest = self._total - self._done
        firsts = rest if self._firsts is None else min(self._firsts, rest)
        seconds = firsts * (later if first is None else first)
        seconds += (rest - firsts) * (first if later is None else later)
        seconds /= max(1, min(self._at_a_time, rest))
        return f"about {duration(max(1.0, seconds))} left" if rest else "done"

    def start_processes(self, more: int) -> None:
        """So many more processes will start; without this, each condition is first in one."""
        self._firsts = (self._firsts or 0) + more

    def expect(self, more: int) -> None:
        """So many are left, as far as is known now."""
        self._total = self._done + more
        if self._bar is not None:
            self._bar.update(self._task, total=self._total)

    def say(self, message: str) -> None:
        stamp = time.strftime("%H:%M:%S ")
        self._console.print(Text(stamp, style="dim") + Text(message))

    def begin(self, name: str) -> None:
        self._shown = name
        if self._bar is not None:
            self._bar.update(self._task, description=name)
        else:
            self.say(f"[{self._done + 1}/{self._total}] {name}")

    def step(self, text: str) -> None:
        """Where the condition is."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._shown}  {text}")

    def end(self, result: str, seconds: float, ran: bool = True, first: bool = True) -> None:
        """One condition is done. `first`: in its process."""
        self._done += 1
        if ran:
            self._took[first].append(seconds)
            if first and self._firsts:
                self._firsts -= 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, left=self.left)
        self.say(f"      {result}" + (f" ({duration(seconds)}, {self.left})" if ran else ""))
