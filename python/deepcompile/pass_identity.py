# SPDX-License-Identifier: Apache-2.0
"""What tells a pass of a schedule from another, and from another version of it."""

from __future__ import annotations

import functools
import hashlib
import inspect
from pathlib import Path
from typing import Any

from .passes.named import NamedPass


def identity(pass_: Any) -> str:
    """A text that is equal for equal passes: a name, the source of a function with what it has
    captured and what it reads of its module, of an object's class with what the object holds, or
    the digest of a library. What says no more of itself than where it lies is another in each
    run."""
    return _identity(pass_, ())


def _identity(pass_: Any, within: tuple[Any, ...]) -> str:
    if isinstance(pass_, str):
        return pass_
    if any(pass_ is outer for outer in within):  # it holds itself
        return "itself"
    within = (*within, pass_)
    if isinstance(pass_, NamedPass):
        return pass_.pass_name + (f" of {_digest(pass_.library)}" if pass_.library else "")
    if isinstance(pass_, functools.partial):
        held = _held({"args": pass_.args, **pass_.keywords}, within)
        return f"partial({_identity(pass_.func, within)}, {held})"
    if inspect.ismethod(pass_):
        return f"{_identity(pass_.__func__, within)} of {_identity(pass_.__self__, within)}"
    if inspect.isfunction(pass_):
        held = inspect.getclosurevars(pass_).nonlocals | {"defaults": pass_.__defaults__}
        held |= {"keywords": pass_.__kwdefaults__, "module": _of_module(pass_)}
        return f"{_source(pass_)}{_held(held, within)}"
    if inspect.isclass(pass_):
        return f"{_source(pass_)}{_of_module(pass_)}"
    held = _held(getattr(pass_, "__dict__", {"is": repr(pass_)}), within)
    return f"{_identity(type(pass_), within)}{held}"


def _held(values: dict[str, Any], within: tuple[Any, ...]) -> str:
    return str({
        name: _identity(value, within) if callable(value) else repr(value)
        for name, value in sorted(values.items())
    })  # fmt: skip


def _of_module(read_by: Any) -> str:
    """What a function, or a class, reads of its own module, directly or through what it reads; of
    others' things, the names."""
    found: dict[str, str] = {}
    waiting = [read_by]
    while waiting:
        each = waiting.pop()
        functions = vars(each).values() if inspect.isclass(each) else [each]
        for function in filter(inspect.isfunction, functions):
            for name, value in inspect.getclosurevars(function).globals.items():
                if name in found or inspect.ismodule(value):
                    continue
                ours = inspect.isfunction(value) or inspect.isclass(value)
                if ours and value.__module__ == read_by.__module__:
                    found[name] = _source(value)
                    waiting.append(value)
                else:
                    found[name] = name if callable(value) else repr(value)
    return str(sorted(found.items()))


def _source(thing: Any) -> str:
    """Of a function or class; its name and where it lies if it has none."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return repr(thing)


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
