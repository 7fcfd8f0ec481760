# SPDX-License-Identifier: Apache-2.0
"""Names of DeepSpeed's and FSDP2's that this package does not have, and what stands for them.

A script that is moved here meets them first as an AttributeError or a TypeError, which says what
to write instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import UserError

_MICRO_BATCHES = (
    "call backward(loss) and step() for each micro-batch: gradient_accumulation_steps says which "
    "step() updates, and at stage 1 gradients are reduced for that one alone"
)
_STATES = "plans move optimizer states to the host and back as compile.memory_budget asks"
_WHOLE = "use deepcompile.GatheredParameters(engine, parameters)"
_PLANNED = "the plan decides what stays whole: see compile.schedule and compile.memory_budget"
_SCALE = "backward(loss) scales the loss in fp16, and loss_scale() says by how much"
_BATCH = "batch sizes are the configuration's: initialize() another engine"
_LOOP = "call the engine, engine.backward(loss) and engine.step()"

_ENGINE = {
    "no_sync": _MICRO_BATCHES,
    "set_requires_gradient_sync": _MICRO_BATCHES,
    "set_is_last_backward": _MICRO_BATCHES,
    "set_gradient_accumulation_boundary": _MICRO_BATCHES,
    "allreduce_gradients": "backward(loss) reduces",
    "clip_grad_norm_": "set gradient_clipping in the configuration",
    "offload_states": _STATES,
    "reload_states": _STATES,
    "unshard": _WHOLE,
    "reshard": _PLANNED,
    "set_reshard_after_forward": _PLANNED,
    "set_reshard_after_backward": _PLANNED,
    "set_modules_to_forward_prefetch": _PLANNED,
    "set_modules_to_backward_prefetch": _PLANNED,
    "train_batch": _LOOP,
    "eval_batch": _LOOP,
    "set_train_batch_size": _BATCH,
    "set_train_micro_batch_size": _BATCH,
    "set_lr": "set it in each of optimizer.param_groups",
    "save_fp16_model": "use save_16bit_model()",
    "module_state_dict": "use state_dict()",
    "load_module_state_dict": "load values before initialize(), or call load_checkpoint()",
    "deepspeed_io": "give training_data= to initialize()",
    "destroy": "drop the engine; its memory goes with it",
    "empty_partition_cache": _PLANNED,
    "cur_scale": _SCALE,
    "scale": _SCALE,
    "monitor": "use report()",
    "tput_timer": "set wall_clock_breakdown, or use report()",
}
_PACKAGE = {
    "zero": 'build the model under torch.device("meta") in place of zero.Init(), and '
    "use deepcompile.GatheredParameters(engine, parameters)",
    "init_distributed": "initialize() joins the process group",
    "add_config_arguments": "give the configuration's path as config= to initialize()",
    "comm": "use torch.distributed",
    "checkpointing": "use torch.utils.checkpoint",
    "ops": "name AdamW in the configuration, or give a torch.optim.AdamW to initialize()",
    "init_inference": "call engine.eval()",
    "DeepSpeedEngine": "it is deepcompile.Engine",
    "fully_shard": 'call initialize() with "zero_optimization": {"stage": 3}',
}
_INITIALIZE = {
    "args": "give config=args.deepspeed_config",
    "config_params": "it is config=",
    "mpu": "there is no model parallelism",
    "mesh_param": "parameters are sharded over all ranks",
    "mesh_device": "parameters are sharded over all ranks",
    "distributed_port": "torchrun --master-port sets it",
}
_CASTS = ("half", "float", "double", "bfloat16", "type")


def of_engine(model: Any, name: str) -> Any:
    """What the engine hands on to the model."""
    try:
        found = getattr(model, name)
    except AttributeError:
        text = f"neither the engine nor {type(model).__name__} has {name!r}"
        raise AttributeError(_with(text, _ENGINE.get(name))) from None
    return _cast(name) if name in _CASTS and callable(found) else found


def _cast(name: str) -> Callable[..., Any]:
    def refused(*_: Any, **__: Any) -> Any:
        raise UserError(
            f"[engine] {name}: the parameters' type is settled by initialize(), which has their "
            'memory; set "bf16" or "fp16" in the configuration, or convert the model before'
        )

    return refused


def of_package(name: str) -> AttributeError:
    """The error for an attribute that the package does not have."""
    return AttributeError(
        _with(f"module 'deepcompile' has no attribute {name!r}", _PACKAGE.get(name))
    )


def check_initialize(given: dict[str, Any]) -> None:
    """An error for arguments that initialize() does not have, but for those left None."""
    for name, value in given.items():
        if name not in _INITIALIZE:
            raise TypeError(f"initialize() got an unexpected keyword argument {name!r}")
        if value is not None and (name != "args" or _names_a_config(value)):
            raise UserError(f"[initialize] {name}: is not taken; {_INITIALIZE[name]}")


def _names_a_config(args: Any) -> bool:
    return getattr(args, "deepspeed_config", None) is not None


def _with(text: str, instead: str | None) -> str:
    return text if instead is None else f"{text}; {instead}"
