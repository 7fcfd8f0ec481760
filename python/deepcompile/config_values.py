# SPDX-License-Identifier: Apache-2.0
"""What the values of configuration keys may be.

Each check takes the key's full name and the JSON value, and returns the value that the
configuration holds or raises a UserError that names the key.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .errors import UserError, meant

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?(B?)", re.IGNORECASE)


def fail(where: str, cause: str) -> UserError:
    return UserError(f"[config] {where}: {cause}")


def boolean(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise fail(where, f"must be true or false, not {value!r}")
    return value


def switch(where: str, value: Any) -> bool:
    """One that trainers fill in."""
    _not_auto(where, value, "true or false")
    return boolean(where, value)


def _not_auto(where: str, value: Any, instead: str) -> None:
    if value == "auto":
        raise fail(where, f'"auto" is for trainers that fill it in; give {instead}')


def number(kind: type, low: float, allow_low: bool = True) -> Callable[[str, Any], Any]:
    bound = f"at least {low}" if allow_low else f"greater than {low}"

    def check(where: str, value: Any):
        _not_auto(where, value, "a number")
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise fail(where, f"must be a number, not {value!r}")
        if kind is int and not whole:
            raise fail(where, f"must be a whole number, not {value!r}")
        if not (value >= low if allow_low else value > low):
            raise fail(where, f"must be {bound}, not {value!r}")
        return kind(value)

    return check


def interval(where: str, value: Any) -> int:
    """Every so many steps; 0 is never, as is Infinity, which Accelerate writes."""
    return 0 if value == float("inf") else number(int, 0)(where, value)


def choice(*names: str, any_case: bool = False) -> Callable[[str, Any], str]:
    """One of some names; with ``any_case`` however its letters are."""
    lower = {name.lower(): name for name in names}

    def check(where: str, value: Any) -> str:
        if any_case and isinstance(value, str):
            value = lower.get(value.lower(), value)
        if value not in names:
            raise fail(where, f"must be one of {', '.join(names)}, not {value!r}"
                       + meant(value, names))  # fmt: skip
        return value

    return check


def text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise fail(where, f"must be a string, not {value!r}")
    return value


def texts(where: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise fail(where, f"must be a list of strings, not {value!r}")
    return tuple(text(where, item) for item in value)


def table(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise fail(where, f"must be an object, not {value!r}")
    return dict(value)


def stage(where: str, value: Any) -> int:
    value = number(int, 0)(where, value)
    if value > 3:
        raise fail(where, f"stage {value} does not exist; use 0, 1, 2 or 3")
    return value


def memory(where: str, value: Any) -> int | float:
    """Bytes as an int, or a fraction of the device's memory as a float up to 1.0."""
    if isinstance(value, str):
        found = _SIZE.fullmatch(value.strip())
        if found is None:
            raise fail(where, f'must be bytes, "20GiB" or a fraction of 1, not {value!r}')
        value, unit = float(found[1]), (found[2] or "").lower()
        if unit or found[3]:  # 1B is one byte, not all there is
            scale = 1024 if unit.endswith("i") else 1000
            return max(1, int(value * scale ** ("kmgt".index(unit[0]) + 1 if unit else 0)))
    value = number(float, 0, allow_low=False)(where, value)
    if value > 1 and value != int(value):
        raise fail(where, f"must be whole bytes or a fraction of 1, not {value!r}")
    return value if value <= 1 else int(value)


def fraction(where: str, value: Any) -> float:
    value = number(float, 0)(where, value)
    if value >= 1:
        raise fail(where, f"must be a fraction below 1, not {value!r}")
    return value


def schedule(where: str, value: Any) -> Any:
    """ "auto", or [[first step, [pass names]]]; engine.compile() checks the names, as some may be
    registered until then."""
    if value == "auto":
        return value
    if not isinstance(value, list | tuple):
        raise fail(where, f'must be "auto" or a list of [step, [passes]], not {value!r}')
    entries = []
    for entry in value:
        if not isinstance(entry, list | tuple) or len(entry) != 2:
            raise fail(where, f"{entry!r} is not [step, [passes]]")
        entries.append((number(int, 0)(where, entry[0]), texts(where, entry[1])))
    return tuple(entries)


def as_number(where: str, value: Any) -> int | float:
    """A number of an optimizer or a schedule; text is read as one: YAML gives 3e-4 as text."""
    if isinstance(value, str):
        try:
            value = float(value) if re.search(r"[.eE]", value) else int(value)
        except ValueError:
            pass
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fail(where, f"must be a number, not {value!r}")
    if value != value or abs(value) == float("inf"):
        raise fail(where, f"must be a finite number, not {value!r}")
    return value


def as_whole(where: str, value: Any) -> int:
    """The same, without a fraction."""
    found = as_number(where, value)
    if found != int(found):
        raise fail(where, f"must be a whole number, not {value!r}")
    return int(found)


def adam_params(where: str, value: Any) -> dict[str, Any]:
    """optimizer.params: its numbers as numbers. Names are checked by load_config."""
    rules = {"lr": _rate, "eps": _rate, "weight_decay": _rate, "betas": _betas,
             "adam_w_mode": boolean}  # fmt: skip
    params = {key: each for key, each in table(where, value).items() if each is not None}
    for key in rules.keys() & params.keys():
        if params[key] != "auto":
            params[key] = rules[key](f"{where}.{key}", params[key])
    return params


def _rate(where: str, value: Any) -> float:
    return number(float, 0)(where, as_number(where, value))


def _betas(where: str, value: Any) -> list[float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise fail(where, f"must be two numbers such as [0.9, 0.999], not {value!r}")
    return [fraction(where, as_number(where, each)) for each in value]
