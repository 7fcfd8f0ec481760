# SPDX-License-Identifier: Apache-2.0
"""Recorded runs: the same bits as without, and never out of their turn."""

import contextlib
import sys

import alias_step
import pytest
import torch
import toy_step
from fake_recorder import FakeRecorder
from toy_step import PLANS, Toy, batch

from deepcompile import cuda_graphs
from deepcompile.errors import UserError

STEPS = 8
OTHER_SHAPE = "which has another shape or layout"


def test_there_are_graphs_on_gpus_alone():
    cpu = torch.device("cpu")
    assert cuda_graphs.recorder("auto", cpu) is None
    with pytest.raises(UserError, match="a CPU has none"):
        cuda_graphs.recorder("on", cpu)


def test_a_pools_number_is_still_there_after_its_memory_was_looked_at():
    numbers = (int("1000003"), int("1000033"))  # none that the interpreter keeps anyway
    before = [sys.getrefcount(number) for number in numbers]
    for _ in range(3):
        assert cuda_graphs.segments_of(numbers) == []
    assert all(sys.getrefcount(n) >= b for n, b in zip(numbers, before, strict=True))


def test_an_invalid_capture_is_repaired_whoever_notices(monkeypatch):
    class Invalid:
        def capture_end(self):
            raise RuntimeError("the capture is invalid")

    recorder = object.__new__(cuda_graphs.GraphRecorder)
    repaired = []
    monkeypatch.setattr(recorder, "_repair", lambda: repaired.append(True), raising=False)
    for end in (lambda: recorder.finish([], None), recorder.abort):
        recorder._graph, recorder._collects = Invalid(), False
        recorder._entered = contextlib.nullcontext()
        with contextlib.suppress(RuntimeError):
            end()
        assert repaired.pop() and not repaired
    recorder._graph = Invalid()
    with pytest.raises(RuntimeError, match="the capture is invalid"):
        recorder.finish([], None)


def equal(a, b):
    """Two toys with the same states."""
    ours, theirs = a.everything(), b.everything()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def recorded(**options):
    return Toy(recorder=FakeRecorder(), **options)


def after_recording(**options):
    """A toy that has just been recorded, and the same without recording."""
    toy, twin = recorded(**options), Toy(**options)
    toy.train(3)
    twin.train(3)
    assert toy.runtime.replays()["recordings"] == 1, toy.runtime.replays()
    return toy, twin


@pytest.mark.parametrize("plan", ["", *PLANS])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_recorded_steps_have_the_same_bits(plan, accumulation):
    twin, toy = (each(plan=plan, accumulation=accumulation) for each in (Toy, recorded))
    expected, losses = twin.train(STEPS), toy.train(STEPS)
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    assert equal(toy, twin)
    found = toy.runtime.replays()
    runs = 4 if plan == "remade" else 3  # the loss is the caller's: its run is not recorded
    assert found["recordings"] == 1 and found["runs"] == runs * accumulation, found
    assert found["replayed"] == (STEPS - 3) * runs * accumulation
    assert found["missed"] == 0 and found["bytes"] > 0


def test_an_evaluation_between_steps_is_no_part_of_them():
    toy, twin = after_recording()
    for each in (toy, twin):
        (value,) = each.runtime.run(each.graph, 0, -1, list(batch(90)))
        each.value = value
        each.train(3)
    assert torch.equal(toy.value, twin.value) and equal(toy, twin)


def test_a_step_with_an_evaluation_in_it_is_not_recorded(monkeypatch):
    # What a parameter that stays whole into the backward was gathered into, the evaluation frees.
    monkeypatch.setitem(PLANS, "kept", ((("  run fwd.0\n  release w1\n", "  run fwd.0\n"),), ()))
    toy, twin = recorded(plan="kept"), Toy(plan="kept")
    for each in (toy, twin):
        each.train(2)
        inference = each.runtime.load_plan(
            toy_step.plan_text(1, 3, toy_step.INFERENCE), toy_step.CODES
        )
        call, token = each.runtime.new_call(each.graph)
        each.runtime.run(each.graph, 0, call, list(batch(70)))
        each.runtime.run(inference, 0, -1, list(batch(90)))
        each.runtime.run(each.graph, 1, call, [torch.ones(())])
        each.step()
        del token
    assert toy.runtime.replays()["recordings"] == 0
    for each in (toy, twin):
        each.train(6)
    assert toy.runtime.replays()["recordings"] == 1 and equal(toy, twin)


def test_a_second_forward_before_the_backward_keeps_the_first_ones_values():
    toy, twin = after_recording()
    for each in (toy, twin):
        calls = []
        for number in (0, 1):
            calls.append(each.runtime.new_call(each.graph))
            each.runtime.run(each.graph, 0, calls[-1][0], list(batch(70 + number)))
        for call, _ in reversed(calls):
            each.runtime.run(each.graph, 1, call, [torch.full((), 0.5)])
        each.step()
        each.train(2)
    assert equal(toy, twin)
    assert toy.runtime.replays()["replayed"] >= 6  # of the two steps after it


def test_an_open_call_of_the_step_before_is_refused_and_leaves_nothing():
    toy, twin = after_recording()
    for each in (toy, twin):
        kept = each.runtime.new_call(each.graph)
        each.runtime.run(each.graph, 0, kept[0], list(batch(70)))
        call, token = each.runtime.new_call(each.graph)
        each.runtime.run(each.graph, 0, call, list(batch(71)))
        each.runtime.run(each.graph, 1, call, [torch.ones(())])
        each.step()
        each.micro_step(*batch(72))
        with pytest.raises(UserError, match="updated since its forward"):
            each.runtime.run(each.graph, 1, kept[0], [torch.ones(())])
        each.step()
        each.train(3)
    assert equal(toy, twin)


def test_a_forward_without_a_backward_changes_nothing():
    toy, twin = after_recording()
    for each in (toy, twin):
        call, token = each.runtime.new_call(each.graph)
        each.runtime.run(each.graph, 0, call, list(batch(70)))
        del token
        each.train(3)
    assert equal(toy, twin)


def test_another_batch_size_runs_as_ever():
    toy, twin = after_recording()
    before = toy.runtime.replays()
    for each in (toy, twin):
        each.train(1, rows=9)
        each.train(1)
    found = toy.runtime.replays()
    assert equal(toy, twin)
    assert found["missed"] > before["missed"] and found["replayed"] > before["replayed"]
    assert found["moved"] == "run fwd.0 of forward 0 reads value x, " + OTHER_SHAPE
    assert found["why_not"] == ""


def test_what_moves_at_each_step_is_recorded_anew_and_then_no_more():
    toy, twin = after_recording()
    for each in (toy, twin):
        for step in range(3):
            each.train(1, rows=7 + step)
    moved = "run fwd.0 of forward 0 reads value x, " + OTHER_SHAPE
    assert toy.runtime.replays()["why_not"] == f"what runs read moves from step to step: {moved}"
    for each in (toy, twin):
        each.train(12)
    assert equal(toy, twin)
    assert toy.runtime.replays()["recordings"] == 2


def test_the_recording_goes_with_its_plan():
    toy, twin = after_recording()
    graph = toy_step.plan_text(1, 3, toy_step.GRAPH)
    for each in (toy, twin):
        each.runtime.unload_plan(each.graph)
        each.graph = each.runtime.load_plan(graph, toy_step.CODES)
    assert toy.runtime.replays()["runs"] == 0
    for each in (toy, twin):
        each.train(6)
    assert equal(toy, twin)
    assert toy.runtime.replays()["recordings"] == 2


@pytest.mark.parametrize(
    "error, runs",
    [(RuntimeError("not while capturing"), 2), (torch.OutOfMemoryError("no room"), 0)],
    ids=["refused", "no memory"],
)
def test_what_cannot_be_recorded_runs_as_ever(error, runs):
    recorder = FakeRecorder()
    toy, twin = Toy(recorder=recorder), Toy()
    toy.train(2)
    recorder.fails = error
    toy.train(3)
    twin.train(2)
    twin.train(3)
    found = toy.runtime.replays()
    assert recorder.fails is None and found["runs"] == runs
    assert "not while capturing" in found["refused"] if runs else "no memory" in found["why_not"]
    assert equal(toy, twin)


def test_memory_pressure_takes_the_recording():
    toy, twin = after_recording()
    toy.runtime.limit_bytes(22_000)
    for each in (toy, twin):
        each.train(2)
    assert toy.runtime.relieved()["times"] > 0
    assert toy.runtime.replays()["runs"] == 0
    assert equal(toy, twin)


class Keeping(FakeRecorder):
    """As if someone kept what the first run made."""

    kept = None

    def finish(self, outputs, again):
        found = super().finish(outputs, again)
        self.kept = self.kept or found[0]
        return found


def test_a_run_whose_values_someone_keeps_is_not_replayed():
    toy, twin = Toy(recorder=Keeping()), Toy()
    for each in (toy, twin):
        each.train(6)
    found = toy.runtime.replays()
    assert (found["recordings"], found["runs"], found["replayed"]) == (1, 2, 2 * 2), found
    assert equal(toy, twin)


@pytest.mark.parametrize("plan", ["deferred", "deferred, updated in the forward"])
def test_gradients_that_wait_for_the_next_forward_are_not_written_over(monkeypatch, plan):
    """On one rank, where nothing needs padding, a gradient is what its run made, without a copy."""
    for name, size in {"WIDTH": 32, "HIDDEN": 32, "OUT": 16, "PACK_NUMEL": 64}.items():
        monkeypatch.setattr(toy_step, name, size)
    toy, twin = recorded(plan=plan), Toy(plan=plan)
    losses, expected = toy.train(STEPS), twin.train(STEPS)
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))
    assert equal(toy, twin)
    found = toy.runtime.replays()
    assert found["recordings"] == 1 and found["runs"] == 1, found  # the first of the forward's


def test_an_output_in_the_recordings_memory_is_the_callers():
    def second(args):
        value = args[0][0, 0]
        args.clear()
        return [value]

    codes = [toy_step.code_first, second, *toy_step.CODES[2:]]
    toy, twin = recorded(codes=codes), Toy(codes=codes)
    found, expected = toy.train(STEPS), twin.train(STEPS)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert equal(toy, twin)
    assert toy.runtime.replays()["replayed"] == 3 * (STEPS - 3)


def test_a_step_that_fails_while_it_is_recorded_leaves_nothing():
    fails = []

    def second(args):
        if fails:
            raise ValueError("a bad batch")
        return toy_step.code_second(args)

    codes = [toy_step.code_first, second, *toy_step.CODES[2:]]
    toy, twin = recorded(codes=codes), Toy()
    for each in (toy, twin):
        each.train(2)
    fails.append(1)
    call, _ = toy.runtime.new_call(toy.graph)
    with pytest.raises(ValueError, match="a bad batch"):
        toy.runtime.run(toy.graph, 0, call, list(batch(70)))
    fails.clear()
    assert toy.runtime.replays()["recordings"] == 0
    for each in (toy, twin):
        each.train(8)
    assert equal(toy, twin)
    assert toy.runtime.replays()["recordings"] == 1


@pytest.mark.parametrize("case", alias_step.ALIASES)
def test_a_run_may_hand_on_another_part_of_what_it_read(monkeypatch, case):
    alias_step.use(monkeypatch, alias_step.ALIASED)
    codes = alias_step.ALIASES[case]
    twin, toy = Toy(codes=codes), recorded(codes=codes)
    pairs = zip(twin.train(STEPS), toy.train(STEPS), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) and equal(toy, twin)
    found = toy.runtime.replays()
    assert found["runs"] == 4 and found["replayed"] > 0 and found["missed"] == 0, found


def test_a_run_that_makes_something_on_another_device_is_not_recorded(monkeypatch):
    alias_step.use(monkeypatch, alias_step.ON_HOST)
    toy = recorded(codes=alias_step.host_codes("meta"))
    toy.train(STEPS)
    found = toy.runtime.replays()
    assert found["refused"] == "const: an output is on a meta, where nothing is recorded", found
    assert found["recordings"] == 1 and found["runs"] == 3 and found["replayed"] > 0, found
