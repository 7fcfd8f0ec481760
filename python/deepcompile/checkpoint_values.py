# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint keeps beside tensors: numbers, text and containers of them.

They are read back without running code (torch.load with weights_only), so what is
kept has to be of types that this takes. Some others are kept as a dict that names
their kind; what is left is an error when it is saved, not when it is loaded.
"""

from __future__ import annotations

import collections
import copy
import functools
import io
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .errors import UserError

_KIND = "deepcompile.kind"
_PROGRAM = (
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial, type,
    torch.nn.Module, torch.optim.Optimizer,
)  # fmt: skip
"""Parts of the program, which the loading job has itself."""


def plain(value: Any) -> Any:
    """Numbers and arrays of other libraries (NumPy's, in a learning rate) as Python's, in lists
    and dicts too, as a checkpoint is read without them. Their inverse is `restored`."""
    if isinstance(value, dict):
        return _mapped(plain, value)
    if isinstance(value, list) or type(value) is tuple:
        return type(value)(plain(each) for each in value)
    if isinstance(value, collections.deque):
        return {_KIND: "deque", "items": [plain(each) for each in value], "maxlen": value.maxlen}
    if type(value) in (set, frozenset):
        return {_KIND: type(value).__name__, "items": [plain(each) for each in value]}
    if isinstance(value, (int, float)) and type(value) not in (bool, int, float):
        return int(value) if isinstance(value, int) else float(value)
    if type(value).__module__ == "numpy" and hasattr(value, "item"):
        import numpy as np

        return _array(value) if isinstance(value, np.ndarray) else value.item()
    return value


def _mapped(change: Callable[[Any], Any], value: dict) -> dict:
    """The same kind of dict, of changed values. Not by update(), which adds up in a Counter."""
    kept = copy.copy(value)
    for key, each in value.items():
        kept[key] = change(each)
    return kept


def _array(value: Any) -> Any:
    """A NumPy array by its bytes; one of objects or of named fields as it is."""
    if value.dtype.hasobject or value.dtype.names:
        return value
    return {_KIND: "ndarray", "type": value.dtype.str, "shape": list(value.shape),
            "bytes": value.tobytes()}  # fmt: skip


def restored(value: Any) -> Any:
    """What `plain` was given, from what was read back."""
    if isinstance(value, dict):
        kind = value.get(_KIND)
        if kind == "deque":
            return collections.deque(map(restored, value["items"]), value["maxlen"])
        if kind in ("set", "frozenset"):
            return (set if kind == "set" else frozenset)(map(restored, value["items"]))
        if kind == "ndarray":
            import numpy as np

            flat = np.frombuffer(value["bytes"], dtype=value["type"])
            return flat.reshape(value["shape"]).copy()
        return _mapped(restored, value)
    if isinstance(value, list) or type(value) is tuple:
        return type(value)(restored(each) for each in value)
    return value


def without_program(state: Any) -> Any:
    """A scheduler's state without the entries that hold functions, modules or optimizers: torch's
    schedulers leave out their own."""
    if type(state) is dict:
        return {k: without_program(v) for k, v in state.items() if not _holds_program(v)}
    if type(state) in (list, tuple):
        return type(state)(map(without_program, state))
    return state


def _holds_program(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        return any(_holds_program(each) for each in value)
    return isinstance(value, _PROGRAM)


def comes_back(value: Any) -> bool:
    """Whether what is saved of it can be read without running code."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # pickle's errors, and whatever a class raises
        return False
    return True


def can_be_pickled(value: Any) -> bool:
    try:
        torch.save(value, _Nowhere())
    except Exception:
        return False
    return True


class _Nowhere(io.RawIOBase):
    """A file that keeps nothing."""

    def write(self, data: Any) -> int:
        return len(data)


def check_readable(place: str, value: Any) -> None:
    """UserError that names the part of `value`, which is called `place`, that would be saved but
    not loaded."""
    if not comes_back(value):
        raise _refused(
            place, value, comes_back, "a checkpoint is read without running code; keep it as "
            "numbers, text, lists or tensors, or leave it out",
        )  # fmt: skip


def pickled_to(place: str, value: Any, path: Any) -> None:
    """Save `value`, which is called `place`; UserError that names what cannot be pickled."""
    try:
        torch.save(value, path)
    except OSError:
        raise
    except Exception as error:  # whatever a class raises, or torch's writer on a full disk
        if can_be_pickled(value):
            raise
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise _refused(place, value, can_be_pickled, f"{cause}; leave it out") from error


def _refused(place: str, value: Any, good: Callable[[Any], bool], cause: str) -> UserError:
    found = True
    while found:
        found = False
        for name, part in _parts(value):
            if not good(part):
                place, value, found = place + name, part, True
                break
    return UserError(
        f"[checkpoint] {place}: an object of {type(value).__module__}.{type(value).__qualname__} "
        f"cannot be saved: {cause}"
    )


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield f"[{key!r}]", part
    elif isinstance(value, (list, tuple)):
        for at, part in enumerate(value):
            yield f"[{at}]", part
