# SPDX-License-Identifier: Apache-2.0
"""Where the nodes' lines go: the first node's as they come, the others' with their names or to
files."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError

LONGEST_LINE = 1 << 16
"""A line that is not ended after as many bytes is cut."""


class Output:
    """One node's output."""

    def __init__(self, prefix: bytes | None, log: BinaryIO | None):
        self.prefix = prefix
        """What starts its lines here; empty: as they come; None: they are not shown."""
        self.log = log
        self.unfinished = {False: b"", True: b""}

    def write(self, data: bytes, is_error: bool) -> None:
        if self.log is not None:
            self.log.write(data)
            self.log.flush()
        if self.prefix is None or not data:
            return
        if self.prefix:
            data = self._prefixed(data, is_error)
        _show(data, is_error)

    def _prefixed(self, data: bytes, is_error: bool) -> bytes:
        """Whole lines only, so that nodes' lines do not mix; a progress bar's end with \\r."""
        lines = (self.unfinished[is_error] + data).splitlines(keepends=True)
        last = b"" if lines[-1].endswith(b"\n") else lines.pop()
        if len(last) > LONGEST_LINE:
            lines.append(last + b"\n")
            last = b""
        self.unfinished[is_error] = last
        return b"".join(self.prefix + line for line in lines)

    def close(self) -> None:
        for is_error, rest in self.unfinished.items():
            if rest:
                _show(self.prefix + rest + b"\n", is_error)
        self.unfinished = {False: b"", True: b""}
        if self.log is not None:
            self.log.close()


def _show(data: bytes, is_error: bool) -> None:
    stream = (sys.stderr if is_error else sys.stdout).buffer
    stream.write(data)
    stream.flush()


def outputs(names: Sequence[str], log_dir: str | None) -> list[Output]:
    """The nodes' outputs. With a folder each node has a file there, and only the first is shown."""
    if log_dir is None:
        return [Output(f"[{name}] ".encode() if at else b"", None) for at, name in enumerate(names)]
    try:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        logs = [open(Path(log_dir) / f"{name}.log", "wb") for name in names]  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"[launch] --log-dir {log_dir}: cannot be written ({error.strerror}). "
            "Choose another folder."
        ) from None
    return [Output(None if at else b"", log) for at, log in enumerate(logs)]


class Labelled:
    """Deals out lines such as ``3: text``, as srun --label writes them."""

    def __init__(self, nodes: Sequence[Output]):
        self.nodes = nodes
        self.unfinished = {False: b"", True: b""}

    def write(self, data: bytes, is_error: bool) -> None:
        lines = (self.unfinished[is_error] + data).split(b"\n")
        self.unfinished[is_error] = lines.pop()
        for line in lines:
            self._deal(line + b"\n", is_error)

    def _deal(self, line: bytes, is_error: bool) -> None:
        match = re.match(rb" *([0-9]+): ?", line)
        if match and int(match[1]) < len(self.nodes):
            self.nodes[int(match[1])].write(line[match.end() :], is_error)
            return
        _show(line, True)  # srun's own

    def close(self) -> None:
        for is_error, rest in self.unfinished.items():
            if rest:
                self._deal(rest + b"\n", is_error)
        for node in self.nodes:
            node.close()
