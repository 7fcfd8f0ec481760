# SPDX-License-Identifier: Apache-2.0
"""Hugging Face configurations that ship with deepcompile, and how to build or load a model.

The numbers are those of the published ``config.json`` files of each model.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepcompile.errors import UserError, meant

if TYPE_CHECKING:
    import torch

_FOLDER = Path(__file__).parent
SHIPPED = {
    "meta-llama/Meta-Llama-3-70B-Instruct": "llama-3-70b",
    "meta-llama/Meta-Llama-3-70B": "llama-3-70b",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama-3-8b",
    "meta-llama/Meta-Llama-3-8B": "llama-3-8b",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral-8x7b",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral-8x7b",
}
"""Hugging Face names whose configurations ship with deepcompile."""


def names() -> list[str]:
    """The built-in configurations."""
    return sorted(p.stem for p in _FOLDER.glob("*.json"))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "[models] transformers: is not installed, and Hugging Face models need it. "
            "pip install 'deepcompile[hf]'."
        ) from error
    return transformers


def config_path(name_or_path: str | Path) -> Path:
    """The config.json of a built-in name, a folder or a path. UserError if there is none."""
    path = Path(name_or_path)
    builtin = SHIPPED.get(str(name_or_path), str(name_or_path))
    if builtin in names() and not path.is_dir():
        return _FOLDER / f"{builtin}.json"
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise UserError(f"[models] {path}: no such file. Give a folder that holds one.")
    if not path.is_file():
        raise UserError(
            f"[models] {name_or_path}: neither a file nor a built-in model"
            f"{meant(name_or_path, [*names(), *SHIPPED]) or '.'} Give a config.json or one of "
            f"{', '.join(names())}."
        )
    return path


def load_config(name_or_path: str | Path) -> Any:
    """The transformers config of a built-in name, a config.json or a folder that holds one."""
    transformers = _transformers()
    path = config_path(name_or_path)
    try:
        fields = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"[models] {path}: is not JSON ({error}). Give a Hugging Face config.json."
        ) from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise UserError(
            f"[models] {path}: has no model_type, so it is no Hugging Face config.json. Add the "
            'field, for example "model_type": "llama".'
        )
    kind = fields.pop("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"[models] {path}: its model_type {kind!r} is not known to transformers "
            f"{transformers.__version__}. Give the config.json of a supported model."
        )
    try:
        return transformers.AutoConfig.for_model(kind, **fields)
    except Exception as error:  # transformers validates with several exception types
        cause = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"[models] {path}: {cause}. Correct that field.") from error


def build(config: Any, num_layers: int | None = None) -> Any:
    """A causal language model with random weights, on the current default device.

    ``config``: a transformers config, or what load_config takes. ``num_layers`` overrides its
    depth.
    """
    transformers = _transformers()
    if isinstance(config, str | Path):
        config = load_config(config)
    if num_layers is not None:
        if num_layers < 1:
            raise UserError(f"[models] num_layers {num_layers}: must be at least 1. Leave it out.")
        config = type(config).from_dict({**config.to_dict(), **_depth(config, num_layers)})
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise UserError(
            f"[models] {type(config).__name__}: has no causal language model. Give the config of "
            "a decoder."
        )
    config.use_cache = False
    return transformers.AutoModelForCausalLM.from_config(config)


def enable_checkpointing(model: Any) -> None:
    """Activation checkpointing, under the name that this transformers has for it."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})


def pretrained(name_or_path: str | Path, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """A causal language model in training mode, with the weights of a Hugging Face name or of a
    local folder, for initialize() under a launcher: rank 0 loads it into its host's memory, the
    others build it on the meta device and get their shards from rank 0.

    ``dtype``: of the parameters; None: the configuration's, or fp32. ``options``: more of
    transformers' from_pretrained (``revision``, ``local_files_only``, ...).
    """
    import torch

    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(name_or_path, **options)
    except Exception as error:  # transformers raises several kinds
        raise _not_loaded(name_or_path, error) from error
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    config.use_cache = False
    kind = transformers.AutoModelForCausalLM
    if int(os.environ.get("RANK", "0")) != 0:
        with torch.device("meta"):
            return kind.from_config(config, dtype=dtype)
    try:
        return kind.from_pretrained(name_or_path, config=config, dtype=dtype, **options).train()
    except Exception as error:
        raise _not_loaded(name_or_path, error) from error


def _not_loaded(name_or_path: str | Path, error: Exception) -> UserError:
    cause = " ".join(str(error).split())[:300].rstrip(".")
    return UserError(
        f"[models] {name_or_path}: {cause}. Give the name of a causal language model on the "
        "Hugging Face hub, or a folder that save_pretrained wrote."
    )


def _depth(config: Any, num_layers: int) -> dict[str, int]:
    key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return {key: num_layers, "num_hidden_layers": num_layers, "layer_types": None}
