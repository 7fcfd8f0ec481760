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
_SAVED = "optimizer states are read and written by save_checkpoint() and load_checkpoint() alone"
_FP32 = "use engine.state_dict(fp32=True)"
_GRADIENTS = "gradients cannot be read; engine.get_global_grad_norm() is their norm"
_CONFIG = "read engine.config"
_RANKS = "all ranks are data-parallel: use global_rank, world_size and torch.distributed's group"
_NO_MODEL_PARALLEL = "there is no tensor, sequence, expert or pipeline parallelism"
_AVERAGED = "gradients are averaged over ranks, in communication_data_type"
_LOGGING = "use report()"
_STAGE_3 = 'call initialize() with "zero_optimization": {"stage": 3}'

_ENGINE = {
    "no_sync": _MICRO_BATCHES,
    "set_requires_gradient_sync": _MICRO_BATCHES,
    "set_is_last_backward": _MICRO_BATCHES,
    "set_gradient_accumulation_boundary": _MICRO_BATCHES,
    "set_requires_all_reduce": _MICRO_BATCHES,
    "allreduce_gradients": "backward(loss) reduces",
    "register_comm_hook": _AVERAGED,
    "set_all_reduce_hook": _AVERAGED,
    "set_gradient_divide_factor": _AVERAGED,
    "set_reduce_scatter_divide_factor": _AVERAGED,
    "clip_grad_norm_": "set gradient_clipping in the configuration",
    "clip_fp32_gradients": "set gradient_clipping in the configuration",
    "offload_states": _STATES,
    "reload_states": _STATES,
    "optimizer_state_dict": _SAVED,
    "load_optimizer_state_dict": _SAVED,
    "optim_state_dict": _SAVED,
    "full_optim_state_dict": _SAVED,
    "unshard": _WHOLE,
    "summon_full_params": _WHOLE,
    "state_dict_type": "state_dict() is whole, and save_checkpoint() writes shards",
    "set_unshard_in_backward": _PLANNED,
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
    "get_mom": "read betas in each of optimizer.param_groups",
    "get_type": _CONFIG,
    "get_batch_info": "call train_batch_size(), train_micro_batch_size_per_gpu() and "
    "gradient_accumulation_steps()",
    "get_data_parallel_rank": _RANKS,
    "get_data_parallel_world_size": _RANKS,
    "get_data_parallel_group": _RANKS,
    "data_parallel_group": _RANKS,
    "dp_world_size": _RANKS,
    "mp_world_size": _NO_MODEL_PARALLEL,
    "get_sequence_parallel_group": _NO_MODEL_PARALLEL,
    "zero_optimization": "call zero_optimization_stage()",
    "optimizer_name": _CONFIG,
    "optimizer_params": _CONFIG,
    "scheduler_name": _CONFIG,
    "scheduler_params": _CONFIG,
    "steps_per_print": _CONFIG,
    "wall_clock_breakdown": _CONFIG,
    "communication_data_type": _CONFIG,
    "get_data_types": _CONFIG,
    "save_fp16_model": "use save_16bit_model()",
    "module_state_dict": "use state_dict()",
    "load_module_state_dict": "load values before initialize(), or call load_checkpoint()",
    "set_data_post_process_func": "do it in collate_fn",
    "deepspeed_io": "give training_data= to initialize()",
    "destroy": "drop the engine; its memory goes with it",
    "empty_partition_cache": _PLANNED,
    "cur_scale": _SCALE,
    "scale": _SCALE,
    "dynamic_loss_scale": _SCALE,
    "initial_dynamic_scale": _SCALE,
    "print_forward_breakdown": "set wall_clock_breakdown, or use report()",
    "flops_profiler": _LOGGING,
    "monitor": _LOGGING,
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
    "utils": f"in place of safe_get_full_fp32_param {_FP32}, or deepcompile.GatheredParameters, "
    f"with modifier_rank= to write; {_GRADIENTS}; {_SAVED}",
    "safe_get_full_fp32_param": _FP32,
    "safe_set_full_fp32_param": f"{_WHOLE} with modifier_rank=",
    "safe_get_full_grad": _GRADIENTS,
    "safe_get_full_optimizer_state": _SAVED,
    "safe_set_full_optimizer_state": _SAVED,
    "get_fp32_state_dict_from_zero_checkpoint": f"call load_checkpoint(), and {_FP32}",
    "convert_zero_checkpoint_to_fp32_state_dict": f"call load_checkpoint(), and {_FP32}",
    "accelerator": "use torch.cuda; engine.device is this rank's",
    "get_accelerator": "use torch.cuda; engine.device is this rank's",
    "runtime": "schedules are in deepcompile.lr_schedules; the rest has no counterpart",
    "moe": "there is no expert parallelism: experts are sharded as other parameters are",
    "pipe": _NO_MODEL_PARALLEL,
    "PipelineModule": _NO_MODEL_PARALLEL,
    "tp_model_init": _NO_MODEL_PARALLEL,
    "OnDevice": 'build the model under torch.device("meta")',
    "DeepSpeedConfig": "call deepcompile.load_config()",
    "DeepSpeedEngine": "it is deepcompile.Engine",
    "FullyShardedDataParallel": _STAGE_3,
    "fully_shard": _STAGE_3,
    "MixedPrecisionPolicy": 'set "bf16" or "fp16" in the configuration',
    "CPUOffloadPolicy": _STATES,
}
_INITIALIZE = {
    "args": "give config=args.deepspeed_config",
    "config_params": "it is config=",
    "mpu": "there is no model parallelism",
    "mesh_param": "parameters are sharded over all ranks",
    "mesh_device": "parameters are sharded over all ranks",
    "distributed_port": "torchrun --master-port sets it",
}
_ARGUMENTS: dict[str, dict[str, tuple[Any, str]]] = {
    "backward": {
        "allreduce_gradients": (True, _MICRO_BATCHES),
        "release_loss": (False, "drop the loss yourself"),
        "scale_wrt_gas": (True, "multiply the loss by gradient_accumulation_steps"),
    },
    "step": {"lr_kwargs": (None, "step a scheduler of your own, on the returned optimizer")},
    "compile": {
        "mode": (None, 'give compile_kwargs={"options": ...}'),
        "dynamic": (None, 'give compile_kwargs={"dynamic": ...}'),
        "fullgraph": (None, 'give compile_kwargs={"fullgraph": ...}'),
        "options": (None, 'give compile_kwargs={"options": ...}'),
    },
    "save_checkpoint": {
        "save_latest": (True, "the last save is what load_checkpoint() finds; name others by tag="),
        "exclude_frozen_parameters": (False, "take what you want of state_dict()"),
    },
    "load_checkpoint": {
        "load_module_strict": (True, "load parts of a model before initialize()"),
        "custom_load_fn": (None, "load parts of a model before initialize()"),
    },
    "save_16bit_model": {
        "exclude_frozen_parameters": (False, "take what you want of state_dict()"),
    },
}
"""DeepSpeed's arguments of the engine's methods: the value that asks for nothing, and what stands
for others."""
_CASTS = ("half", "float", "double", "bfloat16", "type")


def of_engine(model: Any, name: str) -> Any:
    """What the engine hands on to the model."""
    try:
        found = getattr(model, name)
    except AttributeError:
        text = f"neither the engine nor {type(model).__name__} has {name!r}"
        raise AttributeError(_with(text, _ENGINE.get(name))) from None
    if not callable(found):
        return found
    return _cast(name) if name in _CASTS else _move(found) if name == "to" else found


def _move(to: Callable[..., Any]) -> Callable[..., Any]:
    import torch  # the package is looked at without it

    def checked(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if any(isinstance(each, torch.dtype | torch.Tensor) for each in given):
            _cast("to")()
        return to(*args, **kwargs)

    return checked


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


def check_call(method: str, given: dict[str, Any]) -> None:
    """An error for arguments that an engine's method does not have, but for those that ask for
    nothing."""
    for name, value in given.items():
        if name not in _ARGUMENTS[method]:
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}")
        nothing, instead = _ARGUMENTS[method][name]
        if value is not nothing:
            raise UserError(f"[engine] {method}: {name}={value!r} is not taken; {instead}")


def _names_a_config(args: Any) -> bool:
    return getattr(args, "deepspeed_config", None) is not None


def _with(text: str, instead: str | None) -> str:
    return text if instead is None else f"{text}; {instead}"
