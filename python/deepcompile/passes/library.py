# SPDX-License-Identifier: Apache-2.0
"""Passes written in C++, in a shared library of the user's own."""

from __future__ import annotations

import os

from .. import _core
from .named import NamedPass


def load_library(path: str | os.PathLike) -> list[NamedPass]:
    """The passes of a shared library, for schedules.

    The library is built against the headers and the static core in this package: see
    examples/custom_pass. It stays loaded. Raises UserError if it cannot be loaded, exports no
    pass, or was built for another pass ABI.
    """
    path = os.fspath(path)
    found = _core.load_pass_library(path)
    return [NamedPass(p, f"{p.summary}, from {path}", library=path) for p in found]
