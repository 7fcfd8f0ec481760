# SPDX-License-Identifier: Apache-2.0
"""initialize(): from a model and a configuration to an engine. GatheredParameters beside it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from . import cuda_graphs, engine_state, foreign
from . import optimizer as optimizers
from .config import Config, ConfigWarning, load_config
from .distributed import Ranks, join
from .engine import Engine
from .errors import UserError
from .fast_forms import FastForms
from .links import named_machine
from .lr_schedules import build_scheduler
from .optimizer import ShardedOptimizer
from .params import DTYPES, MemberRef, ParamTable, has_no_memory
from .placement import Arrival

LOCAL_SETTINGS = (
    "cache_dir", "debug_log", "machine", "plan_cache", "steps_per_print", "wall_clock_breakdown",
    "warnings",
)  # fmt: skip
"""Keys of the configuration that ranks may have each their own of."""


def initialize(
    model: nn.Module | None = None,
    config: str | Path | dict[str, Any] | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    collate_fn: Callable[[list], Any] | None = None,
    dist_init_required: bool | None = None,
    device: torch.device | str | None = None,
    **others: Any,
) -> tuple[Engine, ShardedOptimizer, Any, Any]:
    """(engine, optimizer, dataloader, lr_scheduler) for training `model`; collective.

    `config`: a DeepSpeed-style JSON file or dict (docs/config.md). `optimizer`: a
    torch Adam or AdamW, or a function from parameters to one; default: the
    configuration's. `model_parameters`: parameters or groups for the
    configuration's optimizer or the function; default: the trainable ones.
    `training_data`: a dataset, of which this rank gets its part in micro-batches.
    `lr_scheduler`: a torch scheduler, or a function from optimizer to one;
    default: the configuration's. `device`: default: this rank's GPU, or the CPU.
    `others`: DeepSpeed's arguments that are not here, each an error that says why.

    The model's parameters keep their identity and shape; their values move into
    the engine's shards, one after another: rank 0's, wherever they are. Parameters
    on the meta device are replaced, and initialised by their modules unless they
    are real on rank 0.
    """
    foreign.check_initialize(others)
    _check_given(model, config)
    settings = load_config(config)
    named_machine(settings)  # a name that does not exist is an error now, not in the report
    ranks = join(
        dist_init_required,
        settings.compile.timeout_s,
        None if device is None else torch.device(device),
    )
    settings = settings.with_batch(ranks.world)
    _check_parameters(model)
    arrival = Arrival(model, ranks, DTYPES.get(settings.compute_dtype))
    source = _source_optimizer(model, settings, optimizer, model_parameters)
    optimizers.check_supported(source)
    given = {"optimizer": optimizer, "scheduler": lr_scheduler}
    _check_alike(ranks, settings, source, given)
    table = ParamTable.build(
        model,
        stage=settings.stage,
        persistence_threshold=settings.zero_optimization.stage3_param_persistence_threshold,
        anywhere=True,
    )
    settings = _for_types(table, settings)
    forms = FastForms(model, settings.compile, ranks.device)
    runtime = _runtime(settings, ranks)
    arrival.into(table, lambda index: _add_param(runtime, table, index), source)
    engine = Engine(model, settings, ranks, table, runtime, source, forms)
    engine.lr_scheduler = _scheduler(engine.optimizer, settings, lr_scheduler)
    engine_state.check_schedule(engine.lr_scheduler)
    if training_data is not None:
        engine.training_dataloader = _dataloader(training_data, settings, ranks, collate_fn)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _check_given(model: Any, config: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(
            f"[initialize] model: must be a torch.nn.Module, not {type(model).__name__}; it is "
            "the first argument, and config the second"
        )
    if config is None:
        raise UserError("[initialize] config: give a JSON file's path or a dict")


def _check_alike(
    ranks: Ranks, settings: Config, source: torch.optim.Optimizer, given: dict[str, Any]
) -> None:
    """UserError, on every rank, if another has other settings: it would train something else, or
    wait for what does not come. `given`: sections, and arguments in their place if not None."""
    unused = [section for section, argument in given.items() if argument is not None]
    mine: dict[tuple[str, Any], Any] = {
        ("param_groups", index): f"{len(group['params'])} parameters, {optimizers.numbers(group)}"
        for index, group in enumerate(source.param_groups)
    }
    for section, value in dataclasses.asdict(settings).items():
        if section not in (*LOCAL_SETTINGS, *unused):
            keys = value.items() if isinstance(value, dict) else [(None, value)]
            mine |= {(section, key): each for key, each in keys if key not in LOCAL_SETTINGS}
    for rank, theirs in enumerate(ranks.gather(mine, "initialize()")):
        for section, key in {**mine, **theirs}:
            here, there = (each.get((section, key), "absent") for each in (mine, theirs))
            if here != there:
                raise UserError(
                    f"[config] {section}{'' if key is None else f'.{key}'}: is {there!r} on rank "
                    f"{rank} and {here!r} on rank {ranks.rank}; give all ranks the same"
                )


def _check_parameters(model: nn.Module) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            f"[initialize] {type(model).__name__}: has no parameter that requires a gradient; "
            "call requires_grad_() on what should be trained"
        )
    for name, parameter in model.named_parameters():
        if has_no_memory(parameter):
            raise UserError(
                f"[initialize] {name}: has no memory, as another engine shards it; build the model "
                "anew, or go on with that engine"
            )


def _for_types(table: ParamTable, settings: Config) -> Config:
    """The settings for the types of what is trained: f64 gradients are not rounded to f32 on their
    way, unless that is asked for."""
    trained = {spec.dtype: spec.name for spec in table.params if spec.trainable}
    if torch.float16 in trained and not settings.fp16.enabled:
        _warn(
            f"fp16: is not enabled, and parameters such as {trained[torch.float16]} are in "
            "float16, so that their loss is not scaled; enable it, or bf16"
        )
    asked = settings.communication_data_type or settings.compute_dtype
    if torch.float64 not in trained or asked:
        return settings
    return dataclasses.replace(settings, communication_data_type="fp64")


def _runtime(config: Config, ranks: Ranks) -> Any:
    """A runtime without parameters."""
    from . import _runtime as native

    return native.Runtime(
        process_group=ranks.group if ranks.world > 1 else None,
        rank=ranks.rank,
        world=ranks.world,
        device=ranks.device,
        reduce_dtype=config.reduce_dtype,
        clip=config.gradient_clipping,
        accumulation=config.gradient_accumulation_steps,
        timeout_s=config.compile.timeout_s,
        gather=config.compile.gather,
        reduce=config.compile.reduce,
        recorder=cuda_graphs.recorder(config.compile.cuda_graphs, ranks.device),
        no_recorder=cuda_graphs.why_not(config.compile.cuda_graphs, ranks.device),
    )


def _add_param(runtime: Any, table: ParamTable, index: int) -> None:
    """Let the runtime hold a param of the table; it takes the parameters' memory."""
    spec = table.params[index]
    members = [
        (member.name, table.tensor(MemberRef(index, at)), member.offset)
        for at, member in enumerate(spec.members)
    ]
    runtime.add_param(spec.name, members, spec.numel, spec.placement, spec.trainable)


def _source_optimizer(
    model: nn.Module, config: Config, optimizer: Any, model_parameters: Any
) -> torch.optim.Optimizer:
    """The torch optimizer whose groups and numbers are used."""
    groups = optimizers.trainable_groups(model, model_parameters)
    if optimizer is None:
        return optimizers.from_config(config.optimizer, groups)
    if config.optimizer is not None:
        _warn("optimizer: has no effect, as initialize() was given one")
    if isinstance(optimizer, torch.optim.Optimizer):
        if model_parameters is not None:
            _warn("model_parameters: have no effect, as the optimizer has groups", "initialize")
        return optimizer
    if not callable(optimizer):
        raise UserError(
            f"[optimizer] {type(optimizer).__name__}: pass a torch Adam or AdamW, or a function "
            "from parameters to one"
        )
    return optimizer(groups)


def _warn(message: str, stage: str = "config") -> None:
    warnings.warn(f"[{stage}] {message}", ConfigWarning, stacklevel=4)


def _scheduler(optimizer: ShardedOptimizer, config: Config, given: Any) -> Any:
    if given is None:
        return None if config.scheduler is None else build_scheduler(optimizer, config.scheduler)
    if config.scheduler is not None:
        _warn("scheduler: has no effect, as initialize() was given one")
    if isinstance(given, type) or (callable(given) and not hasattr(given, "step")):
        given = given(optimizer)
    if isinstance(given, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise UserError(
            "[initialize] lr_scheduler: ReduceLROnPlateau needs a metric, which the engine does "
            "not have; make it on the returned optimizer and step it yourself"
        )
    if hasattr(given, "step"):
        return given
    raise UserError(
        f"[initialize] lr_scheduler: {type(given).__name__} is neither a scheduler nor a function "
        "from optimizer to one"
    )


def _dataloader(dataset: Any, config: Config, ranks: Ranks, collate_fn: Any) -> Any:
    """A loader of this rank's micro-batches."""
    from torch.utils.data import DataLoader, IterableDataset
    from torch.utils.data.distributed import DistributedSampler

    class _EpochSampler(DistributedSampler):
        """Each pass over the data has an order of its own, the same on every rank."""

        def __iter__(self) -> Iterator[int]:
            order = super().__iter__()
            self.set_epoch(self.epoch + 1)
            return order

    sampler = None
    if isinstance(dataset, IterableDataset):
        if ranks.world > 1:
            raise UserError(
                "[initialize] training_data: an IterableDataset has no items by number to deal out "
                "to ranks, and all would train on the same. Let it hand out each rank's own part, "
                "and give it to a DataLoader of your own"
            )
    else:
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise UserError(
                f"[initialize] training_data: {type(dataset).__name__} is no dataset with a length "
                "and items by number; a DataLoader of your own needs no initialize()"
            )
        sampler = _EpochSampler(
            dataset, ranks.world, ranks.rank, drop_last=config.dataloader_drop_last
        )
    return DataLoader(
        dataset,
        batch_size=config.train_micro_batch_size_per_gpu,
        sampler=sampler,
        collate_fn=collate_fn,
        drop_last=config.dataloader_drop_last,
        pin_memory=ranks.device.type == "cuda",
    )


class GatheredParameters:
    """Parameters whole inside a with statement; collective.

    `parameters`: one parameter or several, of `engine`. With `modifier_rank`, that
    rank's values at the end become every rank's (and the optimizer's). Without it
    they are there to be read: the end is an error if one was written to in place.
    """

    def __init__(
        self,
        engine: Engine,
        parameters: nn.Parameter | Iterable[nn.Parameter] = (),
        modifier_rank: int | None = None,
        enabled: bool = True,
    ):
        if not isinstance(engine, Engine):
            raise UserError(
                "[engine] GatheredParameters: the engine comes first: "
                "GatheredParameters(engine, parameters)"
            )
        if isinstance(parameters, nn.Parameter):
            parameters = [parameters]
        self._engine = engine
        self._modifier = modifier_rank
        self._enabled = enabled
        self._names: dict[str, list[nn.Parameter]] = {}
        for parameter in parameters:
            ref = engine.table.lookup(parameter)
            if ref is None:
                raise UserError(
                    f"[engine] GatheredParameters: a tensor of shape {tuple(parameter.shape)} is "
                    "no parameter of this engine"
                )
            self._names.setdefault(engine.table.spec(ref).name, []).append(parameter)

    def __enter__(self) -> GatheredParameters:
        if self._enabled:
            self._engine.planner.settle()
            self._engine.hooks.hold(list(self._names))
            self._versions = self._versions_now()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._enabled:
            return
        names = list(self._names)
        try:
            if self._modifier is not None and kind is None:
                self._store(names, self._modifier)
        finally:
            self._engine.hooks.let_go(names)
        if self._modifier is None and kind is None:
            self._check_unchanged()

    def _versions_now(self) -> dict[nn.Parameter, int]:
        return {p: p._version for members in self._names.values() for p in members}

    def _check_unchanged(self) -> None:
        for parameter, version in self._versions_now().items():
            if version == self._versions[parameter]:
                continue
            name = self._engine.table.member(self._engine.table.lookup(parameter)).name
            if self._engine.runtime.is_written(name):  # else by step(), or with a modifier
                raise UserError(
                    f"[engine] GatheredParameters: {name} was written to without a modifier_rank, "
                    "which says whose values count, and is lost in whole or in part; give "
                    "modifier_rank=0"
                )

    def _store(self, names: list[str], rank: int) -> None:
        gone = [name for name in names if not self._engine.runtime.is_whole(name)]
        if gone:
            raise UserError(
                f"[engine] GatheredParameters: {gone[0]} was released inside, with what was "
                "written to it. Call a compiled model or step() outside of the with statement."
            )
        for name in names:
            for parameter in self._names[name]:
                self._engine.ranks.broadcast_tensor(parameter.data, rank)
        self._engine.runtime.store(names)
