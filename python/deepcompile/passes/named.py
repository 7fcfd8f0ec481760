# SPDX-License-Identifier: Apache-2.0
"""A pass as an object."""

from __future__ import annotations

from typing import Any

from .. import _core


class NamedPass:
    """A pass of the core, or of a loaded library, for schedules and `_core.run_passes`.

    Called with (program, context), as a pass written in Python is, it runs alone, under the
    context's memory budget and machine.
    """

    def __init__(
        self, native: str | _core.LoadedPass, where: str, doc: str = "", library: str = ""
    ):
        """``native``: the pass's name in the core, or what load_pass_library gave. ``where``:
        how it is written in Python. ``library``: the file that it is from."""
        self.native, self.library = native, library
        self.pass_name: str = native if isinstance(native, str) else native.name
        self._where = where
        self.__doc__ = doc or (None if isinstance(native, str) else native.summary)

    @property
    def __name__(self) -> str:
        return self.pass_name

    @property
    def contract(self) -> _core.PassContract:
        """What it needs, provides and conflicts with."""
        if isinstance(self.native, str):
            return _core.pass_info(self.native).contract
        return self.native.contract

    def __call__(self, program: _core.StepProgram, context: _core.PassContext) -> None:
        context.run(program, self)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, NamedPass) and self.native == other.native

    def __hash__(self) -> int:
        return hash(self.pass_name)

    def __repr__(self) -> str:
        return f"<pass {self.pass_name}: {self._where}>"
