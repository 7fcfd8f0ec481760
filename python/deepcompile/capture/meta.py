# SPDX-License-Identifier: Apache-2.0
"""Capture a model's training step without its weights, for plans on any machine.

The parameters are CPU tensors of full shape with empty storage, so a model of
any size is captured through the very path a real run takes; no region is
compiled and nothing is computed. Attention appears as SDPA's CPU flash kernel,
which reads and writes what the GPU's does.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from deepcompile.capture.attention import use_causal_attention
from deepcompile.capture.backend import make_backend, surface_errors
from deepcompile.capture.depth import NotRegular, deepen
from deepcompile.capture.entry import make_entry
from deepcompile.capture.graph import CapturedGraph, CaptureOptions
from deepcompile.capture.layers import FEW_LAYERS, layer_list, layers_alike
from deepcompile.capture.program import to_program
from deepcompile.errors import UserError
from deepcompile.fast_forms import choose_experts
from deepcompile.models import build, enable_checkpointing
from deepcompile.params import PERSISTENCE_THRESHOLD, ParamTable

log = logging.getLogger("deepcompile")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _empty(shape: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    """A CPU tensor of that form without memory. (Untouched memory costs nothing to get.)"""
    tensor = torch.empty_strided(shape, stride, dtype=dtype)
    tensor.untyped_storage().resize_(0)
    return tensor


def _without_memory(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace meta parameters and buffers by CPU tensors with empty storage, in place."""
    done: dict[int, Any] = {}

    def convert(tensor: torch.Tensor) -> Any:
        if id(tensor) not in done:
            wanted = dtype if tensor.is_floating_point() else tensor.dtype
            new = _empty(tensor.shape, tensor.stride(), wanted)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            else:  # buffers are small and may be read at trace time
                new = torch.zeros(tensor.shape, dtype=tensor.dtype)
            done[id(tensor)] = (tensor, new)
        return done[id(tensor)][1]

    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor.device.type == "meta":
                    store[name] = convert(tensor)


class _DryRunner:
    """Answers calls with tensors of the right form."""

    def __init__(self, captured: CapturedGraph):
        self._outputs = captured.section_outputs

    def _make(self, kind: str) -> list[Any]:
        return [
            _empty(v.shape, v.stride(), v.dtype) if isinstance(v, torch.Tensor) else v
            for v in self._outputs[kind]
        ]

    def forward(self, inputs: list) -> tuple[torch.Tensor, list[Any]]:
        return torch.zeros(1, dtype=torch.int64), self._make("forward")

    def backward(self, call_id: int, inputs: list) -> list[Any]:
        return self._make("backward")

    def inference(self, inputs: list) -> list[Any]:
        return self._make("inference")


class _DrySink:
    def install(self, captured: CapturedGraph) -> _DryRunner:
        return _DryRunner(captured)


def _as_the_engine_would(model: nn.Module) -> None:
    """Attention and experts in the forms of an engine's compiled call on ids and labels."""
    use_causal_attention(model)
    experts, _ = choose_experts(model, "auto")
    if experts is not None:
        model.set_experts_implementation(experts)


def _check(dtype: str, batch: int, seq: int, world: int) -> None:
    if dtype not in DTYPES:
        raise UserError(
            f"[capture] dtype {dtype!r}: unknown. Use one of {', '.join(sorted(DTYPES))}."
        )
    for name, value in (("batch", batch), ("seq", seq), ("world", world)):
        if value < 1:
            raise UserError(
                f"[capture] {name} {value}: must be at least 1. Give a positive number."
            )


def capture_model(
    config: Any,
    *,
    batch: int,
    seq: int,
    dtype: str = "bf16",
    stage: int = 3,
    world: int = 1,
    persistence_threshold: int = PERSISTENCE_THRESHOLD,
    checkpointing: bool = False,
    num_layers: int | None = None,
    options: CaptureOptions | None = None,
) -> tuple[list[CapturedGraph], ParamTable]:
    """Capture one training step of a Hugging Face causal language model.

    ``config``: a transformers config, the name of a built-in one (``llama-3-8b``) or a path to
    a config.json. ``batch`` x ``seq`` tokens on each rank. The graphs' regions have no code.
    """
    _check(dtype, batch, seq, world)
    with torch.device("meta"):
        model = build(config, num_layers=num_layers)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and seq > limit:
        raise UserError(
            f"[capture] seq {seq}: the model's context is {limit} tokens. Give at most that."
        )
    _without_memory(model, DTYPES[dtype])
    _as_the_engine_would(model)
    model.train()
    if checkpointing:
        enable_checkpointing(model)
    table = ParamTable.build(model, stage=stage, persistence_threshold=persistence_threshold)
    options = options or CaptureOptions(backend="none")
    backend = make_backend(table, options, _DrySink(), world=world)
    tokens = torch.zeros(batch, seq, dtype=torch.int64)
    torch._dynamo.reset()
    entry = torch.compile(make_entry(model), backend=backend, dynamic=False)
    with surface_errors(), warnings.catch_warnings():
        # Of transformers' own questions for torch's version, which do not change.
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        entry(input_ids=tokens, labels=tokens, use_cache=False)
    if not backend.graphs:
        raise UserError(
            f"[capture] {type(model).__name__}: nothing was captured "
            f"({'; '.join(backend.graph_breaks) or 'no graph'}). Try backend eager on a small "
            "config to see why."
        )
    return backend.graphs, table


def capture_repeated(
    config: Any, *, num_layers: int | None = None, **options: Any
) -> tuple[list[CapturedGraph], ParamTable]:
    """As capture_model, in the time that a few layers take, whatever the depth.

    Where all layers of the model are alike, FEW_LAYERS of them are captured and the regions of
    the others follow. Where they are not, all are captured.
    """
    with torch.device("meta"):
        deep = build(config, num_layers=num_layers)
    depth = deep.config.num_hidden_layers
    found = layer_list(deep)
    if depth <= FEW_LAYERS or found is None or len(found[2]) != depth or not layers_alike(found[2]):
        return capture_model(config, num_layers=num_layers, **options)
    graphs, few = capture_model(config, num_layers=FEW_LAYERS, **options)
    _without_memory(deep, DTYPES[options.get("dtype", "bf16")])
    table = ParamTable.build(deep, stage=few.stage, persistence_threshold=few.persistence_threshold)
    try:
        if len(graphs) != 1:
            raise NotRegular(f"{len(graphs)} graphs were captured")
        ir = deepen(graphs[0].ir, few, table, depth - FEW_LAYERS)
    except NotRegular as why:
        log.info("[capture] all %d layers are captured: %s", depth, why)
        return capture_model(config, num_layers=num_layers, **options)
    program = to_program(ir, table, world=options.get("world", 1))
    return [replace(graphs[0], ir=ir, program=program)], table
