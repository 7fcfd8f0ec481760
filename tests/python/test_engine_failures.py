# SPDX-License-Identifier: Apache-2.0
"""What fails, or is asked for at a wrong time, is an error, and then as if it had not been."""

from __future__ import annotations

import pytest
import torch
from test_engine import batch, config, error_of, seeded, small, start, step
from torch import nn

from deepcompile import _core
from deepcompile.passes import zero3_compile


class Failing(torch.autograd.Function):
    on = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if Failing.on:
            raise RuntimeError("boom")
        return gradient


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.last(Failing.apply(self.first(x)))


def half_a_backward(engine, number: int) -> None:
    """A step whose backward fails."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="boom"):
        patch.setattr(Failing, "on", True)
        step(engine, number)


def assert_same(engine, other) -> None:
    expected = other.state_dict()
    for name, value in engine.state_dict().items():
        assert torch.equal(value, expected[name])


def test_half_a_backward_is_not_trained_on():
    engine, twin = start(seeded(Fails, 0)), start(seeded(Fails, 0))
    half_a_backward(engine, 7)
    assert "failed half-way" in error_of(lambda: step(engine))
    assert "failed half-way" in error_of(engine.step)
    engine.zero_grad()
    assert step(engine) == step(twin)
    assert_same(engine, twin)


def test_micro_batches_begin_again_after_half_a_backward():
    engine, twin = (
        start(seeded(Fails, 0), config=config(train_batch_size=8, gradient_accumulation_steps=2))
        for _ in range(2)
    )
    step(engine, 5)
    half_a_backward(engine, 6)
    engine.zero_grad()
    for each in (engine, twin):
        step(each, 7)
        assert each.global_steps == 0
        step(each, 8)
        assert each.global_steps == 1
    assert_same(engine, twin)


@torch.library.custom_op("deepcompile_tests::gradient", mutates_args=())
def gradient_or_boom(gradient: torch.Tensor) -> torch.Tensor:
    if Failing.on:
        raise RuntimeError("boom")
    return gradient.clone()


@torch.library.custom_op("deepcompile_tests::through", mutates_args=())
def through(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


for op in (gradient_or_boom, through):
    op.register_fake(torch.empty_like)
through.register_autograd(lambda ctx, gradient: gradient_or_boom(gradient))


class HalfCompiled(nn.Module):
    """A compiled part whose backward may fail, behind two layers that are not compiled."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.tail = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8))

    @torch.compiler.disable
    def rest(self, x):
        return self.tail(x)

    def forward(self, x):
        return self.rest(through(self.first(x)))


def test_a_failed_compiled_backward_is_what_is_said():
    engine, twin = start(seeded(HalfCompiled, 0)), start(seeded(HalfCompiled, 0))
    for each in (engine, twin):
        each.compile(backend="eager")
        step(each, 1)
    half_a_backward(engine, 2)
    engine.zero_grad()
    for each in (engine, twin):
        step(each, 3)
    assert_same(engine, twin)


class FailsInside(nn.Module):
    """Compiled whole; the backward of the last layer succeeds before it fails."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.last(through(self.first(x)))


def update_early(program, context):
    """Each update right behind its gradient's reduction."""
    for section in program.sections:
        if section.kind != "backward":
            continue
        instrs = []
        for instr in (i for i in section.instrs if i.op != "accumulate"):
            instrs.append(instr)
            if instr.op == "reduce":
                instrs += [_core.Instr(op, instr.operand) for op in ("accumulate", "update")]
        section.set_instrs(instrs)


def test_loading_is_a_way_on_after_a_failed_backward_that_updated(tmp_path):
    early = config(compile={"early_updates": True, "region_bytes": 1})
    engine, twin = (start(seeded(FailsInside, 0), config=early) for _ in range(2))
    for each in (engine, twin):
        whole_step = ["zero3_compile", update_early, "coalesce"]
        each.compile(backend="eager", schedule=[(0, ["zero3_compile"]), (1, whole_step)])
        for number in range(3):
            step(each, number)
    engine.save_checkpoint(tmp_path)
    half_a_backward(engine, 7)
    assert "cannot be undone" in error_of(engine.zero_grad)
    engine.load_checkpoint(tmp_path)
    for each in (engine, twin):
        step(each, 3)
    assert_same(engine, twin)


def test_saving_inside_an_accumulation_is_an_error(tmp_path):
    engine = start(config=config(train_batch_size=8, gradient_accumulation_steps=2))
    step(engine)
    assert "middle of an accumulation" in error_of(lambda: engine.save_checkpoint(tmp_path))


def test_saving_between_backward_and_step_is_an_error(tmp_path):
    engine = start()
    engine.backward(engine(batch(0)).pow(2).mean())
    assert "between backward() and step()" in error_of(lambda: engine.save_checkpoint(tmp_path))
    engine.step()
    engine.save_checkpoint(tmp_path)


def test_a_checkpoint_of_other_groups_overwrites_nothing(tmp_path):
    saved = start()
    step(saved)
    saved.save_checkpoint(tmp_path)
    model = seeded(small, 3)
    groups = [{"params": [p for p in model.parameters() if p.dim() == n]} for n in (1, 2)]
    engine, fresh = start(model, model_parameters=groups), start(seeded(small, 3))
    before = engine.state_dict(fp32=True)
    message = error_of(lambda: engine.load_checkpoint(tmp_path))
    assert "load with load_optimizer_states=False" in message
    assert all(torch.equal(v, before[n]) for n, v in engine.state_dict(fp32=True).items())
    for each in (engine, fresh):
        each.load_checkpoint(tmp_path, load_optimizer_states=False)
        step(each, 1)
    assert_same(engine, fresh)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_that_is_not_the_engines_is_an_error(compiled):
    engine, other = start(), nn.Linear(2, 1)
    if compiled:
        engine.compile(backend="eager")
    loss = other(torch.ones(1, 2)).sum()
    said = error_of(lambda: engine.backward(loss))
    assert said.startswith("[engine] backward: the loss reaches no parameter of this engine")
    assert "no backward" in error_of(engine.step)
    assert step(engine) == pytest.approx(step(start()), rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (3, "3 is not a list of (step, [passes]); write [(0, ['zero"),
        (zero3_compile.add_z3_gather_release, "<pass zero3_compile: "),
        ("prefetch", "'prefetch' is not a list of (step, [passes])"),
        ([(0, [zero3_compile])], "a module, not a pass; write zero3_compile.add_z3_gather_release"),
        ([(0, zero3_compile)], "a module, not a pass; write zero3_compile.add_z3_gather_release"),
        ([(0, ["prefech"])], "no pass named 'prefech'; did you mean \"prefetch\"? known are"),
    ],
)
def test_what_is_no_schedule_is_said(schedule, expected):
    engine = start()
    said = error_of(lambda: engine.compile(schedule=schedule))
    assert said.startswith("[passes] schedule: ") and expected in said


def test_a_generator_is_a_schedule():
    engine = start()
    engine.compile(backend="eager", schedule=(entry for entry in [(0, ["zero3_compile"])]))
    assert step(engine) == pytest.approx(step(start()), rel=1e-5)


def test_an_optimizer_with_three_betas_is_an_error_before_training():
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99, 0.9))
    assert "give two: (0.9, 0.999)" in error_of(lambda: start(model, optimizer=optimizer))


def test_a_misspelt_machine_names_the_key_and_those_there_are():
    said = error_of(lambda: start(config=config(compile={"machine": "4x8-h10"})))
    assert said.startswith("[config] compile.machine: '4x8-h10' is neither a file nor a built-in")
    assert 'did you mean "4x8-h100"? built in are' in said and "2x-cpu" in said


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_gradient_hook_on_a_parameter_is_refused_in_compiled_steps(kind):
    engine = start()
    engine.compile(backend="eager")
    for number in range(2):
        step(engine, number)
    handle = getattr(engine.module[0].weight, kind)(lambda value: None)
    said = error_of(lambda: step(engine, 2))
    assert said.startswith("[engine] 0.weight: has a gradient hook") and "Remove" in said
    handle.remove()
    step(engine, 2)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_backward_that_is_not_the_engines_is_refused(backend):
    engine, twin = start(), start()
    for each in (engine, twin):
        if backend:
            each.compile(backend=backend)
    loss = engine(batch()).pow(2).mean()
    said = error_of(loss.backward)
    assert "made outside engine.backward(loss)" in said
    losses = [[step(each, number) for number in range(2)] for each in (engine, twin)]
    assert losses[0] == losses[1]


class Penalised(nn.Module):
    """Adds the gradient of its output for its input, as a gradient penalty does."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = x.detach().requires_grad_()
        y = self.last(torch.tanh(self.first(x)))
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y + gradient.pow(2).mean()


def test_a_forward_that_asks_for_gradients_trains_uncompiled_alone():
    engine, plain = start(seeded(Penalised, 3)), seeded(Penalised, 3)
    loss = engine(batch()).pow(2).mean()
    assert torch.equal(loss, plain(batch()).pow(2).mean())
    engine.backward(loss)
    engine.step()
    engine = start(seeded(Penalised, 3))
    engine.compile(backend="eager")
    said = error_of(lambda: engine(batch()))
    assert "torch.autograd.grad trains without engine.compile() only" in said


def test_a_layer_frozen_in_evaluation_mode_is_not_trained():
    engine = start()
    engine.compile(backend="eager")
    engine.eval()
    with pytest.warns(UserWarning, match="the model is in evaluation mode"):
        step(engine)
    before = engine.state_dict()
    engine.module[0].requires_grad_(False)
    with torch.no_grad():
        engine(batch())
    step(engine, 1)
    after = engine.state_dict()
    assert [k for k in after if torch.equal(before[k], after[k])] == ["0.weight", "0.bias"]
