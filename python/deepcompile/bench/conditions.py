# SPDX-License-Identifier: Apache-2.0
"""What one run of the benchmark is: model, framework, sizes; and its names in charts and logs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import UserError

FRAMEWORKS = {
    "zero3": "ZeRO3",
    "zero3_c": "ZeRO3 (C)",
    "zero1": "ZeRO1",
    "zero1_c": "ZeRO1 (C)",
    "fsdp": "FSDP",
    "fsdp_c": "FSDP (C)",
    "ddp": "DDP",
    "ddp_c": "DDP (C)",
    "single": "single GPU",
    "single_c": "single GPU (C)",
    "ds_deepcompile": "DS DeepCompile",
    "deepcompile": "DeepCompile",
}
"""Key -> the name in charts, in the order of the bars. The two last get their passes behind it:
``deepcompile`` is this project, ``ds_deepcompile`` DeepSpeed's own compiler of that name."""
SETTINGS = ("default", "best")
STAGE_PASSES = ("zero0_compile", "zero1_compile", "zero2_compile", "zero3_compile")
SHORT_PASSES = {
    "prefetch": "P",
    "selective_gather": "S",
    "auto": "auto",
    "offload_adam_states": "offload",
    "offload_adam_states_sync": "offload sync",
}
MODEL_NAMES = {
    "Meta-Llama-3-8B": "Llama-3-8B",
    "Meta-Llama-3-8B-Instruct": "Llama-3-8B",
    "Meta-Llama-3-70B": "Llama-3-70B",
    "Meta-Llama-3-70B-Instruct": "Llama-3-70B",
    "Mixtral-8x7B-v0.1": "Mixtral-8x7B",
    "Mixtral-8x7B-Instruct-v0.1": "Mixtral-8x7B",
    "llama-3-8b": "Llama-3-8B",
    "llama-3-70b": "Llama-3-70B",
    "mixtral-8x7b": "Mixtral-8x7B",
}
BUILTIN_MODELS = {
    "Llama-3-8B": "llama-3-8b",
    "Llama-3-70B": "llama-3-70b",
    "Mixtral-8x7B": "mixtral-8x7b",
}
"""A model's name in charts -> the configuration of it that ships with deepcompile."""


@dataclass(frozen=True)
class Condition:
    """One run of a sweep. Two equal conditions are the same run."""

    model: str
    """As given: a Hugging Face name, a folder, a config.json, or a built-in name."""
    framework: str
    """A key of FRAMEWORKS."""
    passes: tuple[str, ...] = ()
    """Of the two DeepCompiles; empty is their default schedule (ours: ``auto``)."""
    variant: str = ""
    """What else sets a peer apart, such as FSDP's ``overlap`` or ``copy_engine``."""
    settings: str = "default"
    """``default``: as its documentation starts; ``best``: every knob turned by hand."""
    num_layers: int = 0
    """0: the model's own depth."""
    batch_size: int = 1
    """Sequences a rank and micro step."""
    seq_length: int = 512
    accumulation: int = 1
    zero_stage: int = 3
    activation_checkpointing: bool = False
    compile: bool = False
    backend: str = "inductor"
    """Of torch.compile."""
    offload_adam: bool = False
    offload_params: bool = False
    world: int = 1
    nodes: int = 1
    dtype: str = "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.framework not in FRAMEWORKS:
            raise _wrong("framework", self.framework, ", ".join(FRAMEWORKS))
        if self.settings not in SETTINGS:
            raise _wrong("settings", self.settings, ", ".join(SETTINGS))
        for name in ("batch_size", "seq_length", "accumulation", "world", "nodes"):
            if getattr(self, name) < 1:
                raise _wrong(name, getattr(self, name), "at least 1")
        if self.num_layers < 0:
            raise _wrong("num_layers", self.num_layers, "0 (the model's own) or more")
        if self.zero_stage not in (0, 1, 2, 3):
            raise _wrong("zero_stage", self.zero_stage, "0 to 3")

    @property
    def ours(self) -> bool:
        return self.framework == "deepcompile"

    @property
    def deepcompile(self) -> bool:
        """Whether passes plan the step: ours, or DeepSpeed's."""
        return self.framework.endswith("deepcompile")

    @property
    def has_engine(self) -> bool:
        """Whether it takes an engine's configuration: ours, and DeepSpeed's."""
        return self.deepcompile or self.framework.startswith("zero")

    def why_no_offload(self) -> str | None:
        """Why it cannot move to the host what it is asked to, in words; None: it can, or is not
        asked."""
        if not (self.offload_adam or self.offload_params):
            return None
        if self.ours:
            return (
                "ours moves to the host what its memory budget asks. Leave offload out and give a "
                "budget: --memory_budget 20GiB, or /budget=20GiB behind the framework"
            )
        if self.framework.startswith(("ddp", "single")):
            return (
                f"{self.framework} keeps all on the device. Use FSDP or DeepSpeed for offload, or "
                "ours with a memory budget"
            )
        return None

    @property
    def label(self) -> str:
        """The name of its bar."""
        name = FRAMEWORKS[self.framework]
        if self.deepcompile:
            name += f" ({self._pass_label()})"
        if self.variant:
            name += f" {self.variant}"
        if (self.offload_adam or self.offload_params) and "offload" not in name:
            name += " offload"
        return name + (" best" if self.settings == "best" else "")

    def _pass_label(self) -> str:
        words = [w for w in self.passes if w not in STAGE_PASSES]
        only_stage = bool(self.passes) and not words
        if not words and not only_stage:
            words = ["auto"] if self.ours else ["prefetch", "selective_gather"]
        # The stage's own pass alone; for DeepSpeed's at stage 1 there is no other.
        if only_stage or (self.zero_stage < 3 and not self.ours):
            return f"Z{self.zero_stage}"
        stage = f"Z{self.zero_stage} " if self.zero_stage < 3 else ""
        order = list(SHORT_PASSES)
        words.sort(key=lambda w: order.index(w) if w in order else len(order))
        return stage + "+".join(SHORT_PASSES.get(word, word) for word in words)

    @property
    def model_label(self) -> str:
        """The model's name in charts and their file names: no slash, the depth if it is cut."""
        name = model_label(self.model)
        return f"{name}-{self.num_layers}L" if self.num_layers else name

    @property
    def tokens(self) -> int:
        """Of one rank in one optimizer step."""
        return self.batch_size * self.seq_length * self.accumulation

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"passes": list(self.passes)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Condition:
        """The reverse of as_dict. Raises UserError for what is missing, unknown or mistyped."""
        if not isinstance(data, Mapping):
            raise UserError("[bench] condition: is not an object. Write one with its fields.")
        known = {f.name: f for f in fields(Condition)}
        for name in data:
            if name not in known:
                raise UserError(f"[bench] condition: unknown field {name!r}. Take it out.")
        values = {}
        for name, field in known.items():
            if name in data:
                values[name] = _typed(name, data[name], str(field.type))
            elif field.default is dataclasses.MISSING:
                raise UserError(f"[bench] condition: has no {name!r}. Add it.")
        return Condition(**values)


def _last_word(model: str) -> str:
    """Of a name, a folder or a file; a config.json's is its folder's."""
    *before, name = model.rstrip("/").split("/")
    name = name.removesuffix(".json")
    return before[-1] if name == "config" and before else name


def model_label(model: str) -> str:
    name = _last_word(model)
    return MODEL_NAMES.get(name, name) or "model"


SEED_OWNERS = ("meta-llama", "mistralai")
"""Whose models the seed benchmark trains; its file names leave the owner out."""


def model_file_word(model: str) -> str:
    """The model in names of files: as in the seed, the name without what is before it. Others get
    a few letters behind it, as two folders may end alike."""
    name = _last_word(model)
    owner, slash, _ = model.partition("/")
    if not slash or (owner in SEED_OWNERS and model.count("/") == 1):
        return name
    return f"{name or 'model'}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"


def local_model(model: str) -> str:
    """What models.load_config takes: the built-in configuration of a model known by its Hugging
    Face name, else the name as it is."""
    builtin = BUILTIN_MODELS.get(model_label(model))
    return model if builtin is None or Path(model).exists() else builtin


def order_of(condition: Condition) -> tuple:
    """For sorting bars: peers first, ours last; P, S, P+S, auto."""
    order = ["P", "S", "P+S", "auto"]
    passes = condition._pass_label() if condition.deepcompile else ""
    rank = order.index(passes) if passes in order else -1
    best = SETTINGS.index(condition.settings)
    return (list(FRAMEWORKS).index(condition.framework), rank, best, condition.label)


def _typed(name: str, value: Any, kind: str) -> Any:
    wanted: dict[str, type] = {"str": str, "int": int, "bool": bool}
    if kind.startswith("tuple"):
        if isinstance(value, list | tuple) and all(isinstance(w, str) for w in value):
            return tuple(value)
    elif type(value) is wanted[kind]:
        return value
    raise UserError(f"[bench] condition: {name} is {value!r}. Give it as {kind}.")


def _wrong(name: str, value: Any, wanted: str) -> UserError:
    return UserError(f"[bench] {name} {value!r}: unknown. Use {wanted}.")
