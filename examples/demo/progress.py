# SPDX-License-Identifier: Apache-2.0
"""How the training script talks: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text


class Progress:
    """Messages with the time since the start; only one rank is not quiet."""

    def __init__(self, quiet: bool = False, lines_every: int = 10) -> None:
        self._quiet = quiet
        self._every = lines_every
        self._console = Console(highlight=False, soft_wrap=True)
        self._live = sys.stdout.isatty()
        self._began = time.monotonic()
        self._bar: Bar | None = None
        self._task = None
        self._steps = 0
        self._first: tuple[int, float] | None = None

    def say(self, message: str) -> None:
        """One line."""
        if not self._quiet:
            at = f"[{time.monotonic() - self._began:5.0f} s] "
            self._console.print(Text(at, style="dim") + Text(message))

    def show(self, title: str, text: str) -> None:
        """A block of text."""
        if not self._quiet:
            clean = "".join(c if c.isprintable() or c == "\n" else "\u00b7" for c in text)
            self._console.print(Panel(Text(clean), title=title, title_align="left"))

    def start(self, done: int, steps: int) -> None:
        """Begin counting steps."""
        self._steps = steps
        if self._quiet or not self._live:
            return
        self._bar = Bar(
            TextColumn("  "),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("train", total=steps, completed=done, loss="-", rate="")
        self._bar.start()

    def step(self, step: int, loss: float, rate: float | None) -> None:
        """One step is done: its loss and tokens a second (None while compiling)."""
        if self._quiet:
            return
        shown = f"{rate:,.0f} tokens/s" if rate is not None else "compiled"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=f"{loss:.3f}", rate=shown)
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        elif step % self._every and step != self._steps:
            return
        done = step - self._first[0]
        left = (now - self._first[1]) / done * (self._steps - step) if done else None
        eta = f"  eta {left:.0f} s" if left is not None else ""
        self.say(f"step {step:4}/{self._steps}  loss {loss:.3f}  {shown}{eta}")

    def stop(self) -> None:
        """The steps are done."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
