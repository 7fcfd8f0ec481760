# SPDX-License-Identifier: Apache-2.0
"""The two kinds of error. UserError names stage, object, cause and remedy;
InternalError is a bug of ours."""

from __future__ import annotations

import sys

from ._core import InternalError, UserError

__all__ = ["InternalError", "UserError", "fail"]


def fail(error: UserError) -> int:
    """What a command does with an error: one line on stderr. Its exit code."""
    print("deepcompile: error: " + " ".join(str(error).split()), file=sys.stderr)
    return 2
