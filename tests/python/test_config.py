# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed-style configuration: every key supported, warned about, refused, or an error."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest

from deepcompile import UserError, config_keys
from deepcompile.config import (
    SECTIONS,
    Config,
    ConfigWarning,
    load_config,
    resolve_batch,
    supported_keys,
)

DOCS = Path(__file__).parents[2] / "docs" / "config.md"


def load(**keys) -> Config:
    return load_config({"train_batch_size": 1, **keys})


def error_of(source) -> str:
    with pytest.raises(UserError) as caught:
        load_config(source)
    return str(caught.value)


def test_defaults():
    config = load()
    assert (config.stage, config.gradient_clipping, config.bf16.enabled) == (0, 0.0, False)
    assert config.reduce_dtype == "f32"
    assert config.warnings == ()


def test_deepspeed_file(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": 4,
                "bf16": {"enabled": True},
                "fp16": {"enabled": False, "loss_scale": 0},
                "gradient_clipping": 1,
                "zero_optimization": {
                    "stage": 3,
                    "overlap_comm": True,
                    "stage3_param_persistence_threshold": 1e5,
                    "offload_optimizer": {"device": "none"},
                },
                "optimizer": {"type": "adamw", "params": {"lr": 2e-5, "betas": [0.9, 0.95]}},
                "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
                "compile": {"deepcompile": True, "passes": ["z3"], "double_buffer": True},
            }
        )
    )
    with pytest.warns(ConfigWarning, match="(overlap_comm|double_buffer) has no effect"):
        config = load_config(path).with_batch(world=2)
    assert config.train_batch_size == 16 and config.optimizer.type == "AdamW"
    assert config.stage == 3 and config.bf16.enabled and config.reduce_dtype == "bf16"
    assert config.zero_optimization.stage3_param_persistence_threshold == 100_000
    assert len(config.warnings) == 2


@pytest.mark.parametrize(
    ("given", "world", "expected"),
    [
        ((8, 2, 2), 2, (8, 2, 2)),
        ((8, 2, None), 2, (8, 2, 2)),
        ((8, None, 2), 2, (8, 2, 2)),
        ((None, 2, 2), 2, (8, 2, 2)),
        ((8, None, None), 2, (8, 4, 1)),
        ((None, 2, None), 4, (8, 2, 1)),
    ],
)
def test_batch_rules(given, world, expected):
    assert resolve_batch(*given, world) == expected


@pytest.mark.parametrize(
    ("given", "world"),
    [((8, 2, 2), 4), ((8, 3, None), 1), ((2, None, None), 4), ((4, 4, None), 2), ((7, None, 2), 1)],
)
def test_batch_that_does_not_fit_names_the_numbers(given, world):
    with pytest.raises(UserError, match=f"do not fit {world} rank") as caught:
        resolve_batch(*given, world)
    assert f"train_batch_size {given[0]}" in str(caught.value)


def test_adams_other_keys():
    def given(**params):
        return load_config({"optimizer": {"type": "AdamW", "params": params}})

    with pytest.warns(ConfigWarning, match="optimizer.params.fused has no effect: the update"):
        assert len(given(fused=True, torch_adam=False, lr=1e-4).warnings) == 1
    assert given(amsgrad=False, bias_correction=True, max_grad_norm=0).warnings == ()
    for params, message in (
        ({"amsgrad": True}, "amsgrad: True is not supported: remove it"),
        ({"bias_correction": False}, "bias_correction: False is not supported: remove it"),
        ({"max_grad_norm": 1.0}, "max_grad_norm: 1.0 is not supported: set gradient_clipping"),
        ({"lr": "auto"}, 'lr: "auto" is for trainers'),
    ):
        with pytest.raises(UserError, match=message):
            given(**params)


def test_batch_missing():
    with pytest.raises(UserError, match="give train_batch_size or"):
        load_config({}).with_batch(1)


def test_missing_file(tmp_path):
    assert error_of(tmp_path / "none.json").endswith("none.json: no such file; check the path")


def test_malformed_json_says_where(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('{\n  "bf16": {"enabled": true},\n  "optimizer": }\n')
    assert "bad.json:3:16: not valid JSON" in error_of(path)


def test_duplicate_key(tmp_path):
    path = tmp_path / "twice.json"
    path.write_text('{"train_batch_size": 1, "train_batch_size": 2}')
    assert "train_batch_size: appears twice" in error_of(path)


@pytest.mark.parametrize("text", ["[]", "3", '"x"'])
def test_json_that_is_no_object(tmp_path, text):
    path = tmp_path / "c.json"
    path.write_text(text)
    assert "must hold one JSON object" in error_of(path)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"train_batchsize": 1}, 'train_batchsize: unknown key; did you mean "train_batch_size"?'),
        ({"zero_optimization": {"stge": 3}}, 'zero_optimization.stge: unknown key; did you mean "'),
        ({"xyzzy": 1}, "xyzzy: unknown key; remove it"),
        ({"compile": {"deep_compile": True}}, 'did you mean "deepcompile"?'),
        ({"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}}, "learning_rate"),
    ],
)
def test_unknown_key_suggests(keys, expected):
    assert expected in error_of(keys)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"zero_optimization": {"stage": 4}}, "stage 4 does not exist; use 0, 1, 2 or 3"),
        ({"fp16": {"auto_cast": True}}, "fp16.auto_cast: True is not supported"),
        ({"amp": {"enabled": True}}, "amp"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"compile": {"offload_parameters": True}}, "compile.offload_parameters"),
        ({"compile": {"symmetric_memory": True}}, 'compile.gather to "copy_engine" instead'),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor parallelism is not available"),
        ({"bf16": {}, "bfloat16": {}}, "bf16: is given twice, as bf16 and bfloat16; keep one"),
        ({"checkpoint": {"writer": {"type": "fast"}}}, "checkpoint.writer"),
        ({"zero_optimization": {"leaf_module": {"names": ["a"]}}}, "leaf_module.classes"),
        ({"compile": {"passes": ["z1"]}}, "compile.passes: 'z1' is not available with stage 0"),
        ({"compile": {"passes": ["autosp"]}}, "compile.passes: 'autosp' is not available"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type: must be one of Adam, AdamW"),
        ({"optimizer": {"type": "AdmaW"}}, "not 'AdmaW'; did you mean \"AdamW\"?"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype"),
        ({"scheduler": {"params": {}}}, "scheduler.type: is missing"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "auto"),
    ],
)
def test_refused(keys, expected):
    assert expected in error_of(keys)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"betas": [0.9]}, "betas: must be two numbers such as [0.9, 0.999], not [0.9]"),
        ({"betas": [0.9, 0.99, 0.9]}, "betas: must be two numbers"),
        ({"betas": 0.9}, "betas: must be two numbers such as [0.9, 0.999], not 0.9"),
        ({"betas": [0.9, 1]}, "betas: must be a fraction below 1"),
        ({"betas": [0.9, "much"]}, "betas: must be a number, not 'much'"),
        ({"lr": "fast"}, "lr: must be a number, not 'fast'"),
        ({"lr": True}, "lr: must be a number"),
        ({"lr": float("nan")}, "lr: must be a finite number"),
        ({"eps": -1}, "eps: must be at least 0"),
        ({"weight_decay": [0.1]}, "weight_decay: must be a number"),
        ({"adam_w_mode": "no"}, "adam_w_mode: must be true or false"),
    ],
)
def test_wrong_optimizer_params(params, expected):
    said = error_of({"optimizer": {"type": "AdamW", "params": params}})
    assert said.startswith(f"[config] optimizer.params.{expected}")


def test_numbers_of_an_optimizer_may_be_text():
    params = {"lr": "3e-4", "betas": ["0.9", 0.95], "eps": None}
    config = load(optimizer={"type": "AdamW", "params": params})
    assert config.optimizer.params == {"lr": 3e-4, "betas": [0.9, 0.95]}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"train_batch_size": "auto"}, '"auto" is for trainers'),
        ({"train_batch_size": 0}, "must be at least 1"),
        ({"train_batch_size": 1.5}, "whole number"),
        ({"train_batch_size": True}, "must be a number"),
        ({"gradient_clipping": -1}, "must be at least 0"),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled: must be true or false"),
        ({"bf16": {"enabled": "auto"}}, 'bf16.enabled: "auto" is for trainers that fill it in; gi'),
        ({"fp16": {"enabled": "auto"}}, 'fp16.enabled: "auto" is for trainers that fill it in; gi'),
        ({"steps_per_print": 10.5}, "steps_per_print: must be a whole number"),
        ({"bf16": True}, "bf16: must be an object"),
        ({"communication_data_type": "int8"}, "must be one of fp32"),
        ({"compile": {"differentiable_outputs": ["loss"]}}, "must be one of all, loss"),
        ({"compile": {"passes": "z3"}}, "must be a list of strings"),
        ({"compile": {"timeout_s": 0}}, "must be greater than 0"),
        ({"compile": {"memory_budget": "20 parsecs"}}, 'must be bytes, "20GiB" or a fraction'),
        ({"compile": {"memory_budget": 0}}, "must be greater than 0"),
        ({"compile": {"memory_budget": 1.5}}, "must be whole bytes or a fraction of 1"),
        ({"compile": {"memory_reserve": 1.0}}, "must be a fraction below 1"),
        ({"compile": {"schedule": [[0]]}}, "[0] is not [step, [passes]]"),
        ({"compile": {"schedule": "best"}}, 'must be "auto" or a list of'),
        ({"compile": {"causal_attention": True}}, "must be one of auto, on, off"),
        ({"compile": {"embedding_rows": "rows"}}, "must be one of auto, on, off"),
        ({"compile": {"experts": "eager"}}, "one of auto, model, grouped_mm, batched_mm"),
        ({"compile": {"loss_only": "auto"}}, "compile.loss_only: must be true or false"),
    ],
)
def test_wrong_values(keys, expected):
    assert expected in error_of(keys)


def test_off_values_of_refused_keys_pass():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(amp={"enabled": False}, sparse_gradients=False, gradient_predivide_factor=1.0,
             zero_optimization={"offload_param": None}, sequence_parallel_size=1)  # fmt: skip
        load(
            tensor_parallel={"autotp_size": 1, "tp_grain_size": 8},
            checkpoint={"writer": None},
            optimizer={"legacy_fusion": False},
            fp32_allreduce=False,
            weight_quantization={},
            zero_optimization={
                "leaf_module": {"names": [], "name_suffixes": []},
                "pipeline_loading_checkpoint": False,
                "zenflow": None,
            },
        )


def test_warned_keys_that_are_switched_off_say_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(
            wandb={"enabled": False, "team": "ours"},
            csv_monitor={},
            timers={"throughput": {"enabled": False}},
            activation_checkpointing={"partition_activations": False, "number_checkpoints": None},
            use_node_local_storage=False,
            load_universal_checkpoint=False,
            zero_optimization={"stage3_gather_16bit_weights_on_model_save": False},
            compile={
                "free_activation": False, "offload_activation": False, "sync_after_reduce": False,
                "offload_opt_states": False, "keep_all_input_tensors": False,
            },
        )  # fmt: skip


@pytest.mark.parametrize(
    "keys",
    [
        {"wandb": {"enabled": True}},
        {"activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": True}},
        {"load_universal_checkpoint": True},
        {"zero_optimization": {"overlap_comm": False}},
        {"zero_optimization": {"ignore_unused_parameters": False}},
        {"compile": {"double_buffer": False}},
        {"compile": {"enabled": True}},
        {"compile": {"enabled": False}},
        {"compile": {"sync_after_reduce": True}},
    ],
)
def test_warned_keys_that_ask_for_something(keys):
    with pytest.warns(ConfigWarning, match="has no effect"):
        assert len(load(**keys).warnings) == 1


def test_a_breakdown_that_is_never_printed_is_said():
    with pytest.warns(ConfigWarning, match="wall_clock_breakdown .*; set steps_per_print"):
        load(wall_clock_breakdown=True)
    assert load(wall_clock_breakdown=True, steps_per_print=10).warnings == ()


def test_accelerates_interval_is_never():
    assert load_config('{"steps_per_print": Infinity}').steps_per_print == 0


def test_bf16_by_its_other_name():
    assert load(bfloat16={"enabled": True}).compute_dtype == "bf16"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("20GiB", 20 << 30), ("1.5 GB", 1_500_000_000), ("512MiB", 512 << 20), ("4096", 4096),
        (1 << 30, 1 << 30), (0.6, 0.6), (1, 1.0), ("0.5", 0.5), ("1", 1.0), ("1B", 1), ("0.5B", 1),
    ],
)  # fmt: skip
def test_memory_budget(given, expected):
    budget = load(compile={"memory_budget": given}).compile.memory_budget
    assert budget == expected and isinstance(budget, type(expected))


def test_schedule():
    assert load().compile.schedule == "auto"
    config = load(compile={"schedule": [[0, ["zero3_compile"]], [3, ["auto"]]]})
    assert config.compile.schedule == ((0, ("zero3_compile",)), (3, ("auto",)))


def test_a_misspelt_pass_is_said_before_it_is_used():
    with pytest.warns(ConfigWarning, match="'prefech'; did you mean \"prefetch\""):
        load_config({"compile": {"schedule": [[0, ["zero3_compile", "prefech"]]]}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a pass of the user's, registered later
        load(compile={"schedule": [[0, ["zero3_compile", "mine"]]]})


@pytest.mark.parametrize(("stage", "name"), [(1, "z1"), (2, "z1"), (3, "z3")])
def test_deepspeeds_passes_of_each_stage(stage, name):
    config = load(zero_optimization={"stage": stage}, compile={"passes": [name]})
    assert config.stage == stage


def test_null_means_default():
    assert load(gradient_clipping=None).gradient_clipping == 0.0


def test_reduce_dtype():
    assert load(communication_data_type="fp32", bf16={"enabled": True}).reduce_dtype == "f32"


def test_every_key_has_a_meaning_and_one_place():
    for section in ["", *SECTIONS]:
        kinds = [set(supported_keys(section)), set(config_keys.WARNED.get(section, {})),
                 set(config_keys.REFUSED.get(section, {}))]  # fmt: skip
        assert sum(map(len, kinds)) == len(set.union(*kinds)), section


def test_docs_table_is_complete():
    rows = re.findall(r"^\| `([\w.]+)` \| (\w+) \|", DOCS.read_text(), re.M)
    documented = dict(rows)
    assert len(rows) == len(documented)
    expected = {}
    for section in ["", *SECTIONS]:
        prefix = {"": "", "leaf_module": "zero_optimization.leaf_module."}.get(
            section, section + "."
        )
        for key in supported_keys(section):
            if key not in SECTIONS:
                expected[prefix + key] = "supported"
        for part, before in ((section, prefix), (f"{section}.params", f"{section}.params.")):
            expected |= {before + k: "warned" for k in config_keys.WARNED.get(part, {})}
            expected |= {before + k: "refused" for k in config_keys.REFUSED.get(part, {})}
    assert documented == expected
