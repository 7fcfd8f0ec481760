# SPDX-License-Identifier: Apache-2.0
"""Accumulation, clipping, evaluation between steps, bf16, schedules, passes: on two ranks."""

from __future__ import annotations

import copy
import itertools

import cases
import numpy as np
import pytest
import torch
from ranks import run_ranks

TOLERANCE = 1e-5

pytestmark = pytest.mark.timeout(600)


def trained(world: int, *runs: dict) -> list[dict]:
    return run_ranks(cases.train_all, world, list(runs), timeout=400)[0]


def test_accumulation_clipping_schedule_and_evaluation():
    step_lr = {"type": "StepLR", "params": {"step_size": 5, "gamma": 0.5}}
    both = {"gradient_clipping": 0.5, "scheduler": step_lr, "evaluate_every": 3}
    clipped, eager, accumulated = trained(
        2,
        {"name": "llama", **both},
        {"name": "llama", "backend": None, **both},
        {"name": "llama", "accumulation": 2, **both},
    )
    expected = cases.reference("llama", clip=0.5, schedule=True)
    assert min(expected["norms"]) > 0.5, "clipping must matter in this test"
    for result in (clipped, eager, accumulated):
        assert cases.worst(result, expected) < TOLERANCE
        np.testing.assert_allclose(result["norms"], expected["norms"], rtol=1e-5)


def test_four_micro_batches_a_step():
    compiled, eager = trained(
        1,
        {"name": "gpt2", "accumulation": 4},
        {"name": "gpt2", "accumulation": 4, "backend": None},
    )
    for result in (compiled, eager):
        assert cases.worst(result, cases.reference("gpt2")) < TOLERANCE


def test_bf16_with_fp32_masters():
    runs = [
        {"name": "llama", "bf16": {"enabled": True}},
        {"name": "llama", "bf16": {"enabled": True}, "backend": None},
        {"name": "llama", "bf16": {"enabled": True}, "communication_data_type": "fp32"},
        {"name": "llama", "bf16": {"enabled": True}, "stage": 0},
    ]
    compiled, eager, wide, replicated = trained(2, *runs)
    expected = cases.reference("llama", dtype=torch.bfloat16)
    exact = cases.reference("llama")
    # Rounding alone moves a bf16 run this far from fp32; two bf16 runs are as far apart.
    spread = cases.worst(expected, exact)
    for result in (compiled, eager, wide):
        assert cases.worst(result, expected) < 2 * spread
    assert compiled["losses"] == replicated["losses"]
    for key, value in compiled["state"].items():
        assert np.array_equal(value, replicated["state"][key]), key


def test_fp16_with_a_loss_scale():
    """The first factors are too large, so that steps are left out."""
    numbers = {"initial_scale_power": 22, "hysteresis": 1, "loss_scale_window": 8}
    fp16 = {"fp16": {"enabled": True, **numbers}, "gradient_clipping": 0.5}
    runs = [
        {"name": "llama", **fp16},
        {"name": "llama", **fp16, "backend": None},
        {"name": "llama", **fp16, "accumulation": 2},
        {"name": "llama", **fp16, "stage": 0},
    ]
    results = trained(2, *runs)
    kind = {"clip": 0.5, "dtype": torch.float16, "scale": 2.0**12}
    spread = cases.worst(cases.reference("llama", **kind), cases.reference("llama", clip=0.5))
    for result in results:
        left_out = frozenset(np.flatnonzero(~np.isfinite(result["norms"])).tolist())
        assert left_out >= {0, 1} and 3 <= len(left_out) == result["skipped"] < cases.STEPS // 2
        expected = cases.reference("llama", **kind, left_out=left_out)
        assert cases.worst(result, expected) < 2 * spread
        for step, (before, after) in enumerate(itertools.pairwise([2.0**22, *result["scales"]])):
            assert after / before == 0.5 if step in left_out else after / before in (1, 2)
    compiled, *_, replicated = results
    assert compiled["losses"] == replicated["losses"]
    for key, value in compiled["state"].items():
        assert np.array_equal(value, replicated["state"][key]), key


def test_inductor_equals_pytorch():
    (result,) = trained(2, {"name": "llama", "backend": "inductor", "compile": {}})
    worst = cases.worst(result, cases.reference("llama"))
    print("largest difference", worst, result["report"])
    assert worst < TOLERANCE


def _inspect(rank: int, world: int) -> dict:
    """Memory of a tied, sharded parameter, and changing it on one rank."""
    import deepcompile

    engine = cases.start("llama_tied", cases.config_for(world, 3), "eager")
    weight = engine.module.model.embed_tokens.weight
    found = {"nbytes": weight.untyped_storage().nbytes(), "shape": tuple(weight.shape)}
    before = engine.state_dict()["model.embed_tokens.weight"]
    with deepcompile.GatheredParameters(engine, weight, modifier_rank=1):
        found["gathered"] = weight.untyped_storage().nbytes()
        if rank == 1:
            weight.data.mul_(2.0)
    found["released"] = weight.untyped_storage().nbytes()
    after = engine.state_dict(fp32=True)
    found["doubled"] = torch.equal(after["model.embed_tokens.weight"], 2 * before)
    found["tied"] = torch.equal(after["lm_head.weight"], 2 * before)
    return found


def test_gathered_parameters():
    for found in run_ranks(_inspect, 2, timeout=120):
        assert found["nbytes"] == found["released"] == 0 and found["shape"] == (64, 32)
        assert found["gathered"] >= 64 * 32 * 4
        assert found["doubled"] and found["tied"]


def _two_engines(rank: int, world: int) -> list[dict]:
    """Two engines take turns, one of them with a pass of the user's from step 3 on."""
    seen = []

    def watch(program, context):
        seen.append(len(program.sections))
        context.because("", "watched")

    engines = [
        cases.start(name, cases.config_for(world, 3), None) for name in ("llama", "sequential")
    ]
    engines[0].register_compile_pass("watch", watch)
    engines[0].compile(
        backend="eager", schedule=[(0, ["zero3_compile"]), (3, ["zero3_compile", "watch"])]
    )
    engines[1].compile(backend="eager")
    losses = [[], []]
    for step in range(6):
        for engine, into in zip(engines, losses, strict=True):
            into += cases.train_steps(engine, step, step + 1)[0]
    planner = engines[0].planner
    assert [line.why for line in planner.history] == ["profile of step 3"]
    assert ("watch", "", "watched") in planner.agreed.reasons
    assert (3 in seen) == (rank == 0), "rank 0 plans the whole step for all"
    return [cases.result_of(e, into, []) for e, into in zip(engines, losses, strict=True)]


def test_two_engines_and_a_new_plan_without_recompiling():
    results = run_ranks(_two_engines, 2, timeout=240)[0]
    for name, result in zip(("llama", "sequential"), results, strict=True):
        assert cases.worst(result, cases.reference(name, steps=6)) < TOLERANCE
        assert result["graphs"] == 1


LENGTHS = ((12, 12), (9, 12), (12, 7), (5, 5), (9, 6), (12, 12))
"""Tokens in each rank's batch, step by step."""


def _lengths_differ(rank: int, world: int, backend: str | None) -> dict:
    """Each rank sees its own sequence length, and new ones as it goes."""
    engine = cases.start("llama", cases.config_for(world, 3, gradient_clipping=0.5), backend)
    losses = []
    for number, lengths in enumerate(LENGTHS):
        ids = cases.samples(number)[2 * rank : 2 * rank + 2, : lengths[rank]]
        loss = cases.loss_of(engine, ids)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return cases.result_of(engine, losses, [])


def test_lengths_that_change_and_differ_between_ranks():
    compiled = run_ranks(_lengths_differ, 2, "eager", timeout=240)
    plain = run_ranks(_lengths_differ, 2, None, timeout=120)
    for a, b in zip(compiled, plain, strict=True):
        assert cases.worst(a, b) < TOLERANCE
        assert a["graphs"] > 1


def _different_models(rank: int, world: int) -> str:
    import deepcompile

    model = torch.nn.Linear(4, 4 + rank)
    try:
        deepcompile.initialize(model=model, config=cases.config_for(world, 3))
    except deepcompile.UserError as error:
        return str(error)
    return "no error"


def test_different_models_on_ranks_are_an_error():
    for said in run_ranks(_different_models, 2, timeout=60):
        assert "build the same model on every rank" in said


def _loaded_by_one(rank: int, world: int, name: str, bf16: bool) -> list[dict]:
    """The state after a step where every rank has values, and where the others have none."""
    import deepcompile

    def never(*_: object) -> None:
        raise AssertionError("initialised what rank 0 has")

    found = []
    for everywhere in (True, False):
        with torch.device("cpu" if everywhere or rank == 0 else "meta"):
            model = cases.make(name)
        if not everywhere and rank != 0:
            model._init_weights = never
        extra = {"bf16": {"enabled": True}} if bf16 else {}
        if bf16 and rank == 0:
            for parameter in model.parameters():  # as a checkpoint might be stored
                parameter.data = parameter.data.bfloat16()
        config = cases.config_for(world, 3, **extra)
        engine = deepcompile.initialize(model=model, config=config)[0]
        losses, norms = cases.train_steps(engine, 0, 2)
        found.append(cases.result_of(engine, losses, norms))
    return found


@pytest.mark.parametrize(("name", "bf16"), [("llama", False), ("llama_tied", True)])
def test_rank_0_loads_and_the_others_build_on_the_meta_device(name, bf16):
    for everywhere, by_one in run_ranks(_loaded_by_one, 2, name, bf16, timeout=120):
        assert everywhere["losses"] == by_one["losses"]
        for member, value in everywhere["state"].items():
            assert np.array_equal(value, by_one["state"][member]), member


class Experts(torch.nn.Module):
    """Each rank sends its batch through an expert of its own."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x, expert: int):
        return x + self.experts[expert](x)


class Routed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle = torch.nn.Linear(16, 16), Experts()

    def forward(self, x, expert: int):
        return self.middle(self.first(x), expert).pow(2).mean()


def _experts(rank: int, world: int, classes: list[str], stage: int) -> float:
    """Largest difference from plain PyTorch after a few uncompiled steps."""
    import deepcompile

    torch.manual_seed(0)
    model = Routed()
    plain = copy.deepcopy(model)
    config = cases.config_for(world, stage)
    config["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 100, "leaf_module": {"classes": classes},
    }  # fmt: skip
    engine, *_ = deepcompile.initialize(model=model, config=config)
    optimizer = cases.adamw(plain.parameters())
    for _ in range(3):
        batches = torch.randn(world, 4, 16)
        engine.backward(engine(batches[rank], rank))
        engine.step()
        optimizer.zero_grad()
        (sum(plain(batches[r], r) for r in range(world)) / world).backward()
        optimizer.step()
    state = plain.state_dict()
    return max(float((v - state[k]).abs().max()) for k, v in engine.state_dict().items())


@pytest.mark.parametrize("stage", [0, 3])
def test_experts_that_differ_between_ranks_in_a_leaf_module(stage):
    assert max(run_ranks(_experts, 2, ["Experts"], stage, timeout=120)) < TOLERANCE


def test_paths_that_differ_between_ranks_are_an_error():
    with pytest.raises(AssertionError, match="different parameters since the last step"):
        run_ranks(_experts, 2, [], 3, timeout=120)
