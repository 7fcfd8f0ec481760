# SPDX-License-Identifier: Apache-2.0
"""Schedules, budgets, whole-step plans and new graphs, in one process."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from test_engine import batch, config, start, step
from torch import nn

from deepcompile import UserError, _core, agreement, budget, planning
from deepcompile.config import CompileConfig
from deepcompile.distributed import Ranks
from deepcompile.passes import PassContract, from_deepspeed
from deepcompile.schedule import WARMUP, check_schedule, default_schedule, entry_at

SEED_STYLE = [
    (0, ["zero3_compile"]),
    (2, ["zero3_compile", "prefetch", "selective_gather"]),
]


def compiled(model=None, schedule=None, **settings):
    torch._dynamo.reset()
    engine = start(model, config=config(**settings))
    engine.compile(backend="eager", schedule=schedule)
    return engine


def history(engine) -> list[tuple[int, str]]:
    return [(line.step, line.why) for line in engine.planner.history]


# ---- schedules


def mine(program, context):
    pass


class Named:
    """As the objects of deepcompile.passes stand for the core's passes."""

    native = "prefetch"


def sorted_contract(program, context):
    pass


sorted_contract.contract = ["gathers_placed"]


class Sized:
    def __init__(self, size):
        pass

    def __call__(self, program, context):
        pass


def zero1_compile(program, context):
    """Named like another stage's pass."""


def test_default_schedule_is_the_stages_pass_and_then_the_planner():
    assert default_schedule(2) == [(0, ["zero1_compile"]), (WARMUP, ["auto"])]
    for given in (None, "auto", ["auto"]):
        first, later = check_schedule(given, 3, {})
        assert (first.passes, first.measured) == (("zero3_compile",), False)
        assert (later.passes, later.measured, later.step) == (("auto",), True, WARMUP)


def test_entries_take_names_functions_and_objects():
    given = [(0, ["zero3_compile", mine]), (5, ["zero3_compile", Named(), "theirs"])]
    first, later = check_schedule(given, 3, {"theirs": mine})
    assert not first.measured and first.names() == ["zero3_compile", "mine"]
    assert later.measured and later.passes == ("zero3_compile", "prefetch", mine)


def test_a_function_may_be_named_like_another_stages_pass():
    (entry,) = check_schedule([(0, ["zero3_compile", zero1_compile])], 3, {})
    assert entry.passes == ("zero3_compile", zero1_compile)


def test_passes_that_leave_no_whole_plan_are_named():
    """At once, and an engine goes on with another schedule."""
    engine = start(config=config())
    with pytest.raises(UserError, match=r"\[passes\] mine: together they leave a plan that is not"):
        engine.compile(backend="eager", schedule=[(0, [mine])])
    engine.compile(backend="eager", schedule=[(0, ["zero3_compile", mine])])
    twin = compiled(schedule=[(0, ["zero3_compile"])])
    assert [step(engine, n) for n in range(2)] == [step(twin, n) for n in range(2)]


def test_what_cannot_hold_a_contract_is_named():
    engine = start(config=config())
    with pytest.raises(
        UserError, match="mine: a builtin_function_or_method cannot hold a contract"
    ):
        engine.register_compile_pass("mine", print, PassContract())


def test_an_entry_holds_from_the_first_step_that_is_not_before_it():
    schedule = check_schedule(SEED_STYLE, 3, {})
    assert [entry_at(schedule, step).step for step in (0, 1, 2, 1000)] == [0, 0, 2, 2]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([(0, [3])], "3 is neither a pass's name nor a function"),
        ([(0, ["zero3_compile", "auto"])], "auto: conflicts with"),
        ([(0, ["order_link"])], "no pass that provides reductions_placed"),
        ([(0, ["zero3_compile"]), (3, ["zero1_compile"])], "zero1_compile: the engine is at ZeRO"),
        ([(0, ["zero3_compile"]), (2.5, ["auto"])], "is not (step, [passes])"),
        ([(0, ["zero3_compile"]), (float("inf"), ["auto"])], "is not (step, [passes])"),
        ([(0, ["zero3_compile", sorted_contract])], "schedule: sorted_contract: its contract is"),
        ([(0, ["zero3_compile", Sized])], "schedule: Sized: its objects are made with arguments"),
    ],
)
def test_schedules_that_are_refused(given, expected):
    with pytest.raises(UserError, match="schedule|conflicts|stage") as caught:
        check_schedule(given, 3, {})
    assert expected in str(caught.value)


def test_a_measured_entry_at_step_0_waits_for_a_profile():
    engine = compiled(schedule=[(0, ["zero3_compile", "prefetch"])])
    losses = [step(engine, n) for n in range(4)]
    assert history(engine) == [(2, "profile of step 2")]  # the first step compiles
    twin = compiled(schedule=[(0, ["zero3_compile"])])
    assert losses == [step(twin, n) for n in range(4)]
    assert history(twin) == []


def test_the_configurations_schedule_is_used():
    engine = compiled(compile={"schedule": [[0, ["zero3_compile"]]]})
    for number in range(5):
        step(engine, number)
    assert history(engine) == [] and engine.compile_report()["plans"] == 0


def test_a_function_sees_each_graph_at_step_0_and_later_the_whole_step_with_its_times():
    seen = []

    def watch(program, context):
        kinds = [section.kind for section in program.sections]
        whole = kinds == ["forward", "backward", "update"]
        known = [context.memory_budget is not None, context.simulate(program) is not None]
        seen.append((kinds, known))
        assert whole == all(known)

    engine = compiled(schedule=[(0, ["zero3_compile", watch]), (2, ["zero3_compile", watch])])
    for number in range(3):
        step(engine, number)
    assert seen[-1] == (["forward", "backward", "update"], [True, True])
    assert [kinds for kinds, _ in seen[-3:-1]] == [["update"], ["forward", "backward"]]


def test_functions_that_edit_keep_the_bits():
    """One that keeps a parameter whole, and one of DeepSpeed's form that moves nothing."""
    edits, called = [], []

    def keep(program, context):
        for section in program.sections:
            if section.kind == "forward":
                kept = [i for i in section.instrs if i.op != "release"]
                edits.append(len(section.instrs) - len(kept))
                section.set_instrs(kept)
        context.because("_0.bias", "is in a pack, and kept whole with it")

    def theirs(gm, graph_id, graph_order, profile, create_inputs, mem_budget, params, bwd):
        times = profile[graph_id].bwd_time if bwd else profile[graph_id].fwd_time
        called.append((bwd, mem_budget > 0, max(each[1] for each in times) > 0))
        return gm

    start_with = (0, ["zero3_compile"])
    twin = compiled(schedule=[start_with])
    expected = [step(twin, n) for n in range(5)]
    for each in (keep, from_deepspeed(theirs)):
        engine = compiled(schedule=[start_with, (2, ["zero3_compile", each])])
        assert [step(engine, n) for n in range(5)] == expected
        assert len(history(engine)) == 1
    assert sum(edits) > 0
    assert called == [(False, True, True), (True, True, True)]


def test_a_plan_changes_nothing_but_the_instructions():
    engine, twin = compiled(schedule=SEED_STYLE), compiled(schedule=[(0, ["zero3_compile"])])
    losses = [step(engine, n) for n in range(5)]
    assert losses == [step(twin, n) for n in range(5)]
    report = engine.compile_report()
    assert report["plans"] == 1 and report["recompilations"] == 0 and report["graphs"] == 1
    assert report["plan_passes"] == ["zero3_compile", "prefetch", "selective_gather"]
    assert 0 < report["plan_seconds"] < 60 and report["budget"] > 0
    for name, value in engine.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


def test_evaluation_between_steps_and_after_the_plan():
    engine, twin = compiled(), compiled(schedule=[(0, ["zero3_compile"])])
    for number in range(WARMUP + 3):
        assert step(engine, number) == step(twin, number)
        with torch.no_grad():
            assert torch.equal(engine(batch(9)), twin(batch(9)))


def test_a_new_shape_after_the_plan_takes_the_plan_of_its_skeleton():
    engine = compiled(schedule=SEED_STYLE)
    for number in range(3):
        step(engine, number)
    for rows in (3, 5):
        loss = engine(batch()[:1].expand(rows, 8).contiguous()).pow(2).mean()
        engine.backward(loss)
        engine.step()
    first, *more = engine.planner.graphs
    assert more and {g.skeleton for g in more} == {first.skeleton}
    orders = [agreement.order_of(g.program) for g in engine.planner.graphs]
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize("schedule", [SEED_STYLE, None])
def test_a_budget_that_no_plan_meets_is_an_error(schedule):
    engine = compiled(schedule=schedule, compile={"memory_budget": 64})
    with pytest.raises(UserError, match="budget"):
        for number in range(WARMUP + 1):
            step(engine, number)


def test_without_a_budget_of_the_users_the_stages_plan_stays():
    engine = compiled()
    engine.planner.budget_limit = 64
    with pytest.warns(UserWarning, match="The plan stays as it is"):
        for number in range(WARMUP + 1):
            step(engine, number)
    assert engine.planner.agreed is None and engine.compile_report()["plan_failures"]


# ---- the plan that holds


def planned_by_auto() -> planning.Planner:
    """Of an engine that looked at its plan once more."""
    engine = compiled()
    for number in range(WARMUP + 3):
        step(engine, number)
    return engine.planner


def measured_again(graphs: list) -> list:
    """The same graphs with other times."""
    out = [graph.copy() for graph in graphs]
    for graph in out:
        for region in graph.regions:
            graph.set_region_time(region.name, 900_000 if "bwd" in region.name else 100_000)
    return out


def test_the_plan_that_holds_is_a_candidate_for_the_next():
    planner = planned_by_auto()
    request, update = planner.request, planner.plain_update()
    first = request.held
    assert first is not None and first.entry == ["auto"]
    graphs = measured_again(planner.step_programs)
    held = agreement.held_program("step", graphs, request)
    as_it_is = _core.transplant(held, _core.merge_steps("step", graphs, update))
    now = _core.simulate(as_it_is, request.machine, request.costs)
    tight = dataclasses.replace(request, budget=now.peak_bytes)
    again = agreement.plan_step("step", graphs, {}, update, tight)
    assert again.predicted_ns <= now.time_ns and again.predicted_peak <= now.peak_bytes
    assert any(text.startswith("levels: ") for _, _, text in again.reasons)


def test_a_plan_that_is_as_good_as_the_one_that_holds_is_that_one():
    planner = planned_by_auto()
    request, update, graphs = planner.request, planner.plain_update(), planner.step_programs
    first = agreement.plan_step("step", graphs, {}, update, request)
    held = dataclasses.replace(request, held=first)
    second = agreement.plan_step("step", graphs, {}, update, held)
    assert second.instrs() == first.instrs()
    texts = [text for name, what, text in second.reasons if name == "auto" and not what]
    assert any("the plan that holds stays" in text for text in texts)
    assert sum(text.startswith("chosen: ") for text in texts) == 1


def test_early_updates_are_left_out_beside_a_graph_that_trains_the_same():
    """A step may run both, and what one's backward has updated the other's would read."""
    text = """
step g{name} world=8 reduce=bf16
param P bf16 50000000
param {mine} bf16 50000000
value x 20MiB
value s 20MiB
value loss 4B
value go 4B
value gP 100000000B grad=P
value g{mine} 100000000B grad={mine}
region f moved=100MiB flops=2000000000000 (x, P, {mine}) -> (s, loss)
region b moved=200MiB flops=4000000000000 (go, s, P, {mine}) -> (gP, g{mine})
forward 0 (x) -> (loss)
  run f
end
backward 0 (go) -> ()
  run b
end
"""
    parse, machine = _core.StepProgram.parse, _core.Machine.builtin("4x8-h100")
    own, other = (parse(text.format(name=n, mine=n)) for n in ("Q", "R"))
    apart = parse(text.format(name="R", mine="R").replace("P", "S"))
    update = parse(
        "step update world=8 reduce=bf16\n"
        + "".join(f"param {p} bf16 50000000\n" for p in "PQRS")
        + "update\nend\n"
    )
    for program in (own, other, apart):
        _core.analytic_costs(program, machine)
    told = []

    def tells(program, context):
        told.append(context.early_updates)

    request = agreement.Request(
        ("zero3_compile", tells), "zero3_compile", machine, None, 10 << 30, True
    )
    for beside, early in ((apart, True), (other, False)):
        told.clear()
        agreement.plan_step("s", [own], {_core.skeleton(beside): beside}, update, request)
        assert told == [early, early]  # of the step and of the graph beside it


def test_only_autos_own_plan_of_the_same_step_is_a_candidate():
    planner = planned_by_auto()
    request, graphs = planner.request, planner.step_programs
    assert agreement.held_program("step", graphs, request) is not None
    other = compiled(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    step(other)
    unknown = [g.plain for g in other.planner.graphs]
    assert agreement.held_program("step", unknown, request) is None
    for changed in (
        {"held": None},
        {"passes": ("auto", mine)},
        {"held": dataclasses.replace(request.held, entry=["auto", "mine"])},
    ):
        asked = dataclasses.replace(request, **changed)
        assert agreement.held_program("step", graphs, asked) is None


def test_a_plan_that_memory_ran_out_by_is_no_candidate():
    planner = planned_by_auto()
    assert planner.request.held is not None
    assert planner.plan_now(WARMUP + 3, "memory ran out")
    assert planner.request.held is None


def planned_pair() -> tuple:
    """(agreed plan of a small step, another graph's program)."""
    engine = compiled(schedule=SEED_STYLE)
    for number in range(2):
        step(engine, number)
    other = compiled(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    step(other)
    return engine.planner.agreed, other.planner.graphs[0]


def test_a_new_graph_with_other_transfers_is_an_error_that_names_rank_and_graph():
    agreed, other = planned_pair()
    with pytest.raises(UserError) as caught:
        agreement.check_new_graph(other.program, agreed, 3, 7, "model.py:1", "zero3_compile")
    text = str(caught.value)
    assert "rank 3, graph 7 (model.py:1)" in text and " in the other" in text


def test_gathers_are_added_for_parameters_that_are_behind():
    engine = compiled(schedule=[(0, ["zero3_compile"])])
    step(engine)
    installed = engine.planner.graphs[0]
    late = [p.name for p in installed.plain.params if p.placement == "whole"]
    program = agreement.classical(installed.plain, "zero3_compile", late)
    assert late
    for section in program.sections:
        first = [(i.op, i.operand) for i in section.instrs[:2]]
        assert first == [("gather", late[0]), ("wait", late[0])]
    program.verify()


# ---- budgets


MEMORY = budget.Memory(total=1000, free=300, held=200, foreign=100)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 450),  # nine tenths of what is free and what we hold
        ({"memory_reserve": 0.0}, 500),
        ({"memory_budget": 800}, 700),  # less what is not the plan's
        ({"memory_budget": 0.5}, 400),
    ],
)
def test_budget(settings, expected):
    assert budget.plan_budget(CompileConfig(**settings), MEMORY) == expected


def test_memory_of_this_host():
    total, available = budget.host_memory()
    assert 0 < available <= total
    memory = budget.measure(Ranks(0, 2, torch.device("cpu")), 5)
    assert memory.held == 5 and memory.foreign == 0 and memory.total <= total // 2 + 1


def test_bytes_on_the_host_are_not_held():
    assert budget.held_bytes({"shards": 3, "saved": 4, "host_states": 100}) == 7


# ---- reports


def test_the_report_tells_what_was_planned(tmp_path):
    engine = compiled()
    for number in range(WARMUP + 3):
        step(engine, number)
    assert engine.trace.agreed is engine.planner.agreed is not None
    from deepcompile.engine_report import report_data

    facts = report_data(engine)["facts"]
    assert facts["Plan"] == "auto for the whole step"
    assert {"Planning", "Planned step", "Memory budget", "Chosen"} <= set(facts)
    page = engine.report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "auto for the whole step" in page


def test_debug_log_is_seen_where_nothing_sets_up_logging(monkeypatch, capsys):
    quiet, theirs = (logging.getLogger(f"{__name__}.{name}") for name in ("quiet", "theirs"))
    quiet.propagate = theirs.propagate = False
    quiet.setLevel(logging.WARNING)
    monkeypatch.setattr(planning, "log", quiet)
    start(config=config(compile={"debug_log": True}))
    quiet.info("[planning] the text")
    assert "[planning] the text" in capsys.readouterr().err
    given = logging.NullHandler()
    theirs.addHandler(given)
    monkeypatch.setattr(planning, "log", theirs)
    planning.show_log()
    assert theirs.handlers == [given]
