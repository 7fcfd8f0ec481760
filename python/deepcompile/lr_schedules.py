# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules of a DeepSpeed configuration, as torch schedulers.

`t` is the number of optimizer steps taken, less one: -1 before the first.
The schedules are functions of `t` and agree with DeepSpeed's of the same name;
being LRScheduler subclasses they also work on any torch optimizer. Names of
torch.optim.lr_scheduler classes are accepted beside them.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from . import config_keys
from .config import SchedulerConfig
from .config_values import as_number, as_whole, boolean, fail, text
from .errors import UserError, meant


def _per_group(optimizer: torch.optim.Optimizer, name: str, value: float | list[float]) -> list:
    count = len(optimizer.param_groups)
    if isinstance(value, list | tuple):
        if len(value) != count:
            raise UserError(
                f"[lr_schedules] {name}: {len(value)} values for {count} parameter groups; "
                "give one number or one a group"
            )
        return list(value)
    return [value] * count


class _Schedule(LRScheduler):
    """An LRScheduler whose t lags one behind torch's step counter, as DeepSpeed's do."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        super().__init__(optimizer)

    @property
    def t(self) -> int:
        """Steps taken less one; -1 at construction."""
        return self.last_epoch - 1

    def rates(self) -> list[float]:
        """Learning rate of each group at t."""
        raise NotImplementedError

    def get_lr(self) -> list[float]:
        return self.rates()


def _check_warmup(name: str, steps: Any, kind: Any) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise UserError(f"[lr_schedules] {name}: warmup_num_steps must be a whole number, at least "
                        f"0, not {steps!r}")  # fmt: skip
    if kind not in ("log", "linear"):
        raise UserError(f"[lr_schedules] {name}: warmup_type must be log or linear, not {kind!r}")


def _check_total(name: str, total: Any, warmup: int) -> None:
    if isinstance(total, bool) or not isinstance(total, int) or total <= 0:
        raise UserError(f"[lr_schedules] {name}: total_num_steps must be a positive whole number, "
                        f"not {total!r}")  # fmt: skip
    if total < warmup:
        warnings.warn(
            f"[lr_schedules] {name}: total_num_steps {total} is over before the warm-up of "
            f"warmup_num_steps {warmup}, so the rate never gets to its highest; set "
            "warmup_num_steps below it",
            stacklevel=4,
        )


def _warmup(t: int, steps: int, kind: str) -> float:
    """Fraction of the warm-up done at t, 0 to 1. `steps` is at least 2."""
    return math.log(t + 1) / math.log(steps) if kind == "log" else t / steps


class WarmupLR(_Schedule):
    """From warmup_min_lr to warmup_max_lr in warmup_num_steps, constant after."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_min_lr: float | list[float] = 0.0,
        warmup_max_lr: float | list[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
    ):
        _check_warmup(type(self).__name__, warmup_num_steps, warmup_type)
        if warmup_max_lr is None:
            warmup_max_lr = optimizer.param_groups[0]["lr"]
        self.low = _per_group(optimizer, "warmup_min_lr", warmup_min_lr)
        self.high = _per_group(optimizer, "warmup_max_lr", warmup_max_lr)
        self.steps = max(2, warmup_num_steps)
        self.kind = warmup_type
        super().__init__(optimizer)

    def factor(self) -> float:
        """Where between low and high the rate is at t."""
        return _warmup(self.t, self.steps, self.kind) if self.t < self.steps else 1.0

    def rates(self) -> list[float]:
        if self.t < 0:
            return list(self.low)
        factor = self.factor()
        return [a + (b - a) * factor for a, b in zip(self.low, self.high, strict=True)]


class WarmupDecayLR(WarmupLR):
    """WarmupLR, then down linearly to warmup_min_lr at total_num_steps."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: int,
        warmup_min_lr: float | list[float] = 0.0,
        warmup_max_lr: float | list[float] = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
    ):
        _check_warmup(type(self).__name__, warmup_num_steps, warmup_type)
        _check_total(type(self).__name__, total_num_steps, warmup_num_steps)
        self.total = total_num_steps
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type)

    def factor(self) -> float:
        if self.t < self.steps:
            return super().factor()
        return max(0.0, (self.total - self.t) / max(1, self.total - self.steps))


class WarmupCosineLR(_Schedule):
    """Fractions of the optimizer's own rate: up in warmup_num_steps, then a half cosine."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
    ):
        _check_warmup("WarmupCosineLR", warmup_num_steps, warmup_type)
        _check_total("WarmupCosineLR", total_num_steps, warmup_num_steps)
        self.total = total_num_steps
        self.steps = max(2, warmup_num_steps)
        self.kind = warmup_type
        self.start, self.end = warmup_min_ratio, cos_min_ratio
        super().__init__(optimizer)

    def rates(self) -> list[float]:
        if self.t < 0:
            ratio = 0.0
        elif self.t < self.steps:
            ratio = self.start + (1 - self.start) * _warmup(self.t, self.steps, self.kind)
        else:
            progress = (self.t - self.steps + 1) / max(1, self.total - self.steps)
            cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
            ratio = max(0.0, self.end + (1 - self.end) * cosine)
        return [base * ratio for base in self.base_lrs]


class OneCycle(_Schedule):
    """Up from cycle_min_lr to cycle_max_lr and back, then decay; betas[0] goes the other way."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        cycle_min_lr: float,
        cycle_max_lr: float,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float = 0.8,
        cycle_max_mom: float = 0.9,
        decay_mom_rate: float = 0.0,
    ):
        second = cycle_second_step_size
        self.first = cycle_first_step_size
        self.second = cycle_first_step_size if second is None else second
        if self.first <= 0 or self.second <= 0:
            raise UserError("[lr_schedules] OneCycle: cycle step sizes must be positive")
        rising, falling = cycle_first_stair_count, cycle_second_stair_count
        self.stairs = (rising, rising if falling is None else falling)
        self.lr = (cycle_min_lr, cycle_max_lr)
        self.mom = (cycle_min_mom, cycle_max_mom)
        self.decay_step = decay_step_size
        self.decay = (decay_lr_rate, decay_mom_rate) if decay_step_size else (0.0, 0.0)
        self.cycle_momentum = cycle_momentum and "betas" in optimizer.defaults
        super().__init__(optimizer)

    def _height(self) -> float:
        """0 at the ends of the cycle, 1 at its peak."""
        total = self.first + self.second
        at = (self.t + 1) % total
        rising = at <= self.first
        length, stairs = (self.first, self.stairs[0]) if rising else (self.second, self.stairs[1])
        part = at if rising else total - at
        return math.floor(part * stairs / length) / stairs if stairs > 0 else part / length

    def rates(self) -> list[float]:
        total = self.first + self.second
        if self.t < 0:
            lr, momentum = self.lr[0], self.mom[0]
        elif self.t < total:
            height = self._height()
            lr = self.lr[0] + (self.lr[1] - self.lr[0]) * height
            momentum = self.mom[1] - (self.mom[1] - self.mom[0]) * height
        else:
            decayed = (self.t - total + 1) / self.decay_step if self.decay_step else 0.0
            lr = self.lr[0] / (1 + self.decay[0] * decayed)
            momentum = self.mom[1] * (1 + self.decay[1] * decayed)
        if self.cycle_momentum:
            for group in self.optimizer.param_groups:
                group["betas"] = (momentum, 0.99)
        return [lr] * len(self.optimizer.param_groups)


OURS = {cls.__name__: cls for cls in (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle)}


def _torch_schedules() -> dict[str, type]:
    """Schedules of torch that need nothing but numbers."""
    names = ("ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR",
             "ExponentialLR", "LinearLR", "MultiStepLR", "OneCycleLR", "PolynomialLR",
             "StepLR")  # fmt: skip
    return {name: getattr(torch.optim.lr_scheduler, name) for name in names}


def _checked(where: str, value: Any, annotation: str) -> Any:
    """A value as a parameter with that annotation takes it; else it would fail at some step."""
    kinds = set(re.findall(r"\w+", annotation))
    if "Callable" in kinds:
        return value
    if isinstance(value, list | tuple) and kinds & {"list", "Iterable"}:
        rule = as_number if "float" in kinds else as_whole
        return [rule(where, each) for each in value]
    if "Iterable" in kinds:
        raise fail(where, f"must be a list, not {value!r}")
    if kinds & {"str", "Literal"}:
        return text(where, value)
    rules = {"bool": boolean, "float": as_number, "int": as_whole}
    return next((rules[name](where, value) for name in rules if name in kinds), value)


def _arguments(config: SchedulerConfig) -> tuple[type[LRScheduler], dict[str, Any]]:
    """The class that a `scheduler` section names, and its keyword arguments."""
    kinds = {**OURS, **_torch_schedules()}
    kind = kinds.get(config.type)
    if kind is None:
        raise UserError(
            f"[config] scheduler.type: {config.type!r} is not available"
            f"{meant(config.type, kinds) or ';'} use one of {', '.join(kinds)}, or pass "
            "lr_scheduler= to initialize()"
        )
    accepted = dict(list(inspect.signature(kind).parameters.items())[1:])
    given, begun = {}, config_keys.REFUSED["scheduler.params"]
    for key, value in config.params.items():
        where = f"scheduler.params.{key}"
        if key in begun:
            off, remedy = begun[key]
            if not config_keys.is_off(value, off):
                raise fail(where, f"{value!r} is not supported: {remedy}")
            continue
        if key not in accepted:
            raise fail(where, f"{config.type} takes {', '.join(accepted)}{meant(key, accepted)}")
        if value == "auto":
            raise fail(where, '"auto" is for trainers that fill it in; give a value')
        if value is not None:  # null means the default
            given[key] = _checked(where, value, str(accepted[key].annotation))
    return kind, given


def check_scheduler(config: SchedulerConfig) -> None:
    """UserError for a section that no Adam of as many groups as it has values could take."""
    _, given = _arguments(config)
    lists = [v for key, v in given.items() if isinstance(v, list) and key != "milestones"]
    groups = max([len(each) for each in lists], default=1)
    stand_in = torch.optim.AdamW([{"params": [torch.zeros(1)]} for _ in range(groups)], lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # build_scheduler says it
        build_scheduler(stand_in, config)


def build_scheduler(optimizer: torch.optim.Optimizer, config: SchedulerConfig) -> LRScheduler:
    """The schedule that the configuration's `scheduler` section names, on `optimizer`."""
    kind, given = _arguments(config)
    try:
        return kind(optimizer, **given)
    except (TypeError, ValueError) as error:
        raise UserError(f"[config] scheduler.params: {config.type}: {error}") from None
