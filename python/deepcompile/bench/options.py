# SPDX-License-Identifier: Apache-2.0
"""How conditions are run: what is the same for all of a sweep, beside what sets them apart."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from .conditions import Condition

BETAS, EPS, DECAY = (0.9, 0.999), 1e-8, 0.01
"""AdamW's, in every framework: torch's defaults."""
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flex_attention")
"""What attn_impl may be."""
MEASURED = ("learning_rate", "max_grad_norm", "dataset_name", "num_epochs", "bench_step",
            "warmup_step", "in_a_row", "attn_impl", "deterministic", "load_weights", "eval",
            "profile", "engine")  # fmt: skip
"""The options that change what a row says; rows record them."""
MORE = ("in_a_row", "eval", "profile")
"""Those of them that a row may have without being asked: it then says more."""


@dataclass(frozen=True)
class Options:
    """Names as run_bench_lm.py's arguments."""

    learning_rate: float = 2e-5
    max_grad_norm: float = 1.0
    """0 switches clipping off."""
    dataset_name: str | None = None
    num_epochs: int = 100
    bench_step: int = 30
    """Optimizer steps in all."""
    warmup_step: int = 15
    """The first of them, which are not measured."""
    in_a_row: int = 10
    """Steps after those, with no waiting for the device between them; 0: none. A CPU has none:
    there a step has ended when its call returns."""
    print_interval: int = 1
    attn_impl: str = "sdpa"
    profile: bool = False
    profile_dir: str = "profiles"
    result_dir: str = ""
    """Where rows are written; empty: profile_dir."""
    eval: bool = False
    deterministic: bool = False
    save_weights: bool = False
    load_weights: bool = False
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Merged into our engine's configuration."""
    timeout: float = 1800.0
    """Seconds after which a collective that cannot complete is an error."""
    dataset_problem: str = ""
    """Why dataset_name cannot be read, where a sweep knows it: ranks then do not try again."""

    def __post_init__(self) -> None:
        if self.warmup_step < 0 or self.bench_step <= self.warmup_step:
            raise UserError(
                f"[bench] bench_step {self.bench_step}: must be above warmup_step "
                f"{self.warmup_step}, as the warm-up is a part of it. Raise it."
            )
        if self.profile and not self.warmup_step:
            raise UserError(
                "[bench] profile: the last steps of the warm-up are traced, and warmup_step is 0. "
                "Raise it."
            )
        for name in ("learning_rate", "max_grad_norm", "in_a_row"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(
                    f"[bench] {name} {getattr(self, name)}: must not be negative, nor infinite."
                )
        for name in ("num_epochs", "print_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"[bench] {name} {getattr(self, name)}: must be at least 1.")

    @property
    def results(self) -> str:
        return self.result_dir or self.profile_dir

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"engine": dict(self.engine)}

    def recorded(self, condition: Condition) -> dict[str, Any]:
        """What a condition's row keeps of them, in JSON's types."""
        kept = {name: self.as_dict()[name] for name in MEASURED}
        if not condition.has_engine:
            kept["engine"] = {}  # which changes nothing for it
        return json.loads(json.dumps(kept))

    def differences(self, kept: Mapping[str, Any] | None, condition: Condition) -> list[str]:
        """In what a row was measured otherwise than is asked now, in words. None at all of rows
        without options, which older versions wrote."""
        if kept is None:
            return []
        return [
            f"{name} {json.dumps(kept.get(name))}, now {json.dumps(wanted)}"
            for name, wanted in self.recorded(condition).items()
            if kept.get(name) != wanted and (wanted or name not in MORE)
        ]

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Options:
        known = {f.name for f in dataclasses.fields(Options)}
        for name in data:
            if name not in known:
                raise UserError(f"[bench] options: unknown field {name!r}. Take it out.")
        return Options(**data)


def merge(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `more`, section by section."""
    merged = dict(base)
    for key, value in more.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def engine_settings(text: str) -> dict[str, Any]:
    """The object in a JSON text or file."""
    try:
        if not text.lstrip().startswith("{"):
            with open(text, encoding="utf-8") as file:
                text = file.read()
        value = json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"[bench] engine_config: {error}. Give JSON, or a file of it.") from None
    if not isinstance(value, dict):
        raise UserError("[bench] engine_config: is no JSON object. Give one.")
    return value
