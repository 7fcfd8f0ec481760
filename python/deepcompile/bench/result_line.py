# SPDX-License-Identifier: Apache-2.0
"""Lines of result.txt, as DeepSpeedExamples/benchmarks/deepcompile/run_bench_lm.py writes them.

    20250301120000 org/Model ds=True np=32 batch_size=1 seq=512 zero_stage=3 acc=1 ac=True
    compile=True backend=inductor deepcompile=True passes=prefetch compile_time=91.5
    iteration time: 2.2700 alloc_mem: 123 peak_mem: 456          (all on one line)

Written exactly so, seconds being the mean. What the seed has no field for
(another framework, cut depth, "best" settings, a prediction) follows behind
`` # `` as key=value: the seed's pattern does not look there, and the reader here
gets the whole condition back. A line without it is the seed's own, with or
without ``backend=`` (its plot.py expects none, its runner writes one).

The seed's plot.py has bars for three kinds of passes: prefetch, selective_gather, and both in
this order. Rows with others, and those of no named passes (``passes=None``: our automatic plan),
fit its pattern, but it says "Unknown category" and draws none; `deepcompile plot` draws all.
"""

from __future__ import annotations

import dataclasses
import re
from datetime import datetime, timezone
from typing import Any

from ..errors import UserError
from .conditions import Condition
from .results import Row

SEED_PASSES = ("prefetch", "selective_gather")
_STAMP, _ISO = "%Y%m%d%H%M%S", "%Y-%m-%dT%H:%M:%SZ"
_LINE = re.compile(
    r"(?P<timestamp>\d{14}) (?P<model>\S+) ds=(?P<ds>True|False) np=(?P<world>\d{1,9}) "
    r"batch_size=(?P<batch_size>\d{1,9}) seq=(?P<seq_length>\d{1,9}) "
    r"zero_stage=(?P<zero_stage>\d) acc=(?P<accumulation>\d{1,9}) ac=(?P<ac>True|False) "
    r"compile=(?P<compile>True|False) (?:backend=(?P<backend>\S+) )?"
    r"(?:deepcompile=(?P<deepcompile>True|False) )?(?:passes=(?P<passes>\S*) )?"
    r"(?:compile_time=(?P<compile_time>[\d.eE+-]+) )?iteration time: (?P<mean>[\d.]+) "
    r"alloc_mem: (?P<alloc>\d{1,18}) peak_mem: (?P<peak>\d{1,18})(?: # (?P<more>.*))?\s*$"
)


def to_line(row: Row) -> str:
    """The line of a row with times, without its end."""
    condition = row.condition
    if not row.ok:
        raise UserError(f"[bench] {condition.label}: has no times, so no line in result.txt.")
    stamp = datetime.strptime(row.timestamp, _ISO).strftime(_STAMP)
    passes = ",".join(_as_the_seed_orders(condition.passes)) or None
    seconds = row.mean if row.mean is not None else row.median
    line = (
        f"{stamp} {_word(condition.model)} ds={_is_deepspeed(condition)} np={condition.world} "
        f"batch_size={condition.batch_size} seq={condition.seq_length} "
        f"zero_stage={condition.zero_stage} acc={condition.accumulation} "
        f"ac={condition.activation_checkpointing} compile={condition.compile} "
        f"backend={condition.backend} deepcompile={condition.deepcompile} passes={passes} "
        f"compile_time={_fixed(row.compile_seconds or 0)} iteration time: {seconds:.4f} "
        f"alloc_mem: {row.alloc_bytes or 0} peak_mem: {row.peak_bytes or 0}"
    )
    more = _beyond_the_seed(row, line)
    return line + (f" # {more}" if more else "")


def _as_the_seed_orders(passes: tuple[str, ...]) -> tuple[str, ...]:
    """Its plot.py knows both passes in one order only."""
    return SEED_PASSES if sorted(passes) == list(SEED_PASSES) else passes


def _fixed(number: float) -> str:
    """Without an exponent, which the seed's pattern does not know."""
    return f"{number:.6f}".rstrip("0").rstrip(".")


def from_line(line: str) -> Row:
    """A row from a line; raises UserError if it is not one."""
    match = _LINE.match(line)
    if match is None:
        raise UserError(
            "[bench] line: is not one of result.txt. Take it out, or name the file .jsonl if it "
            "holds JSON rows."
        )
    found = match.groupdict()
    try:
        seconds = float(found["mean"])
        compile_seconds = float(found["compile_time"] or 0)
        stamp = datetime.strptime(found["timestamp"], _STAMP).replace(tzinfo=timezone.utc)
    except ValueError as error:
        raise UserError(f"[bench] line: {error}. Take it out.") from None
    if not seconds > 0:
        raise UserError("[bench] line: its iteration time is 0. Take it out.")
    condition = _condition(found)
    more = dict(p.split("=", 1) for p in (found["more"] or "").split() if "=" in p)
    predicted = more.pop("predicted", "False") == "True"
    condition = _with(condition, more)
    return Row(
        condition,
        median=seconds,
        mean=seconds,
        alloc_bytes=int(found["alloc"]),
        peak_bytes=int(found["peak"]),
        compile_seconds=compile_seconds,
        tokens_per_second_per_gpu=condition.tokens / seconds,
        predicted=predicted,
        timestamp=stamp.strftime(_ISO),
    )


def _is_deepspeed(condition: Condition) -> bool:
    """Ours counts, so that the seed's own script draws it as DeepCompile."""
    return condition.framework.startswith("zero") or condition.deepcompile


def _condition(found: dict[str, Any]) -> Condition:
    """What the seed's fields say, as its plot.py reads them."""
    compiled = found["compile"] == "True"
    if found["ds"] == "False":
        framework = "fsdp"
    elif (found["deepcompile"] or found["compile"]) == "True" and compiled:
        framework = "ds_deepcompile"
    else:
        framework = "zero1" if found["zero_stage"] == "1" else "zero3"
    if compiled and framework != "ds_deepcompile":
        framework += "_c"
    passes = found["passes"] if found["passes"] != "None" else None
    return Condition(
        model=found["model"],
        framework=framework,
        passes=tuple(word for word in (passes or "").split(",") if word),
        batch_size=int(found["batch_size"]),
        seq_length=int(found["seq_length"]),
        accumulation=int(found["accumulation"]),
        zero_stage=int(found["zero_stage"]),
        activation_checkpointing=found["ac"] == "True",
        compile=compiled,
        backend=found["backend"] or "inductor",
        world=int(found["world"]),
    )


def _beyond_the_seed(row: Row, line: str) -> str:
    """key=value of all that the line's fields do not give back."""
    match = _LINE.match(line)
    if match is None:
        raise UserError(f"[bench] {row.condition.model!r}: cannot be written in result.txt.")
    plain, words = _condition(match.groupdict()), []
    for field in dataclasses.fields(Condition):
        value = getattr(row.condition, field.name)
        if value != getattr(plain, field.name):
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            words.append(f"{field.name}={_word(text)}")
    return " ".join([*words, *(["predicted=True"] if row.predicted else [])])


def _with(condition: Condition, more: dict[str, str]) -> Condition:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Condition):
        if field.name not in more:
            continue
        text = _unword(more[field.name])
        old = getattr(condition, field.name)
        try:
            if isinstance(old, bool):
                values[field.name] = {"True": True, "False": False}[text]
            elif isinstance(old, tuple):
                values[field.name] = tuple(w for w in text.split(",") if w)
            else:
                values[field.name] = type(old)(text)
        except (KeyError, ValueError):
            raise UserError(
                f"[bench] line: {field.name}={text} is no {type(old).__name__}. Correct it."
            ) from None
    return dataclasses.replace(condition, **values)


def _word(text: str) -> str:
    """Without blanks, which separate the fields: %20."""
    return re.sub(r"[\s%#]", lambda m: f"%{ord(m.group()):02X}", text)


def _unword(text: str) -> str:
    return re.sub(r"%([0-9A-F]{2})", lambda m: chr(int(m.group(1), 16)), text)
