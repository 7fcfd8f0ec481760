# SPDX-License-Identifier: Apache-2.0
"""The benchmark's models: built without memory, then filled with the same values everywhere.

Every framework starts from the same weights, however it shards them: a
parameter's values depend on the seed and on its name alone, and are rounded to
the compute type before any fp32 master is taken from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import models
from ..capture.attention import use_causal_attention
from ..errors import UserError
from .conditions import Condition, model_file_word
from .options import ATTENTION

WEIGHTS = "model.safetensors"


def model_config(name: str) -> Any:
    """The transformers config of a shipped name, a Hugging Face name, a local folder or a
    config.json."""
    name = models.SHIPPED.get(name, name)
    if name in models.names() or Path(name).exists() or "/" not in name:
        return models.load_config(name)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # transformers raises several kinds
        cause = " ".join(str(error).split())[:200]
        raise UserError(
            f"[bench] model {name}: not shipped and not to be had from the Hugging Face hub "
            f"({cause}). Give a local folder, a config.json or one of {', '.join(models.names())}."
        ) from None


def build(
    name: str,
    *,
    num_layers: int = 0,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
    seed: int = 0,
) -> nn.Module:
    """The causal language model on the meta device, in `dtype`; `fill` gives it values.

    `num_layers`: 0 keeps the model's depth. `attention`: sdpa uses no explicit mask, as the
    batches have no padding; any other is transformers' own.
    """
    if attention not in ATTENTION:
        raise UserError(
            f"[bench] attn_impl {attention!r}: unknown. Use one of {', '.join(ATTENTION)}."
        )
    with torch.device("meta"):
        model = models.build(model_config(name), num_layers=num_layers or None)
    if attention == "sdpa":
        use_causal_attention(model)
    else:
        try:
            model.set_attn_implementation(attention)
        except (ImportError, ValueError) as error:
            raise UserError(f"[bench] attn_impl {attention}: {error}. Use sdpa.") from None
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model._init_weights = Filler(model, dtype, seed)  # what initialises meta parameters asks this
    model.train()
    if checkpointing:
        models.enable_checkpointing(model)
    return model


class Filler:
    """Fills one module's own parameters and buffers: the model's own initialiser for buffers,
    `values` for parameters."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, seed: int):
        self._buffers = model._init_weights
        first = {id(p): name for name, p in model.named_parameters()}
        self._names = {
            (id(module), key): first[id(p)] for module, key, p in _parameters(model)
        }  # tied parameters have one
        self._dtype, self._seed = dtype, seed
        self._file: Any = None
        self._std = float(getattr(model.config, "initializer_range", 0.02))

    def __call__(self, module: nn.Module) -> None:
        if module._buffers:
            self._buffers(module)
        for key, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                with torch.no_grad():
                    self._store(self._names[id(module), key], parameter)

    def load(self, folder: Path) -> None:
        """Take values from the file that `save` wrote."""
        from safetensors import safe_open

        path = folder / WEIGHTS
        if not path.is_file():
            raise UserError(f"[bench] load_weights: {path} is missing. Run with --save_weights.")
        self._file = safe_open(str(path), framework="pt")

    def values(self, name: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Of one parameter, whole, rounded to the compute type."""
        if self._file is None:
            return values(name, shape, device, self._std, self._seed).to(self._dtype)
        if name not in self._file.keys():
            raise UserError(f"[bench] load_weights: the file has no {name}. Save it anew.")
        found = self._file.get_tensor(name)
        if tuple(found.shape) != shape:
            raise UserError(
                f"[bench] load_weights: {name} is {tuple(found.shape)} in the file and {shape} in "
                "the model. Save it anew."
            )
        return found.to(device, self._dtype)

    def _store(self, name: str, parameter: torch.Tensor) -> None:
        """Sharded tensors (DTensor) get this rank's part of the same values."""
        shape, device = parameter.shape, parameter.device
        local = getattr(parameter, "to_local", None)
        if local is None:
            parameter.copy_(self.values(name, tuple(shape), device))
            return
        from torch.distributed.tensor import distribute_tensor

        mesh_device = torch.device(parameter.device_mesh.device_type, device.index)
        if mesh_device.type == "cuda" and mesh_device.index is None:
            mesh_device = torch.device("cuda", torch.cuda.current_device())
        full = self.values(name, tuple(shape), mesh_device)
        part = distribute_tensor(
            full, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
        local().copy_(part.to_local())


def values(
    name: str, shape: tuple[int, ...], device: torch.device, std: float = 0.02, seed: int = 0
) -> torch.Tensor:
    """fp32 values of the parameter `name`: normal with deviation `std` for matrices, ones for
    norms, zeros for biases."""
    if len(shape) < 2:
        fill = 0.0 if name.endswith("bias") else 1.0
        return torch.full(shape, fill, device=device)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape, device=device).normal_(0.0, std, generator=generator)


def fill(model: nn.Module, device: torch.device, host: torch.device | None = None) -> None:
    """Memory on `device` and values for a model of `build`, sharded or not. `host`: where
    parameters stay, if not there."""
    tied = _ties(model)
    model.to_empty(device=host or device)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    for shared, (owner, key) in tied:
        shared[0]._parameters[shared[1]] = owner._parameters[key]
    filler = model._init_weights
    for module in model.modules():
        filler(module)


def refill(model: nn.Module) -> None:
    """The first values again, in place."""
    filler = model._init_weights
    for module in model.modules():
        filler(module)


def _ties(model: nn.Module) -> list[tuple[tuple[nn.Module, str], tuple[nn.Module, str]]]:
    """((module, key), (first module, key)) of each parameter that is another's; to_empty unties."""
    first: dict[int, tuple[nn.Module, str]] = {}
    found = []
    for module, key, parameter in _parameters(model):
        if id(parameter) in first:
            found.append(((module, key), first[id(parameter)]))
        else:
            first[id(parameter)] = (module, key)
    return found


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield module, key, parameter


def folder_of(condition: Condition) -> Path:
    """Where a condition's weights are saved, under the seed benchmark's name."""
    return Path(f"{model_file_word(condition.model)}_cp_layer{condition.num_layers}")


def save(model: nn.Module, folder: Path, device: torch.device) -> Path:
    """Write the values that a model of `build` begins with, and its config; one parameter at a
    time on the device, all of them in the host's memory."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    filler = model._init_weights
    tensors = {
        name: filler.values(name, tuple(p.shape), device).cpu().contiguous()
        for name, p in model.named_parameters()
    }
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    model.config.to_json_file(folder / "config.json")
    return folder / WEIGHTS


def has_ties(model: nn.Module) -> bool:
    return bool(_ties(model))


def layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers: the longest list of modules of one kind."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise UserError(
            f"[bench] {type(model).__name__}: has no list of layers, so there is nothing to shard "
            "or compile layer by layer. Use the single peer or deepcompile."
        )
    return list(max(lists, key=len))
