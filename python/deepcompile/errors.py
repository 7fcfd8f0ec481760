# SPDX-License-Identifier: Apache-2.0
"""The two kinds of error. UserError names stage, object, cause and remedy;
InternalError is a bug of ours."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ._core import InternalError, UserError

__all__ = [
    "InternalError", "UserError", "check_writable", "exit_code", "fail", "meant",
    "why_not_written", "writing",
]  # fmt: skip


def meant(word: object, known: Iterable[str]) -> str:
    """'; did you mean "prefetch"?' for a misspelt word, or nothing."""
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else ""


_LITTLE = 1 << 30
"""Bytes: a disk with less may be full for what was to be written."""


def why_not_written(path: str | os.PathLike, error: BaseException, cause: str = "") -> str:
    """An error's cause in words, or `cause`; and how much room there is, if that may be it."""
    number = getattr(error, "errno", None)
    if not cause:
        cause = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [""])[0]
    cause = cause or type(error).__name__
    if number not in (None, errno.ENOSPC, errno.EDQUOT):
        return cause
    for place in (Path(path), *Path(path).absolute().parents):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(place).free
            return cause if free >= _LITTLE else f"{cause}; {free / 2**20:.1f} MiB are free there"
    return cause


@contextlib.contextmanager
def writing(
    stage: str, path: str | os.PathLike, also: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Around what writes `path`: that it cannot be is the user's to change. `also`: what a library
    raises beside OSError."""
    try:
        yield
    except (OSError, *also) as error:
        why = why_not_written(path, error)
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
