# SPDX-License-Identifier: Apache-2.0
"""Passes as objects, functions and classes."""

from __future__ import annotations

import pytest

from deepcompile import _core, passes
from deepcompile.errors import UserError
from deepcompile.passes import (
    WARMUP,
    NamedPass,
    PassContract,
    auto,
    coalesce,
    offload_activation,
    offload_adam_states,
    order_link,
    place_optimizer,
    prefetch,
    rematerialize,
    selective_gather,
    zero1_compile,
    zero3_compile,
)

STEP = """\
step train world=2
param a f32 1048576
param b f32 1048576
value x 4KiB
value h 4KiB
value loss 4B
value t.loss 4B
value d 4KiB
value ga 4MiB grad=a
value gb 4MiB grad=b
region f.a time=10ms (x, a) -> (h)
region f.b time=10ms (h, b) -> (loss)
region b.b time=20ms (t.loss, h, b) -> (d, gb)
region b.a time=20ms (d, x, a) -> (ga)
forward 0 (x) -> (loss)
  run f.a
  run f.b
end
backward 0 (t.loss) -> ()
  run b.b
  run b.a
end
update
end
"""
PUBLIC = {
    "zero3_compile": zero3_compile.add_z3_gather_release,
    "zero1_compile": zero1_compile.add_z1_reduce,
    "prefetch": prefetch.schedule_prefetch,
    "selective_gather": selective_gather.selective_gather,
    "offload_adam_states": offload_adam_states.move_opt_states,
    "offload_adam_states_sync": offload_adam_states.move_opt_states_sync,
    "offload_activation": offload_activation.offload_activation,
    "rematerialize": rematerialize.rematerialize,
    "place_optimizer": place_optimizer.place_optimizer,
    "order_link": order_link.order_link,
    "coalesce": coalesce.coalesce,
    "auto": auto.auto,
}


def step() -> _core.StepProgram:
    return _core.StepProgram.parse(STEP)


def run(program: _core.StepProgram, *wanted, **options):
    options = {"machine": _core.Machine.builtin("2x-cpu"), "memory_budget": 64 << 20} | options
    return _core.run_passes(program, list(wanted), **options)


@pytest.mark.parametrize("word", PUBLIC)
def test_each_public_name_is_a_pass_of_the_core(word):
    named = PUBLIC[word]
    assert isinstance(named, NamedPass)
    assert named.pass_name == named.__name__ == word
    assert word in _core.pass_names()
    assert named.__doc__ and word in repr(named)
    assert isinstance(named.contract, PassContract)


def test_all_names_exist():
    assert all(hasattr(passes, name) for name in passes.__all__)


def test_a_schedule_of_the_seed_works_as_written():
    schedule = [
        (0, [zero3_compile.add_z3_gather_release]),
        (
            WARMUP,
            [
                zero3_compile.add_z3_gather_release,
                prefetch.schedule_prefetch,
                selective_gather.selective_gather,
            ],
        ),
    ]
    times = []
    for _, entry in schedule:
        program = step()
        run(program, *entry)
        times.append(_core.simulate(program, _core.Machine.builtin("2x-cpu")).time_ns)
    assert times[1] < times[0]


def test_objects_and_names_give_the_same_program():
    one, other = step(), step()
    run(one, zero3_compile.add_z3_gather_release, "prefetch")
    run(other, "zero3_compile", prefetch.schedule_prefetch)
    assert str(one) == str(other)


def test_a_pass_can_call_another():
    def both(program, context):
        zero3_compile.add_z3_gather_release(program, context)
        context.run(program, "prefetch")

    one, other = step(), step()
    run(one, both)
    run(other, "zero3_compile", "prefetch")
    assert str(one) == str(other)


def test_a_class_is_a_pass_by_its_objects():
    class Looks:
        contract = PassContract(needs=["gathers_placed"])

        def __call__(self, program, context):
            context.because("a", f"budget {context.memory_budget}")

    for given in (Looks, Looks()):
        program = step()
        log = run(program, "zero3_compile", given)
        assert log[1].pass_name == "Looks"
        assert program.reasons[-1].text == f"budget {64 << 20}"
        with pytest.raises(UserError, match="Looks: needs gathers_placed"):
            run(step(), given)


def test_a_context_knows_what_the_machine_takes():
    seen = {}

    def look(program, context):
        seen["gather"] = context.duration_ns(_core.Instr("gather", "a"))
        seen["step"] = context.simulate(program)
        seen["early"] = context.early_updates
        seen["context"] = context

    program = step()
    run(program, "zero3_compile", look, early_updates=True)
    sim = _core.simulate(program, _core.Machine.builtin("2x-cpu"))
    assert seen["gather"] > 0 and seen["early"] is True
    assert seen["step"] == (sim.time_ns, sim.peak_bytes)
    assert seen["context"].simulate(program) is None  # its pass has ended
    run(step(), "zero3_compile", look, machine=None)
    assert seen["gather"] is None and seen["step"] is None


def test_an_exception_names_the_pass_and_leaves_the_program():
    def fails(program, context):
        program.sections[0].add("gather", "a")
        raise UserError("[passes] fails: on purpose")

    def breaks(program, context):
        program.sections[0].add("release", "a")

    def misspells(program, context):
        program.sections[0].ad("gather", "a")

    def within(program, context):
        context.run(program, misspells)

    def asks(program, context):
        context.because("no such parameter", "for a test")

    program = step()
    for bad, words in (
        (fails, r"^\[passes\] fails: on purpose$"),
        (breaks, "breaks"),
        (misspells, r"^\[passes\] misspells: raised AttributeError: .*'ad'.*\(program, context\)"),
        (within, r"^\[passes\] within: \[passes\] misspells: raised AttributeError"),
        (lambda program: None, r"^\[passes\] <lambda>: raised TypeError: .*1 positional"),
        (asks, r"^\[passes\] asks: because\("),
    ):
        with pytest.raises(UserError, match=words) as raised:
            run(program, bad)
        if bad is misspells:  # its traceback is not lost
            assert raised.value.__cause__.__traceback__.tb_next is None
        assert str(program) == STEP or "gather" not in str(program)


@pytest.mark.parametrize(
    "edit",
    [
        lambda p, c: setattr(p, "reduce_dtype", "bf16"),
        lambda p, c: setattr(p, "accumulation", 3),
        lambda p, c: p.set_region_time("f.a", 1),
        lambda p, c: p.read_rows("x", "a", 4096),
        lambda p, c: p.add_value("more", 4),
    ],
)
def test_a_pass_that_changes_more_than_instructions_is_refused(edit):
    program = step()
    with pytest.raises(UserError, match="<lambda>: changed the program's tables"):
        run(program, "zero3_compile", edit)
    assert str(program) == str(step())


def test_a_step_that_clips_still_clips_after_a_pass():
    def unclipped(program, context):
        program.clip = False
        update = program.sections[2]
        update.set_instrs([i for i in update.instrs if i.op != "norm"])

    program = _core.StepProgram.parse(STEP.replace("world=2", "world=2 clip"))
    with pytest.raises(UserError, match="unclipped: changed the program's tables"):
        run(program, "zero3_compile", unclipped)


def test_a_pass_that_takes_the_plan_apart_is_named():
    def strips(program, context):
        for section in program.sections:
            section.set_instrs([i for i in section.instrs if i.op == "run"])

    with pytest.raises(UserError, match="strips: left a program that is not valid: .*gather a"):
        run(step(), "zero3_compile", strips)


def test_what_a_pass_hands_on_has_to_be_a_program():
    def hands_none(program, context):
        context.run(None, "prefetch")

    with pytest.raises(UserError, match="hands_none: raised TypeError"):
        run(step(), "zero3_compile", hands_none)


def test_a_class_whose_objects_take_arguments_is_named():
    class Sized:
        def __init__(self, size):
            self.size = size

        def __call__(self, program, context):
            pass

    with pytest.raises(UserError, match=r"\[passes\] Sized: raised TypeError: .*size"):
        run(step(), "zero3_compile", Sized)
    run(step(), "zero3_compile", Sized(3))


def test_reasons_take_the_models_own_names():
    text = STEP.replace(" a ", " _0.a ").replace("=a", "=_0.a").replace(" a)", " _0.a)")
    program = _core.StepProgram.parse(text)

    def says(program, context):
        context.because("0.a", "for a test")

    run(program, says)
    assert (program.reasons[-1].object, program.reasons[-1].text) == ("_0.a", "for a test")


def test_an_interrupt_stays_one():
    def interrupted(program, context):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(step(), interrupted)


@pytest.mark.parametrize(
    ("given", "words"), [(7, "7: is neither"), ("prefetsch", "prefetsch: there is no such pass")]
)
def test_what_is_no_pass_is_refused(given, words):
    with pytest.raises(UserError, match=words):
        run(step(), given)


def test_unknown_facts_are_refused():
    with pytest.raises(UserError, match="unknown fact gathered"):
        PassContract(needs=["gathered"])
