# SPDX-License-Identifier: Apache-2.0
"""Plans that move, remake, delay or hasten: the same bits, and the memory really given back."""

import gc
import weakref

import pytest
import torch
import toy_step
from toy_step import GRAPH, PLANS, Toy, batch, plan_text

from deepcompile import _runtime
from deepcompile.errors import UserError

STEPS = 4
JOBS = [
    dict(),
    dict(accumulation=4),
    dict(clip=0.5),
    dict(accumulation=4, clip=0.5, dtype=torch.bfloat16, reduce="bf16"),
]


def kind_of(job):
    return {"dtype": job["dtype"]} if "dtype" in job else {}


def assert_same(toy, losses, twin, expected):
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    ours, theirs = toy.everything(), twin.everything()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("job", JOBS, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_plans_give_the_same_bits(plan, job, stage):
    if plan == "early" and "clip" in job:
        pytest.skip("clipping forbids early updates")
    twin = Toy(stage=stage, **job)
    expected = twin.train(STEPS, **kind_of(job))
    toy = Toy(stage=stage, plan=plan, **job)
    assert_same(toy, toy.train(STEPS, **kind_of(job)), twin, expected)
    assert toy.runtime.buffer_report()["saved"] == 0
    assert toy.runtime.buffer_report()["host_values"] == 0


def forward(toy, seed=0):
    call, token = toy.runtime.new_call(toy.graph)
    (loss,) = toy.runtime.run(toy.graph, 0, call, list(batch(seed)))
    return call, token, loss


def test_evicted_values_leave_the_device_and_their_host_memory_is_used_again():
    plain, toy = Toy(), Toy(plan="values")
    kept = [forward(plain), forward(toy)]
    reports = [each.runtime.buffer_report() for each in (plain, toy)]
    h_bytes = 6 * toy_step.HIDDEN * 4
    assert reports[0]["saved"] - reports[1]["saved"] == h_bytes
    assert reports[1]["host_values"] == 4096 and reports[0]["host_values"] == 0
    toy.runtime.run(toy.graph, 1, kept[1][0], [torch.ones(())])
    report = toy.runtime.buffer_report()
    assert (report["host_values"], report["host_pool"]) == (0, 4096)
    toy.step()
    toy.train(2)
    assert toy.runtime.buffer_report()["host_pool"] == 4096
    _, token, _ = forward(toy)
    assert toy.runtime.buffer_report()["host_values"] == 4096
    del token
    gc.collect()
    assert toy.runtime.buffer_report()["host_values"] == 0


def test_a_value_that_was_written_to_stays():
    """The copy is of the value before; the backward wants the one after."""

    def write(args):
        h = args[0]
        outputs = toy_step.code_second(args)
        h.mul_(1.0)
        return outputs

    codes = [*toy_step.CODES]
    codes[1] = write
    toy, twin = Toy(plan="values", codes=codes), Toy()
    expected = twin.train(2)
    assert_same(toy, toy.train(2), twin, expected)
    _, _token, _ = forward(toy)
    assert toy.runtime.buffer_report()["host_values"] == 0


def strided(args):
    """The toy's first region, with an output that is transposed inside a larger buffer."""
    (h,) = toy_step.code_first(args)
    buffer = torch.full((h.shape[1] + 3, h.shape[0]), 7.0)
    view = buffer[2:-1].T
    view.copy_(h)
    return [view]


def gaps(args):
    (h,) = toy_step.code_first(args)
    buffer = torch.zeros(h.shape[0], 2 * h.shape[1])
    buffer[:, ::2] = h
    return [buffer[:, ::2]]


@pytest.mark.parametrize("first, moved", [(strided, True), (gaps, False)])
def test_strides_survive_and_tensors_with_gaps_stay(first, moved):
    seen = []

    def second_backward(args):
        seen.append(args[1].stride())
        return toy_step.code_second_backward(args)

    codes = [first, toy_step.CODES[1], second_backward, toy_step.CODES[3]]
    toy, twin = Toy(plan="values", codes=codes), Toy(codes=codes)
    expected = twin.train(2)
    assert_same(toy, toy.train(2), twin, expected)
    assert len(set(seen)) == 1
    _, _token, _ = forward(toy)
    assert (toy.runtime.buffer_report()["host_values"] > 0) is moved


def test_evicted_states_leave_the_device():
    toy = Toy(plan="states brought in by the update", dtype=torch.bfloat16)
    before = toy.runtime.buffer_report()
    toy.train(1, dtype=torch.bfloat16)
    report = toy.runtime.buffer_report()
    assert report["states"] == report["masters"] == 0
    # Each rounded up to pages: master and two moments of three parameters.
    states = 3 * before["masters"]
    assert states <= report["host_states"] <= states + 9 * 4096
    pieces = toy.runtime.pieces()
    pieces[0]["master"].fill_(0.5)  # a checkpoint that is loaded while they are away
    toy.runtime.masters_changed()
    assert toy.runtime.buffer_report()["masters"] == 0
    assert torch.all(toy.full_values()["w1"] == 0.5)
    assert torch.all(toy.runtime.pieces()[0]["master"] == 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_states_are_those_of_the_plain_plan(dtype):
    reduce = toy_step.SHORT[dtype]
    source = Toy(plan="states brought in by the update", dtype=dtype, reduce=reduce)
    source.train(2, dtype=dtype)
    for plan in ("", "states", "deferred"):
        target = Toy(plan=plan, dtype=dtype, reduce=reduce)
        target.train(1, dtype=dtype)
        for ours, theirs in zip(target.runtime.pieces(), source.runtime.pieces(), strict=True):
            for key in ("master", "exp_avg", "exp_avg_sq"):
                ours[key].copy_(theirs[key])
            target.runtime.set_member_step(ours["member"], theirs["step"])
        target.runtime.masters_changed()
        ours, theirs = target.everything(), source.everything()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), plan


def test_deferred_updates_are_seen_by_whoever_looks():
    twin = Toy()
    twin.train(1)
    expected = twin.everything()

    def late():
        toy = Toy(plan="deferred")
        toy.train(1)
        assert toy.runtime.buffer_report()["gradients"] > 0
        assert not toy.runtime.is_whole("small")
        return toy

    toy = late()
    toy.runtime.zero_grad()  # drops no gradient that is due
    assert all(torch.equal(v, expected[n]) for n, v in toy.full_values().items())
    assert toy.runtime.buffer_report()["gradients"] == 0
    toy = late()
    toy.runtime.settle()
    assert toy.runtime.is_whole("small")
    assert torch.equal(toy.model.bias.detach(), expected["bias"])
    toy = late()
    toy.set_hyper(lr=7.0)  # the next step's
    assert all(torch.equal(v, expected[n]) for n, v in toy.everything().items())
    toy = late()
    toy.runtime.set_step(5)
    assert all(piece["step"] == 5 for piece in toy.runtime.pieces())
    assert torch.equal(toy.full_values()["w1"], expected["w1"])


def test_a_deferred_update_keeps_its_steps_settings():
    toy, twin = Toy(plan="deferred"), Toy()
    for step in range(4):
        for each in (toy, twin):
            each.set_hyper(lr=0.01 * (step + 1), beta2=0.9 + 0.01 * step)
            each.micro_step(*batch(step))
            each.step(loss_scale_inv=0.5 ** (step % 2), check_finite=False)
    ours, theirs = toy.everything(), twin.everything()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_skipped_step_defers_nothing():
    toy, twin = Toy(plan="deferred"), Toy()
    for each in (toy, twin):
        each.train(1)
        each.micro_step(*batch(1), factor=float("inf"))
        assert each.step(check_finite=True)["skipped"]
        each.train(1)
    ours, theirs = toy.everything(), twin.everything()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_use_of_a_parameter_with_an_outstanding_update_is_an_error():
    toy = Toy(plan="deferred")
    plain = toy.runtime.load_plan(plan_text(1, 3, GRAPH), toy_step.CODES)
    toy.train(1)
    with pytest.raises(UserError, match=r"run fwd.0\): parameter small has an update outstanding"):
        toy.runtime.run(plain, 0, -1, list(batch(0)))


def test_early_updates_forbid_what_would_change_them():
    toy = Toy(plan="early")
    toy.micro_step(*batch(0))
    with pytest.raises(UserError, match="cannot be undone, and early updates forbid it"):
        toy.runtime.zero_grad()
    toy.set_hyper(lr=0.5)
    with pytest.raises(UserError, match="settings of .* were changed since, which early updates"):
        toy.step()
    toy = Toy(plan="early")
    toy.micro_step(*batch(0))
    with pytest.raises(UserError, match="scales the loss or may be skipped"):
        toy.step(check_finite=True)
    with pytest.raises(UserError, match="has a gradient after its update"):
        toy.micro_step(*batch(1))


def test_who_overwrites_everything_may_abandon_a_step_with_early_updates():
    twin, toy = Toy(plan="early"), Toy(plan="early")
    twin.train(1)
    toy.micro_step(*batch(7))
    toy.load(twin)
    toy.runtime.abandon_step()
    toy.runtime.zero_grad()
    for each in (twin, toy):
        each.train(2)
    ours, theirs = toy.everything(), twin.everything()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_early_updates_wait_for_the_last_micro_batch():
    toy = Toy(plan="early", accumulation=2)
    before = toy.full_values()
    toy.runtime.set_last_micro_batch(False)
    toy.micro_step(*batch(0))
    assert torch.equal(toy.full_values()["w1"], before["w1"])
    toy.runtime.set_last_micro_batch(True)
    toy.micro_step(*batch(1))
    assert not torch.equal(toy.full_values()["w1"], before["w1"])
    assert toy.runtime.buffer_report()["gradients"] == 0
    toy.step()
    assert toy.runtime.optimizer_steps() == 1


def test_an_unloaded_plan_goes_with_its_last_call():
    toy = Toy()
    codes = [lambda args, code=code: code(args) for code in toy_step.CODES]
    gone = weakref.ref(codes[0])
    plan = toy.runtime.load_plan(plan_text(1, 3, GRAPH), codes)
    del codes
    call, token = toy.runtime.new_call(plan)
    toy.runtime.run(plan, 0, call, list(batch(0)))
    toy.runtime.unload_plan(plan)
    with pytest.raises(UserError, match=f"no plan has id {plan}"):
        toy.runtime.new_call(plan)
    assert gone() is not None
    toy.runtime.run(plan, 1, call, [torch.ones(())])
    del token
    gc.collect()
    assert gone() is None
    toy.step()
    other = toy.runtime.load_plan(plan_text(1, 3, GRAPH), toy_step.CODES)
    assert other > plan
    toy.runtime.unload_plan(other)
    with pytest.raises(UserError, match=f"no plan has id {other}"):
        toy.runtime.unload_plan(other)


def test_shared_flags_come_two_shares_later():
    runtime = _runtime.Runtime(None, 0, 1, torch.device("cpu"))
    seen = []
    for flag in (3, 5, 0, 9, 1):
        runtime.share(flag)
        seen.append(runtime.shared())
    assert seen == [0, 3, 5, 0, 9]


def test_links_are_measured():
    runtime = _runtime.Runtime(None, 0, 1, torch.device("cpu"))
    times = runtime.measure_links([1 << 12, 1 << 16], 3)
    assert times["gather"] == times["reduce"] == []  # one rank has no link
    for direction in ("to_host", "to_device"):
        assert [size for size, _ in times[direction]] == [1 << 12, 1 << 16]
        assert all(ns > 0 for _, ns in times[direction])
    assert set(times) == {"gather", "reduce", "to_host", "to_device"}  # copies take turns on a CPU
    with pytest.raises(UserError, match="at least 1"):
        runtime.measure_links([0], 1)
