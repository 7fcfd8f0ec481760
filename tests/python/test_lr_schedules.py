# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules: values worked out by hand, and torch's own by name."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from deepcompile import UserError, initialize
from deepcompile.config import SchedulerConfig, load_config
from deepcompile.lr_schedules import OneCycle, WarmupCosineLR, WarmupDecayLR, WarmupLR
from deepcompile.lr_schedules import build_scheduler as build


def adamw(lr=1.0, groups=1):
    return torch.optim.AdamW(
        [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(groups)], lr=lr
    )


def run(schedule, steps):
    """Rate before the first step, and after each of `steps` scheduler steps."""
    optimizer = schedule.optimizer
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_warmup_linear():
    # t = -1: the lowest; then low + (high - low) * t / 4 for t = 0, 1, 2, 3; then high.
    schedule = WarmupLR(adamw(), 0.2, 1.0, warmup_num_steps=4, warmup_type="linear")
    assert run(schedule, 6) == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_warmup_log():
    # log(t + 1) / log(4)
    schedule = WarmupLR(adamw(), 0.0, 1.0, warmup_num_steps=4)
    assert run(schedule, 5) == pytest.approx([0, 0, 0.5, math.log(3) / math.log(4), 1, 1])


def test_warmup_takes_the_optimizers_rate():
    schedule = WarmupLR(adamw(lr=0.5), warmup_num_steps=2, warmup_type="linear")
    assert run(schedule, 4)[-1] == 0.5


def test_warmup_decay():
    # Up over t = 0, 1; then (6 - t) / (6 - 2) for t = 2 .. 6, and 0 after.
    schedule = WarmupDecayLR(adamw(), 6, 0.0, 1.0, warmup_num_steps=2, warmup_type="linear")
    expected = [0, 0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]
    assert run(schedule, 8) == pytest.approx(expected)


def test_warmup_cosine():
    # t = 2 is 1 of 4 steps along the half cosine; from t = 5 on, the end ratio.
    schedule = WarmupCosineLR(
        adamw(lr=2.0), 6, warmup_num_steps=2, cos_min_ratio=0.1, warmup_type="linear"
    )
    rates = run(schedule, 8)
    assert rates[:3] == pytest.approx([0, 0, 1.0])
    quarter = 2 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[3] == pytest.approx(quarter)
    assert rates[6:] == pytest.approx([0.2, 0.2, 0.2])


def test_one_cycle():
    # Half cycles of 2 steps; the first scheduler step is already 1 along. Then decay by
    # 1 / (1 + rate * (t - 4 + 1)).
    schedule = OneCycle(
        adamw(), 0.0, 1.0, decay_lr_rate=1.0, cycle_first_step_size=2, decay_step_size=1,
        cycle_min_mom=0.8, cycle_max_mom=0.9,
    )  # fmt: skip
    group = schedule.optimizer.param_groups[0]
    assert group["betas"] == (0.8, 0.99)
    rates = run(schedule, 3)
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5])
    assert group["betas"][0] == pytest.approx(0.85)


def test_one_cycle_decay_and_stairs():
    schedule = OneCycle(adamw(), 0.5, 1.0, decay_lr_rate=1.0, cycle_first_step_size=2,
                        decay_step_size=1, cycle_momentum=False)  # fmt: skip
    # t = 3 begins the next cycle at its lowest; t = 4: 0.5 / (1 + 1); t = 5: 0.5 / 3.
    assert run(schedule, 6)[4:] == pytest.approx([0.5, 0.25, 0.5 / 3])
    stairs = OneCycle(adamw(), 0.0, 1.0, cycle_first_step_size=4, cycle_first_stair_count=2)
    assert run(stairs, 7) == pytest.approx([0, 0, 0.5, 0.5, 1, 0.5, 0.5, 0])


def test_one_value_a_group():
    schedule = WarmupLR(adamw(groups=2), [0.1, 0.2], [1.0, 2.0], 2, "linear")
    run(schedule, 4)
    assert [g["lr"] for g in schedule.optimizer.param_groups] == [1.0, 2.0]


def test_state_goes_on_where_it_stopped():
    def make():
        return WarmupDecayLR(adamw(), 20, 0.0, 1.0, warmup_num_steps=5)

    whole = run(make(), 10)
    first = make()
    run(first, 4)
    second = make()
    second.load_state_dict(first.state_dict())
    assert run(second, 6)[1:] == pytest.approx(whole[5:])


def test_torch_schedule_by_name():
    config = SchedulerConfig("StepLR", {"step_size": 2, "gamma": 0.5})
    assert run(build(adamw(), config), 4) == [1.0, 1.0, 0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SchedulerConfig("Nope", {}), "'Nope' is not available; use one of WarmupLR"),
        (SchedulerConfig("WarmupLR", {"steps": 3}), "scheduler.params.steps: WarmupLR takes"),
        (SchedulerConfig("WarmupDecayLR", {}), "total_num_steps"),
        (SchedulerConfig("WarmupLR", {"warmup_num_steps": -1}), "whole number, at least 0"),
        (SchedulerConfig("WarmupLR", {"warmup_type": "cubic"}), "must be log or linear"),
        (SchedulerConfig("WarmupLR", {"warmup_max_lr": [1, 2]}), "2 values for 1 parameter group"),
        (SchedulerConfig("WarmupLR", {"warmup_num_steps": "auto"}), '"auto"'),
        (SchedulerConfig("WarmupCosinLR", {}), 'available; did you mean "WarmupCosineLR"? use'),
        (SchedulerConfig("WarmupLR", {"warmup_num_step": 3}), 'mean "warmup_num_steps"?'),
        (SchedulerConfig("WarmupDecayLR", {"total_num_steps": "many"}), "total_num_steps: must be"),
        (SchedulerConfig("WarmupCosineLR", {"total_num_steps": 9.5}), "must be a whole number"),
        (SchedulerConfig("WarmupCosineLR", {"total_num_steps": 0}), "must be a positive whole"),
        (SchedulerConfig("WarmupCosineLR", {"total_num_steps": [9]}), "total_num_steps: must be"),
        (SchedulerConfig("OneCycle", {"cycle_min_lr": "low"}), "cycle_min_lr: must be a number"),
        (SchedulerConfig("OneCycle", {"cycle_momentum": 1}), "cycle_momentum: must be true"),
        (SchedulerConfig("WarmupLR", {"warmup_max_lr": ["x"]}), "warmup_max_lr: must be a number"),
        (SchedulerConfig("WarmupLR", {"warmup_type": 3}), "warmup_type: must be a string"),
        (SchedulerConfig("ExponentialLR", {"gamma": "fast"}), "gamma: must be a number"),
        (SchedulerConfig("MultiStepLR", {"milestones": 3}), "milestones: must be a list"),
        (SchedulerConfig("WarmupLR", {"last_batch_iteration": 3}), "load_checkpoint() takes"),
        (SchedulerConfig("StepLR", {"step_size": 1, "last_epoch": 3}), "load_checkpoint() takes"),
    ],
)
def test_errors(config, expected):
    with pytest.raises(UserError) as caught:
        build(adamw(), config)
    assert expected in str(caught.value)
    if "2 values" not in expected:  # the file does not say how many groups there are
        with pytest.raises(UserError) as caught:
            load_config({"scheduler": {"type": config.type, "params": config.params}})
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("WarmupLR", {"warmup_max_lr": [1, 2], "warmup_min_lr": 0, "last_batch_iteration": -1}),
        ("WarmupDecayLR", {"total_num_steps": 500}),
        ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 1}),
        ("MultiStepLR", {"milestones": [1, 2, 3], "last_epoch": -1}),
        ("OneCycleLR", {"max_lr": [0.1, 0.2, 0.3], "total_steps": 10}),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": [1, 2]}),
    ],
)
def test_the_configuration_takes_what_some_optimizer_could(name, params):
    """Warnings are those of the schedule itself, once."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_config({"scheduler": {"type": name, "params": params}}).scheduler.type == name


def test_a_wrong_section_is_said_before_the_model_is_taken_apart():
    model = torch.nn.Linear(400, 400)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW"},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    }
    with pytest.raises(UserError, match='warmup_num_steps: "auto"'):
        initialize(model=model, config=config)
    initialize(model=model, config={**config, "scheduler": None})


@pytest.mark.parametrize("name", ["WarmupDecayLR", "WarmupCosineLR"])
def test_numbers_may_be_text_and_null_is_the_default(name):
    """As text they used to be an error of engine.step(), where the warm-up ended."""
    params = {"total_num_steps": "6", "warmup_num_steps": "2.0", "warmup_type": None}
    numbers = {"total_num_steps": 6, "warmup_num_steps": 2}
    text, plain = (build(adamw(), SchedulerConfig(name, each)) for each in (params, numbers))
    assert run(text, 6) == run(plain, 6)
    milestones = SchedulerConfig("MultiStepLR", {"milestones": ["1", 2], "gamma": "0.5"})
    assert run(build(adamw(), milestones), 3) == [1.0, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    "params",
    [{"total_num_steps": 10, "warmup_num_steps": 100}, {"total_num_steps": 500}],
)
@pytest.mark.parametrize("name", ["WarmupDecayLR", "WarmupCosineLR"])
def test_a_run_shorter_than_its_warm_up_is_said(name, params):
    total = params["total_num_steps"]
    with pytest.warns(UserWarning, match=f"total_num_steps {total} is over before the warm-up"):
        build(adamw(), SchedulerConfig(name, params))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(adamw(), SchedulerConfig(name, {"total_num_steps": 5000}))


def test_a_total_that_is_no_number_is_said_without_a_configuration_too():
    with pytest.raises(UserError, match="total_num_steps must be a positive whole number, not '1"):
        WarmupCosineLR(adamw(), "100")
