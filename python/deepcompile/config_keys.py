# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's configuration keys that this engine does not act on.

Two kinds, by section ("" is the top level). A *warned* key changes speed or
logging only: it is named in a ConfigWarning and ignored, unless it is switched
off. A *refused* key would change what is trained or where it runs: it is an
error unless it is switched off. Keys in neither table and in no dataclass of
config.py are unknown.
docs/config.md is checked against these tables by tests/python/test_config.py.
"""

PLANNED = "the plan decides this"
ORDERED = "instructions are ordered by streams and events"
BUDGET = "the plan offloads as much as compile.memory_budget asks"
LOGGING = "no such monitor here; use engine.report()"
ANY_RANKS = "every checkpoint loads on any number of ranks"
ONE_FOLDER = "checkpoints need one folder that all ranks see"

ADAM = ("lr", "betas", "eps", "weight_decay", "adam_w_mode")
"""What optimizer.params may hold, besides what is warned of or refused."""

WARNED: dict[str, dict[str, str]] = {
    "": {
        "activation_checkpointing": "checkpoint the model itself (torch.utils.checkpoint)",
        "comms_logger": LOGGING,
        "csv_monitor": LOGGING,
        "comet": LOGGING,
        "dump_state": "print(engine.config) shows the same",
        "flops_profiler": LOGGING,
        "load_universal_checkpoint": ANY_RANKS,
        "memory_breakdown": "engine.report() shows memory over the step",
        "tensorboard": LOGGING,
        "timers": "wall_clock_breakdown prints the times",
        "use_node_local_storage": ONE_FOLDER,
        "wandb": LOGGING,
        "zero_force_ds_cpu_optimizer": "there is one optimizer, on the parameters' device",
        "seq_parallel_communication_data_type": "there is no sequence parallelism",
    },
    "bf16": {
        "immediate_grad_update": "gradients are reduced as they appear",
        "check_grad_overflow": "bf16 has fp32's range",
    },
    "optimizer.params": {
        "fused": "the update is one pass over all states anyway",
        "torch_adam": "there is one Adam, with its states sharded",
    },
    "zero_optimization": {
        "allgather_bucket_size": PLANNED,
        "allgather_partitions": PLANNED,
        "contiguous_gradients": PLANNED,
        "gather_16bit_weights_on_model_save": "use engine.save_16bit_model()",
        "stage3_gather_16bit_weights_on_model_save": "use engine.save_16bit_model()",
        "ignore_unused_parameters": "unused parameters are always allowed",
        "load_from_fp32_weights": "checkpoints always hold fp32 weights",
        "log_trace_cache_warnings": "there is no trace cache",
        "overlap_comm": PLANNED,
        "pipeline_loading_checkpoint": "all ranks read at once",
        "reduce_bucket_size": PLANNED,
        "reduce_scatter": PLANNED,
        "round_robin_gradients": PLANNED,
        "stage3_max_live_parameters": PLANNED,
        "stage3_max_reuse_distance": PLANNED,
        "stage3_model_persistence_threshold": PLANNED,
        "stage3_module_granularity_threshold": PLANNED,
        "stage3_prefetch_bucket_size": PLANNED,
        "stage3_use_all_reduce_for_fetch_params": PLANNED,
        "sub_group_size": PLANNED,
        "use_multi_rank_bucket_allreduce": PLANNED,
        "memory_efficient_linear": "compiled regions save what the backward needs",
        "legacy_stage1": "there is one implementation",
    },
    "compile": {
        "backend": "it is engine.compile()'s argument",
        "enabled": "engine.compile() compiles, unless compile.deepcompile is false",
        "kwargs": "they are engine.compile()'s compile_kwargs",
        "double_buffer": "two reductions are always in turn",
        "free_activation": "liveness frees each activation after its last use",
        "free_activation_threshold": "liveness frees each activation after its last use",
        "keep_int_input_tensors": "no inputs are kept: nothing is replayed for profiling",
        "keep_all_input_tensors": "no inputs are kept: nothing is replayed for profiling",
        "offload_activation": BUDGET,
        "offload_activation_pin_memory": "host copies are always pinned",
        "offload_opt_states": BUDGET,
        "sync_before_reduce": ORDERED,
        "sync_after_reduce": ORDERED,
        "sync_before_allgather": ORDERED,
        "sync_after_allgather": ORDERED,
    },
    "checkpoint": {
        "tag_validation": "a tag that differs between ranks is always an error",
        "load_universal": ANY_RANKS,
        "use_node_local_storage": ONE_FOLDER,
        "parallel_write": "all ranks always write",
    },
}

WARNED_OFF = (None, False)
"""Values of a warned key that ask for nothing, so that nothing is said."""
NEVER_OFF = {
    "bf16": ("immediate_grad_update",),
    "zero_optimization": (
        "allgather_partitions",
        "contiguous_gradients",
        "ignore_unused_parameters",
        "load_from_fp32_weights",
        "overlap_comm",
        "reduce_scatter",
        "use_multi_rank_bucket_allreduce",
    ),
    "compile": ("enabled", "double_buffer"),
}
"""Warned keys whose false asks for something too, which is not done."""

# key -> (values that mean "off", what to do instead). A section is off when its `enabled` is
# false, or another of SWITCHES says so, or all that it holds is off.
OFF = (None, False, 0, "none", [])
SWITCHES = {"enabled": (None, False, 0), "device": (None, "none"), "autotp_size": (None, 0, 1)}
OFFLOAD = (
    "plans move optimizer states to the host and back as compile.memory_budget asks; remove it"
)
RESUMED = "engine.load_checkpoint() takes the schedule to its step"
LEAVES = "name the modules' classes in zero_optimization.leaf_module.classes"
REFUSED: dict[str, dict[str, tuple[tuple, str]]] = {
    "": {
        "aio": (OFF, "there is no NVMe offload; remove the section"),
        "amp": (OFF, 'use "bf16": {"enabled": true}'),
        "autotuning": (OFF, "remove the section"),
        "compression_training": (OFF, "remove the section"),
        "curriculum_learning": (OFF, "do it in the data loader"),
        "data_efficiency": (OFF, "do it in the data loader"),
        "disable_allgather": (OFF, "remove the key"),
        "eigenvalue": (OFF, "remove the section"),
        "elasticity": (OFF, "start the job with the number of ranks you want"),
        "fp32_allreduce": (OFF, 'set communication_data_type to "fp32" instead'),
        "gradient_predivide_factor": ((None, 1, 1.0), "gradients are averaged after the sum"),
        "graph_harvesting": (OFF, "remove the key"),
        "hybrid_engine": (OFF, "remove the section"),
        "nebula": (OFF, "use engine.save_checkpoint()"),
        "pipeline": (OFF, "pipeline parallelism is not available"),
        "prescale_gradients": (OFF, "gradients are averaged after the sum"),
        "progressive_layer_drop": (OFF, "do it in the model"),
        "quantize_training": (OFF, "remove the section"),
        "sequence_parallel_size": ((None, 1), "sequence parallelism is not available"),
        "sparse_attention": (OFF, "do it in the model"),
        "sparse_gradients": (OFF, "gradients are dense; remove the key"),
        "tensor_parallel": (OFF, "tensor parallelism is not available"),
        "torch_autocast": (OFF, "wrap the model's forward in torch.autocast, or use bf16"),
        "use_data_before_expert_parallelism": (OFF, "expert parallelism is not available"),
        "weight_quantization": (OFF, "remove the section"),
    },
    "bf16": {
        "bf16_master_weights_and_grads": (OFF, "master weights are fp32"),
        "bf16_optimizer_states": (OFF, "optimizer states are fp32"),
    },
    "fp16": {
        "auto_cast": (OFF, "convert the inputs that are floating-point numbers"),
        "fp16_master_weights_and_grads": (OFF, "master weights are fp32"),
        "fp16_optimizer_states": (OFF, "optimizer states are fp32"),
    },
    "optimizer": {"legacy_fusion": (OFF, "remove the key")},
    "optimizer.params": {
        "amsgrad": ((False, None), "remove it"),
        "bias_correction": ((True, None), "remove it"),
        "max_grad_norm": ((0, 0.0, False, None), "set gradient_clipping instead"),
    },
    "scheduler.params": {
        "last_batch_iteration": ((-1, None), RESUMED),
        "last_epoch": ((-1, None), RESUMED),
    },
    "zero_optimization": {
        "cpu_offload": (OFF, OFFLOAD),
        "cpu_offload_params": (OFF, "parameters stay on the device; remove the key"),
        "elastic_checkpoint": (OFF, ANY_RANKS),
        "mics_shard_size": ((None, -1, 0), "parameters are sharded over all ranks"),
        "mics_hierarchical_params_gather": (OFF, "parameters are sharded over all ranks"),
        "offload_optimizer": (OFF, OFFLOAD),
        "offload_param": (OFF, "parameters stay on the device; remove the section"),
        "override_module_apply": (OFF, "modules are not patched; remove the key"),
        "zenflow": (OFF, OFFLOAD),
        "zero_hpz_partition_size": ((None, 1), "parameters are sharded over all ranks"),
        "zero_quantized_gradients": (OFF, "set communication_data_type instead"),
        "zero_quantized_weights": (OFF, "remove the key"),
        "zero_quantized_nontrainable_weights": (OFF, "remove the key"),
        "zeropp_loco_param": (OFF, "remove the section"),
    },
    "compile": {
        "offload_parameters": (OFF, "parameters stay on the device; set compile.memory_budget"),
        "symmetric_memory": (OFF, 'set compile.gather to "copy_engine" instead'),
    },
    "checkpoint": {"writer": (OFF, "all ranks write, each its part; remove the key")},
    "data_types": {},
    "leaf_module": {"names": (OFF, LEAVES), "name_suffixes": (OFF, LEAVES)},
}


def says_nothing(section: str, key: str, value: object) -> bool:
    """Whether a warned key's value asks for nothing that is not so anyway."""
    return key not in NEVER_OFF.get(section, ()) and is_off(value, WARNED_OFF)


def is_off(value: object, off: tuple) -> bool:
    """Whether a key's value switches its feature off."""
    if isinstance(value, dict):
        for name, values in SWITCHES.items():
            if name in value:
                return value[name] in values
        return all(is_off(each, off) for each in value.values())
    return any(value is item or (type(value) is type(item) and value == item) for item in off)
