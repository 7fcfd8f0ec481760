# SPDX-License-Identifier: Apache-2.0
"""The optimizer that initialize() returns: torch's interface, the runtime's Adam.

Its param_groups hold the numbers (lr, betas, eps, weight_decay) that schedulers
and users change; step() sends what changed to the runtime and runs the update
there, on each rank's shards. It holds no states: checkpoints read them from
the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .checkpoint_values import plain
from .config import OptimizerConfig
from .errors import UserError
from .params import ParamTable

_UNSUPPORTED = ("amsgrad", "maximize", "differentiable")


def _fail(what: str, cause: str) -> UserError:
    return UserError(f"[optimizer] {what}: {cause}")


def from_config(config: OptimizerConfig | None, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """A torch Adam or AdamW that carries the configuration's numbers and parameter groups.

    Defaults are DeepSpeed's: lr 1e-3, no weight decay, decoupled weight decay.
    """
    if config is None:
        raise _fail(
            "none given", 'pass optimizer= to initialize() or add an "optimizer" section to the '
            'configuration, e.g. {"type": "AdamW", "params": {"lr": 1e-4}}',
        )  # fmt: skip
    params = config.params
    decoupled = config.type == "AdamW" or bool(params.get("adam_w_mode", True))
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    try:
        return kind(
            parameters,
            lr=params.get("lr", 1e-3),
            betas=tuple(params.get("betas", (0.9, 0.999))),
            eps=params.get("eps", 1e-8),
            weight_decay=params.get("weight_decay", 0.0),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"[config] optimizer.params: {error}") from None


def _is_decoupled(source: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    return group.get("decoupled_weight_decay", isinstance(source, torch.optim.AdamW))


def check_supported(source: Any) -> None:
    """UserError unless `source` is a fresh torch Adam or AdamW."""
    if type(source) not in (torch.optim.Adam, torch.optim.AdamW):
        raise _fail(
            f"{type(source).__module__}.{type(source).__name__}",
            "is not available; pass torch.optim.AdamW or torch.optim.Adam",
        )
    for group in source.param_groups:
        check_group(source, group)
    if any(state for state in source.state.values()):
        raise _fail(
            type(source).__name__,
            "has taken steps already; pass it to initialize() before the first",
        )


def check_group(source: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """UserError if a parameter group of `source` asks for what the runtime does not have."""
    for name in _UNSUPPORTED:
        if group.get(name):
            raise _fail(f"{type(source).__name__}({name}=True)", "is not supported; remove it")
    if len(group["betas"]) != 2:  # torch reads two and keeps the others
        raise _fail(f"{type(source).__name__}(betas={group['betas']})", "give two: (0.9, 0.999)")


def numbers(group: dict[str, Any]) -> tuple[float, ...]:
    """(lr, beta1, beta2, eps, weight_decay) of a parameter group."""
    beta1, beta2 = group["betas"]
    return (
        float(group["lr"]), float(beta1), float(beta2), float(group["eps"]),
        float(group["weight_decay"]),
    )  # fmt: skip


class ShardedOptimizer(torch.optim.Optimizer):
    """Adam or AdamW on the runtime's shards, driven by torch parameter groups.

    `source`: a torch Adam or AdamW. Its param_groups list is shared, so that a
    scheduler built on it keeps working. `member_of`: the runtime's name of each
    parameter, by id. `update`: runs the runtime's update, returns its result.
    """

    def __init__(
        self,
        source: torch.optim.Optimizer,
        member_of: dict[int, str],
        set_hyper: Callable[..., None],
        update: Callable[[], dict[str, Any]],
        clear: Callable[[], None],
    ):
        check_supported(source)
        self._ready = self._asked = False
        super().__init__(
            [{"params": list(group["params"])} for group in source.param_groups], source.defaults
        )
        self.param_groups = source.param_groups
        self._source = source
        self._member_of = member_of
        self._set_hyper = set_hyper
        self._update = update
        self._clear = clear
        self._sent: dict[int, tuple] = {}
        """By group: what the runtime has."""
        self._check_members()
        self._ready = True
        self.push()

    def _check_members(self) -> None:
        covered: set[str] = set()
        for index, group in enumerate(self.param_groups):
            for param in group["params"]:
                name = self._member_of.get(id(param))
                if name is None:
                    raise _fail(
                        f"parameter group {index}",
                        f"holds a tensor of shape {tuple(param.shape)} that is no parameter of "
                        "the model; build the optimizer from model.parameters()",
                    )
                covered.add(name)
        self._covered = frozenset(covered)

    def check_covers(self, table: ParamTable) -> None:
        """UserError unless each parameter of the table that is trained is in a group."""
        for ref in table.refs():
            name = table.member(ref).name
            if table.spec(ref).trainable and name not in self._covered:
                raise _fail(
                    name,
                    "requires a gradient but is in no parameter group; add it, or call "
                    "requires_grad_(False) on it before initialize()",
                )

    def push(self) -> None:
        """Send the numbers of groups that changed to the runtime."""
        for index, group in enumerate(self.param_groups):
            check_group(self._source, group)
            sent = (*numbers(group), _is_decoupled(self._source, group))
            if self._sent.get(index) == sent:
                continue
            for param in group["params"]:
                if id(param) not in self._member_of:
                    raise _fail(f"parameter group {index}", "was added after initialize(); pass "
                                "all of them there")  # fmt: skip
                self._set_hyper(self._member_of[id(param)], *sent)
            self._sent[index] = sent

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> dict[str, Any]:
        """What engine.step() calls: an error elsewhere, as it knows no micro-batches."""
        if closure is not None or not self._asked:
            raise _fail("step", "call engine.step(), after each engine.backward(loss)")
        self.push()
        self._source._opt_called = True  # what torch's schedulers look at
        return self._update()

    def step_of_engine(self) -> dict[str, Any]:
        """Update all shards from the accumulated gradients; returns the runtime's result:
        {"grad_norm": float, 0-dim tensor or None, "skipped": bool}."""
        self._asked = True
        try:
            return self.step()
        finally:
            self._asked = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients accumulated so far."""
        self._clear()
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if getattr(self, "_ready", False):
            raise _fail(
                "add_param_group", "groups are fixed by initialize(); pass all of them there"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """An error: torch's would leave the states out, which are sharded."""
        raise _fail(
            "state_dict", "its states are the engine's shards; call engine.save_checkpoint()"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise _fail(
            "load_state_dict", "its states are the engine's shards; call engine.load_checkpoint()"
        )

    def hyper_state(self) -> list[dict[str, Any]]:
        """Each group's numbers and its members' names: what a checkpoint keeps."""
        kept = []
        for group in self.param_groups:
            numbers = plain({k: v for k, v in group.items() if k != "params"})
            if torch.is_tensor(numbers.get("lr")):
                numbers["lr"] = float(numbers["lr"])
            kept.append({**numbers, "names": [self._member_of[id(p)] for p in group["params"]]})
        return kept

    def check_groups(self, groups: list[dict[str, Any]]) -> None:
        """Raises UserError unless a checkpoint's groups hold the same parameters as these."""
        mine = [g["names"] for g in self.hyper_state()]
        if mine != [g["names"] for g in groups]:
            raise UserError(
                "[checkpoint] optimizer: its parameter groups differ from this job's; build the "
                "same groups, or load with load_optimizer_states=False"
            )

    def load_hyper_state(self, groups: list[dict[str, Any]]) -> None:
        """Put a checkpoint's numbers back, once check_groups has passed."""
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({k: v for k, v in saved.items() if k != "names"})
        self._sent.clear()
        self.push()


def trainable_groups(model: nn.Module, model_parameters: Any) -> list[Any]:
    """`model_parameters` as a list, or the model's trainable parameters."""
    if model_parameters is None:
        return [p for p in model.parameters() if p.requires_grad]
    groups = list(model_parameters)
    if groups and isinstance(groups[0], tuple):  # named_parameters()
        groups = [parameter for _, parameter in groups]
    return groups
