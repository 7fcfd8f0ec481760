# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them."""

from __future__ import annotations


def format_nanos(nanos: float | None) -> str:
    """``1234567`` -> ``1.23 ms``."""
    if nanos is None:
        return "–"
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if abs(nanos) >= size:
            return (
                f"{nanos / size:.3g} {unit}"
                if abs(nanos) < 1000 * size
                else f"{nanos / size:,.0f} {unit}"
            )
    return f"{nanos:.0f} ns"


def format_bytes(count: float | None) -> str:
    """``1536`` -> ``1.5 KiB``."""
    if count is None:
        return "–"
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(count) >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float | None) -> str:
    """``75.2`` -> ``75.2 s``; below a tenth of a second in milliseconds."""
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def model_text(model: str, layers: int | None) -> str:
    """A model, and its depth where that is another than its own."""
    if layers is None:
        return model
    return f"{model} with {layers} layer{'s' * (layers != 1)}"


def format_value(value: float | None, unit: str) -> str:
    """A value of a comparison row in its unit."""
    if value is None:
        return "–"
    if unit == "ns":
        return format_nanos(value)
    if unit == "B":
        return format_bytes(value)
    return f"{value:,.4g}"
