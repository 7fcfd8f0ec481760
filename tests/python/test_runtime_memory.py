# SPDX-License-Identifier: Apache-2.0
"""Too little memory: the runtime makes room, keeps the bits, and says so when it cannot."""

import pytest
import torch
import toy_step
from failing_memory import FailingMemory
from toy_step import PLANS, Toy, batch, plan_text

from deepcompile import _runtime
from deepcompile.errors import UserError

STEPS = 3


def device_bytes(toy):
    report = toy.runtime.buffer_report()
    return sum(size for kind, size in report.items() if not kind.startswith("host"))


def with_limit(limit, plan="", **options):
    toy = Toy(plan=plan, **options)
    toy.runtime.limit_bytes(limit)
    return toy, toy.train(STEPS)


@pytest.mark.parametrize("plan", ["", *PLANS])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_relief_keeps_the_bits(plan, accumulation):
    twin = Toy(accumulation=accumulation)
    expected = twin.train(STEPS)
    whole = device_bytes(twin)
    theirs = twin.everything()
    relieved, refused = [], 0
    for percent in (300, 200, 160, 140, 130, 120, 110, 100, 90, 80, 70, 50, 30):
        limit = whole * percent // 100
        try:
            toy, losses = with_limit(limit, plan, accumulation=accumulation)
        except _runtime.OutOfMemoryError as error:
            assert "[runtime] rank 0: " in str(error) and f"the limit is {limit}" in str(error)
            refused += 1
            continue
        assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
        toy.runtime.limit_bytes(0)
        report = toy.runtime.relieved()
        assert toy.runtime.relieved() == dict(
            times=0, states_bytes=0, values_bytes=0, params_bytes=0
        )
        relieved.append(report["times"])
        ours = toy.everything()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), percent
    assert refused and len(relieved) >= 2, (relieved, refused)
    if not plan.startswith(("states", "deferred")):  # those need no relief to fit
        assert relieved[-1] > 0


def last_of_two_steps(toy, memory=None, where="", after=0, dtype=torch.float32):
    """The losses of two whole steps; in the last micro batch's forward or backward, in the step or
    in what settles its updates, an allocation fails when `after` have succeeded. Whether it did."""
    losses, failed = toy.train(1, dtype=dtype), False
    toy.runtime.limit_bytes(1 << 40)  # arms the relief

    def runs(what, run, *arguments):
        nonlocal failed
        fails = what == where and micro == toy.accumulation - 1
        if fails:
            memory.fail(after=after)
        result = run(*arguments)
        failed = failed or (fails and memory.stop() > 0)
        return result

    for micro in range(toy.accumulation):
        toy.runtime.set_last_micro_batch(micro == toy.accumulation - 1)
        call, token = toy.runtime.new_call(toy.graph)
        inputs, one = list(batch(50 + micro, dtype=dtype)), torch.ones(())
        losses += runs("forward", toy.runtime.run, toy.graph, 0, call, inputs)
        runs("backward", toy.runtime.run, toy.graph, 1, call, [one])
    runs("step", toy.step)
    runs("settle", toy.runtime.settle)
    return losses, failed


FAILING = [
    ("", dict()),
    ("values", dict(accumulation=2, clip=0.5)),
    ("remade", dict(dtype=torch.bfloat16, reduce="bf16")),
    ("deferred", dict(accumulation=2, boundary=True)),
    ("early", dict()),
]


@pytest.mark.parametrize("plan, options", FAILING)
def test_any_allocation_of_an_instruction_may_fail_once(failing_allocator, plan, options):
    memory, kind = FailingMemory(failing_allocator), {}
    if "dtype" in options:
        kind["dtype"] = options["dtype"]
    twin = Toy(plan=plan, **options)
    losses, _ = last_of_two_steps(twin, **kind)
    theirs, count = twin.everything(), 0
    for where in ("forward", "backward", "step", "settle"):
        for after in range(1000):
            toy = Toy(plan=plan, **options)
            found, failed = last_of_two_steps(toy, memory, where, after, **kind)
            if not failed:
                break
            count += 1
            assert all(torch.equal(a, b) for a, b in zip(found, losses, strict=True)), after
            ours = toy.everything()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), (where, after)
    assert count > 20, count


def states_bytes(toy):
    report = toy.runtime.buffer_report()
    return report["masters"] + report["states"]


def test_states_on_the_host_stay_there_when_deferred_updates_are_settled():
    twin = Toy(plan="deferred", dtype=torch.bfloat16)
    twin.train(2, dtype=torch.bfloat16)
    toy, _ = Toy(plan="deferred", dtype=torch.bfloat16), twin.runtime.settle()
    toy.runtime.limit_bytes(device_bytes(twin) * 21 // 20)
    toy.train(2, dtype=torch.bfloat16)
    toy.runtime.limit_bytes(0)
    before = states_bytes(toy)
    assert before < states_bytes(twin)
    toy.runtime.settle()
    assert states_bytes(toy) == before
    ours, theirs = toy.everything(), twin.everything()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_states_that_have_no_room_are_loaded_on_the_host(dtype):
    twin, toy = Toy(dtype=dtype), Toy(dtype=dtype)
    twin.train(2, dtype=dtype)
    before = device_bytes(toy)
    toy.runtime.limit_bytes(before + 1000)
    for piece in toy.runtime.pieces():
        assert not piece["exp_avg"].any() and not piece["exp_avg_sq"].any()
    assert toy.runtime.buffer_report()["host_states"] > 0
    assert device_bytes(toy) <= before + 1000 < device_bytes(twin)
    toy.load(twin)
    toy.runtime.limit_bytes(0)
    for each in (twin, toy):
        each.train(2, dtype=dtype)
    ours, theirs = toy.everything(), twin.everything()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_values_of_open_calls_make_room_and_come_back():
    twin, toy = Toy(accumulation=2), Toy(accumulation=2)
    for each in (twin, toy):
        calls = []
        for step in range(2):
            if each is toy and step == 1:
                # Room for one call's values beside the parameters, not for two.
                toy.runtime.limit_bytes(device_bytes(toy) + 64 * 4 * 40)
            calls.append(each.runtime.new_call(each.graph))
            each.runtime.run(each.graph, 0, calls[-1][0], list(batch(step, rows=64)))
        each.runtime.limit_bytes(0)
        if each is toy:
            report = toy.runtime.relieved()
            assert report["values_bytes"] > 0 and report["states_bytes"] == 0
            assert toy.runtime.buffer_report()["host_values"] > 0
        for call, _ in reversed(calls):
            each.runtime.run(each.graph, 1, call, [torch.ones(())])
        each.step()
    ours, theirs = toy.everything(), twin.everything()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_region_that_finds_no_memory_runs_again():
    fail = [0]

    def code_first_backward(args):
        if fail[0]:
            fail[0] -= 1
            args.clear()  # as compiled code does: it lets go of its inputs
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 MiB")
        return toy_step.code_first_backward(args)

    codes = [*toy_step.CODES[:3], code_first_backward]
    toy, twin = Toy(codes=codes), Toy()
    toy.runtime.limit_bytes(1 << 40)  # arms the relief; no such device is ever full
    for each in (toy, twin):
        each.train(1)
    fail[0] = 1
    for each in (toy, twin):
        each.train(1)
    report = toy.runtime.relieved()
    assert report["times"] == 1 and report["states_bytes"] > 0
    ours, theirs = toy.everything(), twin.everything()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    fail[0] = 10**6
    message = r"rank 0: backward 0, instruction \d+ \(run bwd.0\) found no memory .* Tried to"
    with pytest.raises(_runtime.OutOfMemoryError, match=message) as caught:
        toy.train(1)
    assert isinstance(caught.value, UserError)
    fail[0] = 0
    toy.runtime.zero_grad()
    toy.train(1)


def test_the_peak_is_counted_on_a_cpu():
    def code_first(args):
        scratch = torch.zeros(1 << 20)
        del scratch
        return toy_step.code_first(args)

    toy = Toy(codes=[code_first, *toy_step.CODES[1:]])
    toy.train(1)
    toy.runtime.reset_peak_bytes()
    toy.train(1)
    peak = toy.runtime.peak_bytes()
    assert 4 << 20 < peak < (4 << 20) + 4 * device_bytes(toy)
    plain = Toy()
    plain.train(1)
    plain.runtime.reset_peak_bytes()
    plain.train(1)
    assert device_bytes(plain) < plain.runtime.peak_bytes() < 4 * device_bytes(plain)


def test_records_tell_the_workspace_of_a_region():
    def code_first(args):
        scratch = torch.zeros(1 << 20)
        del scratch
        return toy_step.code_first(args)

    toy = Toy(codes=[code_first, *toy_step.CODES[1:]])
    toy.runtime.reset_peak_bytes()  # on a CPU only then is anything counted
    toy.runtime.trace(True)
    toy.micro_step(*batch(0))
    toy.step()
    found = {}
    for *instruction, _, _, workspace in toy.runtime.records():
        found[tuple(instruction)] = workspace
    runs = sorted(bytes for bytes in found.values() if bytes >= 0)
    # The scratch is gone before the output is made, and the output does not count.
    assert len(runs) == 4 and (4 << 20) - 4096 <= runs[-1] < (4 << 20) + 65536
    assert runs[-2] < 65536
    assert plan_text(1, 3, toy_step.GRAPH).count('"run"') == 4


def test_a_profiler_of_the_users_keeps_working():
    toy = Toy()
    toy.runtime.reset_peak_bytes()
    with torch.profiler.profile(profile_memory=True) as profile:
        toy.train(1)
    assert any(event.key == "aten::mm" for event in profile.key_averages())
    toy.runtime.trace(True)
    toy.train(1)
    assert toy.runtime.peak_bytes() > 0
