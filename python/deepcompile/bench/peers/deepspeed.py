# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed: ZeRO-1 and ZeRO-3, eager or compiled, and its own DeepCompile.

The package `deepspeed` is an optional extra. ``default`` is its configuration as
the seed benchmark writes it; ``best`` uses its fused Adam, where the seed uses
torch's own, and overlaps reductions at stage 1 too. ZeRO runs on CPUs too; its
DeepCompile needs GPUs, and no test covers it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...errors import UserError
from .. import weights
from ..conditions import Condition
from ..options import BETAS, DECAY, EPS, merge
from . import Peer, Setup
from .local import adamw, limit_dynamo
from .with_engine import EnginePeer

WARMUP = 5
"""The step of DeepCompile's second schedule entry, as in the seed."""
RESOLVED = (
    "communication_data_type", "zero_allgather_bucket_size", "zero_reduce_bucket_size",
    "zero_prefetch_bucket_size", "zero_param_persistence_threshold", "zero_max_live_parameters",
    "zero_max_reuse_distance", "zero_overlap_comm", "zero_contiguous_gradients",
)  # fmt: skip
"""Of DeepSpeed's engine: properties and functions."""


def configuration(setup: Setup) -> dict[str, Any]:
    """The seed's ds_config.json for a condition."""
    condition, options = setup.condition, setup.options
    ours = condition.framework == "ds_deepcompile"
    zero: dict[str, Any] = {"stage": condition.zero_stage, "sub_group_size": 100_000_000}
    if condition.settings == "best" and condition.zero_stage < 3 and not ours:
        zero["overlap_comm"] = True  # stage 3's default
    if condition.offload_adam:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if condition.offload_params and condition.zero_stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if ours and condition.zero_stage == 3:
        # The hooks of leaf modules (Mixtral's experts by default) would break the graph inside
        # a module's forward, whose embedding then runs on a released parameter.
        zero["leaf_module"] = {"classes": []}
    config = {
        "bf16": {"enabled": setup.dtype == torch.bfloat16},
        "zero_optimization": zero,
        "compile": {
            "deepcompile": ours,
            "offload_activation": False,
            "offload_opt_states": False,
            "double_buffer": True,
            "symmetric_memory": False,
            "free_activation": False,
            "debug_log": False,
            "sync_before_reduce": False,
            "sync_after_reduce": False,
        },
        "gradient_accumulation_steps": condition.accumulation,
        "gradient_clipping": options.max_grad_norm,
        "steps_per_print": 100_000,
        "train_micro_batch_size_per_gpu": condition.batch_size,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
    }
    if _fused(condition):
        params = {"lr": options.learning_rate, "betas": list(BETAS), "eps": EPS}
        config["optimizer"] = {"type": "AdamW", "params": {**params, "weight_decay": DECAY}}
    return merge(config, options.engine)


def _fused(condition: Condition) -> bool:
    """DeepSpeed's own AdamW: at its best, and where states are on the host."""
    return condition.settings == "best" or condition.offload_adam


def schedule(condition: Condition) -> list[tuple[int, list[Any]]] | None:
    """As the seed's make_schedule; None: DeepSpeed's default."""
    if condition.framework != "ds_deepcompile" or condition.zero_stage != 3:
        return None
    if condition.offload_adam and condition.offload_params and not condition.passes:
        return None  # which moves parameters; the named passes would leave them on the host
    from deepspeed.compile.passes import (
        offload_adam_states,
        prefetch,
        selective_gather,
        zero3_compile,
    )

    gather = zero3_compile.add_z3_gather_release
    passes = condition.passes or ("prefetch", "selective_gather")
    if "offload_adam_states" in passes:
        # DeepSpeed's own, as there are no states before the first update. The seed begins with the
        # pass that waits, which Inductor does not compile.
        init = offload_adam_states.offload_adam_states_for_init
        return [(0, [gather]), (1, [init, gather, offload_adam_states.move_opt_states])]
    if "offload_adam_states_sync" in passes:
        if condition.backend == "inductor":
            raise UserError(
                "[bench] offload_adam_states_sync of DeepSpeed puts Python functions into graphs, "
                "which Inductor does not compile. Use --backend eager, or offload_adam_states."
            )
        return [(0, [gather, offload_adam_states.move_opt_states_sync])]
    known = {
        "prefetch": prefetch.schedule_prefetch,
        "selective_gather": selective_gather.selective_gather,
        "zero3_compile": None,
    }
    for name in passes:
        if name not in known:
            raise UserError(f"[bench] DeepSpeed has no pass {name!r}: use {', '.join(known)}.")
    second = [known[n] for n in passes if known[n] is not None]
    return [(0, [gather])] + ([(WARMUP, [gather, *second])] if second else [])


@contextlib.contextmanager
def _hooks_not_traced(condition: Condition) -> Iterator[None]:
    """While DeepSpeed makes its hooks. Traced, ZeRO-3's guard on a list and a counter that grow: a
    compilation for each module, and with activation checkpointing in every step."""
    import deepspeed.runtime.zero.parameter_offload as hooks

    usual = hooks.instrument_w_nvtx
    if condition.compile and condition.framework != "ds_deepcompile":
        hooks.instrument_w_nvtx = torch.compiler.disable
    try:
        yield
    finally:
        hooks.instrument_w_nvtx = usual


def fill_sharded(model: nn.Module, setup: Setup, config: dict[str, Any]) -> None:
    """As weights.fill, for ZeRO-3: what a module holds is sharded before the next is made, so that
    no rank ever holds the whole model."""
    import deepspeed

    device, made = setup.ranks.device, {}
    on_host = {"remote_device": "cpu", "pin_memory": True}
    more = on_host if "offload_param" in config["zero_optimization"] else {}
    for module in reversed(list(model.modules())):
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.empty_like(buffer, device=device)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty_like(parameter, device=device)
                    made[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                module._parameters[key] = made[id(parameter)]
        model._init_weights(module)
        if module._parameters:
            deepspeed.zero.Init(
                module=module, config_dict_or_path=config, dtype=setup.dtype, **more
            )


def _forget() -> None:
    """What DeepSpeed keeps of an engine in its modules: its model, optimizer and graphs."""
    import deepspeed.compile.backend as backend
    import deepspeed.compile.util as util
    import deepspeed.runtime.zero.parameter_offload as hooks
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    # A method with a cache of what it was called with, inside of a wrapper.
    name = "_PartitionedParameterCoordinator__params_to_release"
    found = getattr(PartitionedParameterCoordinator, name, None)
    for cell in getattr(found, "__closure__", None) or ():
        getattr(cell.cell_contents, "cache_clear", int)()
    for kept in (hooks.FWD_MODULE_STACK, util.pre_backward_hooks, util.post_backward_hooks,
                 backend.param_manager, backend.profiling_results,
                 backend.opt_pass_times):  # fmt: skip
        kept.clear()


def plain_architectures(named: str) -> str:
    """TORCH_CUDA_ARCH_LIST as DeepSpeed's builder reads it (seen in 0.19.8): numbers alone, where
    torch takes "9.0a" too."""
    return re.sub(r"(\d+\.\d+)[a-z]", r"\1", named)


class DeepSpeed(EnginePeer):
    def __init__(self, setup: Setup):
        # Before the import, which chooses by what is installed.
        os.environ.setdefault("DS_ACCELERATOR", setup.ranks.device.type)
        if named := os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = plain_architectures(named)
        import deepspeed

        condition = setup.condition
        self._setup, self._version = setup, deepspeed.__version__
        self._config = configuration(setup)
        limit_dynamo()
        torch._dynamo.config.optimize_ddp = False
        if "mixtral" in condition.model.lower():
            torch._dynamo.config.capture_dynamic_output_shape_ops = True
            torch._dynamo.config.capture_scalar_outputs = True
        model = setup.build()
        if condition.zero_stage == 3:
            deepspeed.init_distributed()
            fill_sharded(model, setup, self._config)
        else:
            weights.fill(model, setup.ranks.device)
        extra = {}
        if not _fused(condition):
            parameters = list(model.parameters())
            extra["optimizer"] = adamw(parameters, setup.options, setup.ranks.device)
        with _hooks_not_traced(condition):
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model, model_parameters=list(model.parameters()), config=self._config, **extra
            )
        self.engine.train()
        if condition.compile:
            more = {"schedule": schedule(condition)} if condition.deepcompile else {}
            self.engine.compile(backend=condition.backend, **more)

    def settings(self) -> dict[str, Any]:
        inner = getattr(self.engine, "basic_optimizer", None)
        return {
            "deepspeed": self._version,
            "config": self._config,
            "resolved": self._resolved(),
            "zero_optimizer": type(self.engine.optimizer).__name__,
            "optimizer": type(inner).__name__,
            "deepcompile_active": bool(
                getattr(self.engine, "is_deepcompile_active", lambda: False)()
            ),
            "recompute": self._setup.condition.activation_checkpointing,
            "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "default"),
            "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", "default"),
        }

    def _resolved(self) -> dict[str, Any]:
        """What its engine says of settings that the configuration leaves open."""
        said = {}
        for name in RESOLVED:
            ask = getattr(self.engine, name, None)
            try:
                said[name] = str(ask() if callable(ask) else ask)
            except Exception as error:  # of another version
                said[name] = f"not to be read ({type(error).__name__})"
        return said

    def compile_times(self) -> list[tuple[str, float]] | None:
        if self._setup.condition.framework != "ds_deepcompile":
            return None
        return [(f"{where}{graph}", float(s)) for where, graph, _, s in
                self.engine.get_compile_time()]  # fmt: skip

    def go_on(self, condition: Condition) -> bool:
        # torch.compile would make a second length's graphs dynamic, which the seed's are not, and
        # DeepCompile keeps what it chose for the first.
        return not condition.compile

    def close(self) -> None:
        self.engine.destroy()
        del self.engine, self.optimizer
        _forget()
        # What was compiled lets go of the engine in a second collection only; the first is here.
        torch._dynamo.reset()
        gc.collect()


def setup(given: Setup) -> Peer:
    return DeepSpeed(given)
