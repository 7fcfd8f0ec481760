# SPDX-License-Identifier: Apache-2.0
"""The two kinds of error. UserError names stage, object, cause and remedy;
InternalError is a bug of ours."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ._core import InternalError, UserError

__all__ = ["InternalError", "UserError", "exit_code", "fail"]


def fail(error: UserError) -> int:
    """What a command does with an error: one line on stderr. Its exit code."""
    print("deepcompile: error: " + " ".join(str(error).split()), file=sys.stderr)
    return 2


def exit_code(command: Callable[[], int]) -> int:
    """A command's own exit code; that of an error, which is said; or 130 if it was interrupted."""
    try:
        return command()
    except UserError as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130
