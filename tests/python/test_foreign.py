# SPDX-License-Identifier: Apache-2.0
"""Calls of DeepSpeed's and FSDP2's scripts: those that work, and what the others are told."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import deepcompile
from deepcompile import foreign
from deepcompile.errors import UserError

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def start(**kwargs):
    kwargs.setdefault("config", CONFIG)
    torch.manual_seed(0)
    return deepcompile.initialize(model=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), **kwargs)


@pytest.fixture
def engine():
    return start()[0]


def step(engine):
    loss = engine(torch.ones(4, 8)).sum()
    engine.backward(loss)
    engine.step()


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("no_sync", "gradient_accumulation_steps"),
        ("set_requires_gradient_sync", "gradient_accumulation_steps"),
        ("offload_states", "compile.memory_budget"),
        ("unshard", "GatheredParameters"),
        ("clip_grad_norm_", "gradient_clipping"),
        ("train_batch", "engine.backward"),
        ("optimizer_state_dict", "save_checkpoint"),
        ("get_mom", "optimizer.param_groups"),
        ("get_type", "engine.config"),
        ("get_batch_info", "gradient_accumulation_steps"),
        ("get_data_parallel_rank", "global_rank"),
        ("register_comm_hook", "communication_data_type"),
        ("set_gradient_divide_factor", "communication_data_type"),
    ],
)
def test_what_the_engine_does_not_have_names_what_stands_for_it(engine, name, instead):
    assert not hasattr(engine, name)
    with pytest.raises(AttributeError, match=f"nor Sequential has '{name}'; .*{instead}"):
        getattr(engine, name)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("zero", 'torch.device."meta".'),
        ("init_distributed", "initialize"),
        ("utils", r"engine.state_dict\(fp32=True\).*GatheredParameters.*get_global_grad_norm"),
        ("safe_get_full_grad", "get_global_grad_norm"),
        ("get_accelerator", "torch.cuda"),
        ("moe", "no expert parallelism"),
        ("pipe", "pipeline parallelism"),
        ("runtime", "deepcompile.lr_schedules"),
        ("nope", "'nope'$"),
    ],
)
def test_what_the_package_does_not_have_does_too(name, instead):
    with pytest.raises(AttributeError, match=f"no attribute '{name}'|{instead}") as caught:
        getattr(deepcompile, name)
    assert caught.match(instead)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"args": SimpleNamespace(deepspeed_config="x.json")}, "config=args.deepspeed_config"),
        ({"config_params": {}}, "config_params: is not taken; it is config="),
        ({"training_data": 5}, "training_data: int is no dataset"),
        ({"training_data": torch.utils.data.DataLoader([1])}, "DataLoader is no dataset"),
    ],
)
def test_arguments_of_initialize_that_are_not_taken(kwargs, message):
    with pytest.raises(UserError, match=message):
        start(**kwargs)


def test_arguments_of_initialize_that_say_nothing():
    start(args=SimpleNamespace(local_rank=0), mpu=None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nope'"):
        start(nope=None)


def test_a_configuration_may_be_text():
    assert start(config=json.dumps(CONFIG))[0].train_batch_size() == 4
    with pytest.raises(UserError, match=r"\[config\] config:1:2: not valid JSON"):
        start(config="{,}")


def test_the_model_cannot_be_cast(engine):
    with pytest.raises(UserError, match=r"\[engine\] half: .*bf16"):
        engine.half()
    for args, kwargs in ((("cpu", torch.bfloat16), {}), ((), {"dtype": torch.bfloat16})):
        with pytest.raises(UserError, match=r"\[engine\] to: .*bf16"):
            engine.to(*args, **kwargs)
    engine.to("cpu")
    step(engine)


@pytest.mark.parametrize(
    ("method", "given", "instead"),
    [
        ("backward", {"scale_wrt_gas": False}, "gradient_accumulation_steps"),
        ("step", {"lr_kwargs": {"epoch": 1}}, "a scheduler of your own"),
        ("compile", {"mode": "max-autotune"}, "compile_kwargs"),
        ("save_checkpoint", {"save_latest": False}, "tag="),
        ("load_checkpoint", {"load_module_strict": False}, r"before initialize\(\)"),
        ("save_16bit_model", {"exclude_frozen_parameters": True}, r"state_dict\(\)"),
    ],
)
def test_arguments_of_methods_name_what_stands_for_them(method, given, instead):
    name = next(iter(given))
    with pytest.raises(
        UserError, match=rf"\[engine\] {method}: {name}=.* is not taken; .*{instead}"
    ):
        foreign.check_call(method, given)
    with pytest.raises(TypeError, match=rf"{method}\(\) got an unexpected keyword argument 'nope'"):
        foreign.check_call(method, {"nope": 1})


def test_arguments_of_methods_that_ask_for_nothing():
    foreign.check_call("save_checkpoint", {"save_latest": True, "exclude_frozen_parameters": False})
    foreign.check_call("step", {"lr_kwargs": None})
    foreign.check_call("load_checkpoint", {})


def test_the_optimizers_states_are_in_checkpoints_alone(engine):
    with pytest.raises(UserError, match="save_checkpoint"):
        engine.optimizer.state_dict()
    with pytest.raises(UserError, match="load_checkpoint"):
        engine.optimizer.load_state_dict({})


def test_gathered_parameters_without_an_engine(engine):
    with pytest.raises(UserError, match="the engine comes first"):
        deepcompile.GatheredParameters(engine.module[0].weight)


def test_checkpoints_by_deepspeeds_names(engine, tmp_path):
    step(engine)
    engine.save_checkpoint(save_dir=tmp_path, tag="mine", client_state={"epoch": 1})
    with pytest.raises(UserError, match="tag 5: must be text"):
        engine.save_checkpoint(tmp_path, tag=5)
    other = start()[0]
    folder, state = other.load_checkpoint(load_dir=tmp_path, load_module_only=True)
    assert folder == str(tmp_path / "mine") and state == {"epoch": 1}
    assert other.runtime.optimizer_steps() == 0 and engine.runtime.optimizer_steps() == 1
    assert torch.equal(other.state_dict()["0.weight"], engine.state_dict()["0.weight"])
    engine.save_16bit_model(save_dir=tmp_path, save_filename="m.bin")
    assert set(torch.load(tmp_path / "m.bin")) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_numbers(engine, monkeypatch):
    step(engine)
    assert engine.global_samples == 4 and not engine.fp16_enabled()
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert engine.local_rank == 3
