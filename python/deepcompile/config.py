# SPDX-License-Identifier: Apache-2.0
"""The engine's configuration: DeepSpeed's JSON, checked key by key.

load_config() turns a path or a dict into a Config: one frozen dataclass a
section, each default beside its meaning. A key is supported (a field below),
warned about or refused (config_keys.py), or unknown, which is an error with
the nearest known name. Nothing is ignored silently.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import _core, config_keys
from . import config_values as check
from .config_values import fail
from .errors import UserError, meant

DTYPES = {
    "fp32": "f32", "fp16": "f16", "bf16": "bf16", "fp64": "f64",
    "float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64",
}  # fmt: skip


class ConfigWarning(UserWarning):
    """What a configuration has that will hardly be meant: a known key without effect, for one."""


def _key(rule: Callable[[str, Any], Any], default: Any = None, **kwargs: Any) -> Any:
    if "default_factory" not in kwargs:
        kwargs["default"] = default
    return field(metadata={"check": rule}, **kwargs)


_positive = check.number(int, 1)
_count = check.number(int, 0)


@dataclass(frozen=True)
class Bf16Config:
    enabled: bool = _key(check.switch, False)
    """Parameters, activations and gradients in bfloat16; master weights and states in fp32. The
    section may also be called `bfloat16`."""


@dataclass(frozen=True)
class Fp16Config:
    enabled: bool = _key(check.switch, False)
    """Parameters, activations and gradients in float16; master weights and states in fp32. The loss
    is scaled, and a step whose gradients are not finite is left out on all ranks: each step() waits
    for the device to know. Where the device has bfloat16, `bf16` needs none of this."""
    loss_scale: float = _key(check.number(float, 0), 0.0)
    """The factor on the loss; 0: it follows the gradients, from these numbers."""
    initial_scale_power: int = _key(_count, 16)
    """The first factor is 2 to this power."""
    loss_scale_window: int = _key(_positive, 1000)
    """After so many steps in a row with finite gradients the factor is doubled."""
    hysteresis: int = _key(_positive, 2)
    """It is halved at the n-th step without finite gradients, and then at each."""
    consecutive_hysteresis: bool = _key(check.boolean, False)
    """Whether that count begins anew with each finite step, or only when the factor is doubled."""
    min_loss_scale: float = _key(check.number(float, 0, False), 1.0)
    """Where it would have to be smaller than this, step() is an error: training has diverged."""


@dataclass(frozen=True)
class OptimizerConfig:
    type: str = _key(check.choice("Adam", "AdamW", any_case=True), "AdamW")
    """Adam is AdamW unless params.adam_w_mode is false, as in DeepSpeed."""
    params: dict = _key(check.adam_params, default_factory=dict)
    """lr (1e-3), betas, eps, weight_decay (0, as in DeepSpeed), adam_w_mode; a number may be text,
    as YAML gives 3e-4. initialize() may be given an optimizer instead of the section."""


@dataclass(frozen=True)
class SchedulerConfig:
    type: str = _key(check.text, "")
    """WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, or a torch.optim.lr_scheduler name."""
    params: dict = _key(check.table, default_factory=dict)
    """Keyword arguments of that schedule; a number may be text. warmup_num_steps is 1000 where it
    is not given: set it for shorter runs, whose rate would never be reached."""


@dataclass(frozen=True)
class LeafModuleConfig:
    classes: tuple[str, ...] = _key(check.texts, ("MultiheadAttention", "TransformerEncoderLayer"))
    """Class names of modules gathered with everything inside them, when not compiled: those
    that read a child's parameters without calling the child."""


@dataclass(frozen=True)
class ZeroConfig:
    stage: int = _key(check.stage, 0)
    """0: everything replicated. 1: optimizer states sharded, gradients reduced once a step.
    2: the same, gradients reduced and sharded in each micro-batch. 3: parameters sharded too."""
    stage3_param_persistence_threshold: int = _key(_count, 100_000)
    """Parameters with fewer elements stay whole on every rank, packed together."""
    leaf_module: LeafModuleConfig = _key(check.table, default_factory=LeafModuleConfig)


@dataclass(frozen=True)
class CompileConfig:
    deepcompile: bool = _key(check.boolean, True)
    """False: engine.compile() warns and leaves the engine in eager mode."""
    passes: tuple[str, ...] = _key(check.texts, ())
    """DeepSpeed's list. `z3` with stage 3 and `z1` with stages 1 and 2 are what runs anyway;
    others are errors."""
    checkpoint_marks: str = _key(check.choice("hint", "obey"), "hint")
    """What torch.utils.checkpoint in the model means. Hint: plans recompute what it covers first,
    and only as far as the budget asks. Obey: all of it is recomputed, whatever the memory."""
    schedule: Any = _key(check.schedule, "auto")
    """[[first step, [pass names]]]: what plans the step from which step on. `auto`: the stage's
    classical plan, and from step 3 on, 4 where steps run from CUDA graphs, the planner's, made from
    measured times and once more from those of a step that ran by it."""
    memory_budget: int | float | None = _key(check.memory, None)
    """What a plan may use of a rank's memory: bytes, `20GiB`, or a fraction of the device's. Less
    what the process holds outside the engine and, on a GPU, 3% for its allocator. Default: what is
    free when it is planned, and what the engine holds, less the reserve."""
    memory_reserve: float = _key(check.fraction, 0.1)
    """Part of the default budget that plans leave unused: for fragments, and what comes later."""
    plan_cache: str | None = _key(check.text, None)
    """Folder in which plans and measurements are kept, so that the next run of the same job
    starts with the good plan. Default: none are kept, and each run measures anew."""
    early_updates: bool = _key(check.boolean, False)
    """Plans may update parameters inside the last backward of a step: no gradient can be dropped
    or looked at between backward() and step()."""
    gather: str = _key(check.choice("nccl", "copy_engine", "auto"), "auto")
    """How sharded parameters are made whole. `nccl`: by the process group, whatever its backend.
    `copy_engine`: by the GPUs' copy engines, which take no multiprocessor from compute; all ranks
    on one host whose GPUs can access each other's memory. Auto: `copy_engine` where it works."""
    reduce: str = _key(check.choice("nccl", "copy_engine", "auto"), "auto")
    """How gradients are summed over ranks. `nccl`: by the process group, in the type of
    `communication_data_type`. `copy_engine`: pushed by the GPUs' copy engines, like gathers, into
    two pieces' worth of memory on each rank, and summed in f32. Auto: where it works."""
    embedding_rows: str = _key(check.choice("auto", "on", "off"), "auto")
    """Sharded embeddings that nothing else reads: gather and reduce only the rows that the ranks'
    micro batches use. Auto: those for which the simulator says that it pays, asked once, for the
    first training batch. On: all; an error where there is none. Off: whole embeddings. A row's
    gradients are summed in rank order and rounded once, whole ones as the transport does."""
    region_bytes: int = _key(_positive, 1 << 30)
    """Most bytes of parameters that one compiled region uses; one parameter may exceed it."""
    region_host: str = _key(check.choice("cpp", "python"), "python")
    """What launches the kernels of a compiled region: code that Inductor writes in Python, or in
    C++, which costs the host less a kernel and takes longer to compile."""
    cuda_graphs: str = _key(check.choice("auto", "on", "off"), "auto")
    """Record what compiled regions launch as CUDA graphs and launch these: the host then works for
    transfers and updates alone; the kernels are the same. Auto: on GPUs, where memory is not short
    and steps do the same again. On: as auto, and an error without a GPU."""
    differentiable_outputs: str = _key(check.choice("all", "loss"), "all")
    """Loss: only the output named loss is differentiated; the others are detached, so that no
    gradient as large as the logits is made for them."""
    loss_only: bool = _key(check.boolean, False)
    """True: a training forward with labels returns the loss alone; reading another output of it is
    an error. The logits are then no output, whose memory the caller holds. Evaluation returns
    all."""
    causal_attention: str = _key(check.choice("auto", "on", "off"), "auto")
    """Hugging Face models with sdpa attention. Auto: a batch of ids and labels alone makes no
    mask, so that flash attention runs; with an `attention_mask`, also one of ones, or positions
    the model's own mask is made. On: an error where that would not be so. Off: always the mask."""
    experts: str = _key(check.choice("auto", "model", "grouped_mm", "batched_mm"), "auto")
    """How Hugging Face mixtures of experts multiply in the compiled model. Auto: `grouped_mm` where
    the device has it and the experts are bf16, `batched_mm` otherwise; a `batched_mm` or kernel
    library that the model was given stays. Model: what the model was given."""
    equal_layers: str = _key(check.choice("auto", "on", "off"), "auto")
    """Trace four layers where all are alike, and repeat what comes of them: a deep model is then
    traced in the time of a shallow one. Auto: Hugging Face models whose layers are known not to
    depend on their number. On: any model with a list of equal layers; an error if it has none.
    Off: all layers are traced."""
    cache_dir: str | None = _key(check.text, None)
    """Where compiled regions are kept between runs. Default: Inductor's cache folder."""
    machine: str | None = _key(check.text, None)
    """What plans, the report and `embedding_rows` take what was not measured from: a built-in name
    or a JSON file. Default: `4xh200` on GPUs, as one host; set it where links differ."""
    timeout_s: float = _key(check.number(float, 0, False), 1800.0)
    """Seconds after which a collective that cannot complete is an error."""
    debug_log: bool = _key(check.boolean, False)
    """Log the text of each program that is planned, and why, to stderr."""


@dataclass(frozen=True)
class DataTypesConfig:
    grad_accum_dtype: str = _key(check.choice("fp32", "float32"), "fp32")
    """Gradients are accumulated over micro-batches in fp32."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Accepted so that DeepSpeed's files load; nothing in it is needed."""


@dataclass(frozen=True)
class Config:
    train_batch_size: int | None = _key(_positive, None)
    """Samples an optimizer step sees: micro-batch x accumulation x ranks."""
    train_micro_batch_size_per_gpu: int | None = _key(_positive, None)
    """Samples a rank sees in one forward."""
    gradient_accumulation_steps: int | None = _key(_positive, None)
    """Forward and backward passes before an optimizer step."""
    gradient_clipping: float = _key(check.number(float, 0), 0.0)
    """Largest global gradient norm; 0 switches clipping off: no norm is then computed, and
    engine.get_global_grad_norm() is None."""
    communication_data_type: str | None = _key(check.choice(*DTYPES), None)
    """Element type of gradient reductions. Default: what `bf16` or `fp16` says, else fp32, or fp64
    if the model trains parameters of that."""
    steps_per_print: int = _key(check.interval, 0)
    """Print step, loss and learning rate every so many steps; 0 or Infinity: never. The loss is
    that of rank 0's last micro-batch, not a mean over ranks or micro-batches."""
    wall_clock_breakdown: bool = _key(check.boolean, False)
    """Add the seconds spent in forward, backward and step to that line: each a sum over all
    micro-batches since the line before. The device is waited for around each, which slows
    steps."""
    dataloader_drop_last: bool = _key(check.boolean, False)
    """Drop the last incomplete batch of `training_data`."""
    zero_allow_untested_optimizer: bool = _key(check.boolean, False)
    """Accepted; Adam and AdamW are the only optimizers with or without it."""
    bf16: Bf16Config = _key(check.table, default_factory=Bf16Config)
    fp16: Fp16Config = _key(check.table, default_factory=Fp16Config)
    optimizer: OptimizerConfig | None = _key(check.table, None)
    scheduler: SchedulerConfig | None = _key(check.table, None)
    zero_optimization: ZeroConfig = _key(check.table, default_factory=ZeroConfig)
    compile: CompileConfig = _key(check.table, default_factory=CompileConfig)
    data_types: DataTypesConfig = _key(check.table, default_factory=DataTypesConfig)
    checkpoint: CheckpointConfig = _key(check.table, default_factory=CheckpointConfig)
    warnings: tuple[str, ...] = ()
    """Not a key: what was accepted without effect."""

    @property
    def stage(self) -> int:
        return self.zero_optimization.stage

    @property
    def reduce_dtype(self) -> str:
        """IR name of the element type of gradient reductions."""
        if self.communication_data_type is not None:
            return DTYPES[self.communication_data_type]
        return self.compute_dtype or "f32"

    @property
    def compute_dtype(self) -> str | None:
        """IR name of the element type that parameters are converted to; None: they keep theirs."""
        if self.fp16.enabled:
            return "f16"
        return "bf16" if self.bf16.enabled else None

    def with_batch(self, world: int) -> Config:
        """The same with the batch triple resolved for `world` ranks."""
        train, micro, accumulation = resolve_batch(
            self.train_batch_size,
            self.train_micro_batch_size_per_gpu,
            self.gradient_accumulation_steps,
            world,
        )
        return dataclasses.replace(
            self,
            train_batch_size=train,
            train_micro_batch_size_per_gpu=micro,
            gradient_accumulation_steps=accumulation,
        )


SECTIONS: dict[str, type] = {
    "bf16": Bf16Config,
    "fp16": Fp16Config,
    "optimizer": OptimizerConfig,
    "scheduler": SchedulerConfig,
    "zero_optimization": ZeroConfig,
    "compile": CompileConfig,
    "data_types": DataTypesConfig,
    "checkpoint": CheckpointConfig,
    "leaf_module": LeafModuleConfig,
}
ALIASES = {"": {"bfloat16": "bf16"}}


def supported_keys(section: str) -> dict[str, dataclasses.Field]:
    """The keys of a section ("" is the top level) that have an effect."""
    fields = dataclasses.fields(SECTIONS[section] if section else Config)
    return {f.name: f for f in fields if "check" in f.metadata}


def resolve_batch(
    train: int | None, micro: int | None, accumulation: int | None, world: int
) -> tuple[int, int, int]:
    """(train batch, micro-batch, accumulation steps) for `world` ranks, by DeepSpeed's rules.

    Any two fix the third; the train or micro-batch size alone means one
    accumulation step.
    """
    if train is None and micro is None:
        raise fail(
            "batch size",
            "give train_batch_size or train_micro_batch_size_per_gpu "
            "(two of them with gradient_accumulation_steps fix the third)",
        )
    given = (train, micro, accumulation)
    if train is None:
        accumulation = accumulation or 1
        train = micro * accumulation * world
    elif micro is None:
        accumulation = accumulation or 1
        micro = train // (world * accumulation)
    elif accumulation is None:
        accumulation = train // (micro * world)
    if min(micro, accumulation) < 1 or train != micro * accumulation * world:
        shown = [
            f"{name} {'(not given)' if value is None else value}"
            for name, value in zip(
                ("train_batch_size", "train_micro_batch_size_per_gpu",
                 "gradient_accumulation_steps"), given, strict=True,
            )
        ]  # fmt: skip
        raise fail(
            "batch size",
            f"{', '.join(shown)} do not fit {world} rank{'s' * (world != 1)}: train_batch_size "
            "must be micro-batch x accumulation x ranks. Change one of them or the number of ranks",
        )
    return train, micro, accumulation


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise fail(key, "appears twice in one object; keep one")
        table[key] = value
    return table


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON file's object, with errors that name file, line and column."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise fail(str(path), "no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise fail(str(path), f"cannot be read: {error}") from None
    return parse_json(text, str(path))


def parse_json(text: str, name: str) -> dict[str, Any]:
    """The object that a JSON text holds; errors call the text `name`."""
    try:
        table = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        place = f"{name}:{error.lineno}:{error.colno}"
        raise fail(place, f"not valid JSON: {error.msg}") from None
    if not isinstance(table, dict):
        raise fail(name, "must hold one JSON object")
    return table


def _unknown(where: str, key: str, known: list[str]) -> UserError:
    near = meant(key, known) or "; remove it (docs/config.md lists all keys)"
    return fail(where, f"unknown key{near}")


def _parse(section: str, table: dict[str, Any], prefix: str, found: list[str]) -> Any:
    """The section's dataclass from its JSON object; appends to `found` what is only warned."""
    kind = SECTIONS[section] if section else Config
    fields = supported_keys(section)
    warned = config_keys.WARNED.get(section, {})
    refused = config_keys.REFUSED.get(section, {})
    values: dict[str, Any] = {}
    alias = ALIASES.get(section, {})
    for given, value in table.items():
        key = alias.get(given, given)
        where = prefix + key
        if key in fields:
            if value is None:
                continue  # null means the default
            if key in values:
                both = [name for name in table if alias.get(name, name) == key]
                raise fail(where, f"is given twice, as {' and '.join(both)}; keep one")
            value = fields[key].metadata["check"](where, value)
            values[key] = _parse(key, value, where + ".", found) if key in SECTIONS else value
        elif key in warned:
            _note_warned(section, key, value, where, found)
        elif key in refused:
            _check_refused(section, key, value, where)
        else:
            raise _unknown(where, key, [*fields, *warned, *refused])
    return kind(**values)


def _note_warned(section: str, key: str, value: Any, where: str, found: list[str]) -> None:
    if not config_keys.says_nothing(section, key, value):
        found.append(f"[config] {where} has no effect: {config_keys.WARNED[section][key]}")


def _check_refused(section: str, key: str, value: Any, where: str) -> None:
    off, remedy = config_keys.REFUSED[section][key]
    if not config_keys.is_off(value, off):
        raise fail(where, f"{value!r} is not supported: {remedy}")


def _check_together(config: Config, found: list[str]) -> None:
    """Rules that need more than one key, and those of what a section's `params` hold; appends as
    _parse does."""
    for name in config.compile.passes:
        if config.stage not in {"z1": (1, 2), "z3": (3,)}.get(name, ()):
            raise fail(
                "compile.passes",
                f"{name!r} is not available with stage {config.stage}; see compile.schedule",
            )
    if config.optimizer is not None:
        _check_adam(config.optimizer.params, found)
    if config.wall_clock_breakdown and not config.steps_per_print:
        found.append(
            "[config] wall_clock_breakdown has no effect: the times are printed with the step, "
            "and steps_per_print is 0; set steps_per_print"
        )
    if config.fp16.enabled:
        if config.bf16.enabled:
            raise fail("fp16", "is enabled beside bf16; enable one of them")
        if config.compile.early_updates:
            raise fail(
                "compile.early_updates",
                "a step in fp16 may be left out, which is known after its backward; remove it",
            )
    if config.scheduler is not None:
        _check_scheduler(config.scheduler)
    _note_misspelt_passes(config, found)


def _check_adam(params: dict[str, Any], found: list[str]) -> None:
    section = "optimizer.params"
    warned, refused = config_keys.WARNED[section], config_keys.REFUSED[section]
    for key, value in params.items():
        where = f"{section}.{key}"
        if value == "auto":
            raise fail(where, '"auto" is for trainers that fill it in; give a value')
        if key in warned:
            _note_warned(section, key, value, where, found)
        elif key in refused:
            _check_refused(section, key, value, where)
        elif key not in config_keys.ADAM:
            raise _unknown(where, key, [*config_keys.ADAM, *warned, *refused])


def _check_scheduler(config: SchedulerConfig) -> None:
    if not config.type:
        raise fail("scheduler.type", "is missing; name a schedule, e.g. WarmupLR")
    from .lr_schedules import check_scheduler  # starts torch

    check_scheduler(config)


def _note_misspelt_passes(config: Config, found: list[str]) -> None:
    """A warning, as the name may be of a pass that is registered before engine.compile()."""
    known = _core.pass_names()
    schedule = () if config.compile.schedule == "auto" else config.compile.schedule
    names = dict.fromkeys(name for _, passes in schedule for name in passes)
    for name in names:
        if name not in known and meant(name, known):
            found.append(
                f"[config] compile.schedule: no pass is named {name!r}{meant(name, known)} "
                "engine.compile() fails unless you register one of that name"
            )


def load_config(source: str | Path | dict[str, Any]) -> Config:
    """The checked configuration from a JSON file, its text or a dict; warns of keys without effect.

    The batch triple is as given: Config.with_batch(world) resolves it.
    """
    if isinstance(source, dict):
        table = source
    elif isinstance(source, str) and source.lstrip().startswith("{"):
        table = parse_json(source, "config")
    elif isinstance(source, str | Path):
        table = read_json(source)
    else:
        raise fail("config", f"must be a path or a dict, not {type(source).__name__}")
    found: list[str] = []
    config = _parse("", table, "", found)
    _check_together(config, found)
    for message in found:
        warnings.warn(message, ConfigWarning, stacklevel=2)
    return dataclasses.replace(config, warnings=tuple(found))
