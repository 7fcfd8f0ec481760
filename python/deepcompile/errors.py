# SPDX-License-Identifier: Apache-2.0
"""The two kinds of error. UserError names stage, object, cause and remedy;
InternalError is a bug of ours."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ._core import InternalError, UserError

__all__ = ["InternalError", "UserError", "check_writable", "exit_code", "fail", "meant", "writing"]


def meant(word: object, known: Iterable[str]) -> str:
    """'; did you mean "prefetch"?' for a misspelt word, or nothing."""
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else ""


@contextlib.contextmanager
def writing(stage: str, path: str | os.PathLike) -> Iterator[None]:
    """Around what writes `path`: that it cannot be is the user's to change."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(
            f"[{stage}] {path}: cannot be written ({why}). Choose another place."
        ) from None


def check_writable(stage: str, path: str | os.PathLike) -> None:
    """Before long work whose result goes to the file `path`: the error that writing it would be."""
    place = Path(path)
    why = 0
    if place.is_dir():
        why = errno.EISDIR
    elif not place.parent.is_dir():
        why = errno.ENOENT
    elif not os.access(place if place.exists() else place.parent, os.W_OK):
        why = errno.EACCES
    with writing(stage, path):
        if why:
            raise OSError(why, os.strerror(why))


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
