# SPDX-License-Identifier: Apache-2.0
"""Getting a model's tensors ready: on the device, in the compute type, equal on all ranks.

Parameters on the meta device are made by their own module (reset_parameters)
or by Hugging Face's _init_weights. Whatever was there or was made, rank 0's
values win.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .distributed import Ranks
from .errors import UserError


def _fail(name: str, cause: str) -> UserError:
    return UserError(f"[initialize] {name}: {cause}")


def _is_meta(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.is_meta


def _own_tensors(module: nn.Module) -> dict[str, torch.Tensor | None]:
    return {**module._parameters, **module._buffers}


def _hf_initialiser(model: nn.Module) -> Any:
    """Hugging Face's per-module initialiser of `model`, or None."""
    for module in model.modules():
        if callable(getattr(module, "_init_weights", None)):
            return module._init_weights
    return None


def materialise(model: nn.Module, device: torch.device) -> list[str]:
    """Give meta tensors memory and values, module by module. Returns the parameters' names.

    Tied parameters stay tied. Raises UserError for a module that cannot say what its
    tensors begin as.
    """
    waiting = {
        name: module
        for name, module in model.named_modules()
        if any(_is_meta(t) for t in _own_tensors(module).values())
    }
    if not waiting:
        return []
    hf_init = _hf_initialiser(model)
    made: list[str] = []
    real: dict[int, nn.Parameter] = {}
    for name, module in waiting.items():
        before = dict(module._parameters)
        if all(p is None or id(p) in real or not p.is_meta for p in before.values()) and not any(
            _is_meta(b) for b in module._buffers.values()
        ):
            module._parameters.update({k: real.get(id(p), p) for k, p in before.items()})
            continue
        module.to_empty(device=device, recurse=False)
        _initialise(name, module, hf_init)
        for key, old in before.items():
            if old is not None and old.is_meta:
                real.setdefault(id(old), module._parameters[key])
                module._parameters[key] = real[id(old)]
                made.append(f"{name}.{key}" if name else key)
    return made


def _initialise(name: str, module: nn.Module, hf_init: Any) -> None:
    reset = getattr(module, "reset_parameters", None)
    if hf_init is None and not callable(reset):
        raise _fail(
            f"{name or 'the model'} ({type(module).__name__})",
            "is on the meta device and has no reset_parameters(); add one, or build the model "
            "with real tensors",
        )
    with torch.no_grad():
        for tensor in _own_tensors(module).values():
            if tensor is not None and tensor.is_floating_point():
                tensor.fill_(float("nan"))
        if callable(reset):
            reset()
        if hf_init is not None:
            hf_init(module)
        for key, tensor in _own_tensors(module).items():
            if tensor is not None and tensor.is_floating_point() and tensor.isnan().any():
                raise _fail(
                    f"{name}.{key}" if name else key,
                    f"{type(module).__name__} was built on the meta device and does not "
                    "initialise it; build the model with real tensors",
                )


def to_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating parameters and persistent buffers. Buffers that are not saved (rotary
    tables, for one) keep the precision their module chose."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for key, buffer in module._buffers.items():
            kept = key in module._non_persistent_buffers_set
            if buffer is not None and buffer.is_floating_point() and not kept:
                module._buffers[key] = buffer.to(dtype)


def prepare(model: nn.Module, ranks: Ranks, dtype: torch.dtype | None) -> None:
    """Materialise, move to the ranks' device, cast to `dtype` (None: leave), and take rank 0's
    values. Collective."""
    materialise(model, ranks.device)
    model.to(ranks.device)
    if dtype is not None:
        to_compute_dtype(model, dtype)
    _check_equal(model, ranks)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_contiguous():
                ranks.broadcast_tensor(tensor.data)
            else:
                dense = tensor.data.contiguous()
                ranks.broadcast_tensor(dense)
                tensor.data.copy_(dense)


def _check_equal(model: nn.Module, ranks: Ranks) -> None:
    """UserError if another rank built a different model."""
    mine = [(n, tuple(t.shape), str(t.dtype)) for n, t in model.state_dict(keep_vars=True).items()]
    for rank, theirs in enumerate(ranks.gather(mine)):
        if theirs == mine:
            continue
        for a, b in zip(theirs, mine, strict=False):
            if a != b:
                raise _fail("model", f"rank {rank} has {a}, rank {ranks.rank} has {b}; build the "
                            "same model on every rank")  # fmt: skip
        raise _fail("model", f"rank {rank} has {len(theirs)} tensors, rank {ranks.rank} has "
                    f"{len(mine)}; build the same model on every rank")  # fmt: skip
