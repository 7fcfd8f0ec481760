# SPDX-License-Identifier: Apache-2.0
"""Module _core: programs, passes in Python, plans, machines, simulation, reports."""

from __future__ import annotations

import json

import pytest

from deepcompile import _core
from deepcompile.errors import InternalError, UserError

UNIT_MACHINE = {
    "name": "unit",
    "nodes": 1,
    "ranks_per_node": 2,
    "device": {
        "name": "d",
        "flops": {"f32": 1e9},
        "compute_efficiency": 1.0,
        "memory_bandwidth": 1e9,
        "memory_efficiency": 1.0,
        "memory_bytes": 1 << 30,
        "launch_overhead_ns": 0,
    },
    "links": {
        "intra": {
            "gather_bandwidth": 1e9,
            "reduce_bandwidth": 1e9,
            "latency_ns": 0,
            "compute_slowdown": 1,
        }
    },
    "host": {"to_device_bandwidth": 1e9, "to_host_bandwidth": 1e9},
}


def make_graph() -> _core.StepProgram:
    """One graph, compute only: a large parameter and a pack of two."""
    program = _core.StepProgram()
    program.name = "made"
    program.world = 2
    program.add_param("a", "f32", 128)
    program.add_param("small", "f32", 64, placement="whole", members=["n.weight", "n.bias"])
    program.add_value("x", 64)
    program.add_value("loss", 4)
    program.add_value("t.loss", 4)
    program.add_value("ga", 512, grad_of="a")
    program.add_value("gn", 128, grad_of="small")
    program.add_value("gb", 128, grad_of="small[1]")
    program.add_region("f", 0, ["x", "a", "small[1]"], ["loss"], workspace=8, moved=100, flops=100)
    program.add_region("b", 1, ["t.loss", "x", "a", "small"], ["ga", "gn", "gb"])
    program.add_section("forward", 0, ["x"], ["loss"]).run("f")
    program.add_section("backward", 0, ["t.loss"], []).add("run", "b")
    return program


def make_update() -> _core.StepProgram:
    program = _core.StepProgram()
    program.world = 2
    program.add_param("a", "f32", 128)
    program.add_param("small", "f32", 64, placement="whole", members=["n.weight", "n.bias"])
    program.add_section("update", 0, [], [])
    return program


def make_step() -> _core.StepProgram:
    return _core.merge_steps("step", [make_graph()], make_update())


def machine() -> _core.Machine:
    return _core.Machine.parse(json.dumps(UNIT_MACHINE))


def test_text_round_trips():
    program = make_step()
    program.set_region_time("f", 1500)
    again = _core.StepProgram.parse(str(program))
    assert str(again) == str(program)
    assert again.regions[0].time == 1500


def test_tables_are_readable():
    program = make_graph()
    assert [p.name for p in program.params] == ["a", "small"]
    small = program.params[1]
    assert (small.dtype, small.numel, small.placement, small.trainable) == (
        "f32",
        64,
        "whole",
        True,
    )
    assert small.members == ["n.weight", "n.bias"]
    assert program.params[0].full_bytes == 512 and program.params[0].shard_bytes == 256
    assert {v.name: v.grad_of for v in program.values}["gb"] == "small[1]"
    region = program.regions[0]
    assert region.inputs == ["x", "a", "small[1]"] and region.outputs == ["loss"]
    assert (region.workspace, region.moved, region.flops, region.time) == (8, 100, 100, None)
    section = program.sections[1]
    assert (section.kind, section.graph, section.name) == ("backward", 0, "backward 0")
    assert section.inputs == ["t.loss"]
    assert section.instrs == [_core.Instr("run", "b")]
    assert (section.instrs[0].region, section.instrs[0].param) == ("b", None)


def test_sections_are_views():
    program = make_graph()
    section = program.sections[0]
    section.set_instrs([_core.Instr("gather", "a"), _core.Instr("wait", "a"), *section.instrs])
    assert [str(i) for i in program.sections[0].instrs] == ["gather a", "wait a", "run f"]
    with pytest.raises(UserError, match="gater"):
        section.set_instrs([_core.Instr("gater", "a")])
    assert len(section.instrs) == 3  # unchanged


@pytest.mark.parametrize(
    ("op", "operand", "values", "message"),
    [
        ("gather", "nobody", [], "unknown parameter"),
        ("run", "nothing", [], "unknown region"),
        ("gather", None, [], "needs a parameter"),
        ("norm", "a", [], "takes no operand"),
        ("reduce", "a", ["nothing"], "value nothing: unknown"),
        ("wait", "a", ["ga"], "takes no values"),
    ],
)
def test_wrong_instructions_are_named(op, operand, values, message):
    with pytest.raises(UserError, match=message):
        make_graph().sections[0].add(op, operand, values)


def test_errors_are_python_errors():
    assert issubclass(UserError, ValueError)
    assert issubclass(InternalError, RuntimeError)
    with pytest.raises(UserError, match=r"bug\.txt:1:\d+"):
        _core.StepProgram.parse("stop here", "bug.txt")
    for operand in ("small[2]", "small[x]", "small[1", "small[-1]"):
        with pytest.raises(UserError):
            make_graph().add_region("r", 0, [operand], [])


def test_passes_run_and_log():
    program = make_step()
    log = _core.run_passes(program, ["zero3_compile"])
    assert [r.pass_name for r in log] == ["zero3_compile"]
    assert log[0].changed and log[0].instrs_after > log[0].instrs_before
    assert log[0].time_ns > 0 and "zero3_compile" in str(log[0])
    assert any(r.object == "a" and r.pass_name == "zero3_compile" for r in program.reasons)
    assert "zero3_compile" in _core.pass_names()
    info = _core.pass_info("zero3_compile")
    assert "gathers_placed" in info.contract.provides and info.summary
    with pytest.raises(UserError, match="zero9"):
        _core.run_passes(program, ["zero9"])


def test_passes_get_a_machine_and_a_budget():
    program = make_step()
    passes = ["zero3_compile", "prefetch", "selective_gather"]
    machine = _core.Machine.builtin("2x-cpu")
    with pytest.raises(UserError, match="selective_gather: .* has no machine"):
        _core.run_passes(program, passes, memory_budget=1 << 30)
    with pytest.raises(UserError, match="memory_budget: 0 bytes"):
        _core.run_passes(program, passes, machine=machine, memory_budget=0)
    log = _core.run_passes(program, passes, machine=machine, memory_budget=1 << 30)
    assert [r.pass_name for r in log] == passes
    assert {"prefetch", "selective_gather"} <= {r.pass_name for r in program.reasons}
    assert _core.parse_bytes("1.5GiB") == 3 << 29


def test_a_pass_in_python_edits_the_program():
    program = make_step()

    def gather_first(program, context):
        section = program.sections[0]
        instrs = section.instrs
        moved = [i for i in instrs if i.op == "gather"]
        section.set_instrs(moved + [i for i in instrs if i.op != "gather"])
        context.because("a", "gathered first")

    gather_first.contract = _core.PassContract(needs=["gathers_placed"])
    log = _core.run_passes(program, ["zero3_compile", gather_first])
    assert [r.pass_name for r in log] == ["zero3_compile", "gather_first"]
    assert program.reasons[-1].text == "gathered first"
    with pytest.raises(UserError, match="gather_first"):  # its need is not met
        _core.run_passes(make_step(), [gather_first])
    with pytest.raises(UserError, match="unknown fact"):
        _core.PassContract(needs=["good_weather"])


def test_a_failing_pass_changes_nothing():
    program = make_step()
    before = str(program)

    def breaks(program, context):
        program.sections[0].set_instrs([])
        raise KeyError("mine")

    with pytest.raises(UserError, match="breaks: raised KeyError: 'mine'"):
        _core.run_passes(program, ["zero3_compile", breaks])
    assert str(program) == before

    def forgets_the_wait(program, context):
        section = program.sections[0]
        section.set_instrs([i for i in section.instrs if i.op != "wait"])

    with pytest.raises(UserError):  # the verifier finds it
        _core.run_passes(program, ["zero3_compile", forgets_the_wait])
    assert str(program) == before
    with pytest.raises(UserError, match="no parameter or region"):
        _core.run_passes(program, [lambda program, context: context.because("nobody", "x")])


def test_what_a_pass_keeps_stays_good():
    kept = []
    program = make_step()
    _core.run_passes(program, [lambda program, context: kept.append((program, context))])
    del program
    assert kept[0][0].sections[0].name == "forward 0"
    kept[0][1].because("", "late")
    kept[0][1].because("n.bias", "later")  # a packed parameter's reason is its pack's
    assert [(r.object, r.text) for r in kept[0][0].reasons] == [
        ("", "late"),
        ("small", "n.bias: later"),
    ]


def test_plans_freeze_and_parse():
    program = make_step()
    with pytest.raises(UserError):
        _core.freeze(program)  # compute only: its gradients go nowhere
    _core.run_passes(program, ["zero3_compile"])
    plan = _core.freeze(program)
    assert plan.params == ["a", "small"] and plan.world == 2
    assert [s.kind for s in plan.sections] == ["forward", "backward", "update"]
    reduce = next(i for i in plan.sections[1].instrs if i.op == "reduce" and i.param == 1)
    assert [plan.values[v] for v in reduce.values] == ["gn", "gb"] and reduce.members == [0, 1]
    assert _core.parse_plan(plan.serialize()) == plan
    program.set_region_time("f", 5)
    assert _core.freeze(program).hash == plan.hash
    with pytest.raises(UserError, match="ends too early"):
        _core.parse_plan(plan.serialize()[:100])


def test_machines():
    assert {"2x-cpu", "4xh200", "4x8-a100", "4x8-h100"} <= set(_core.Machine.builtin_names())
    h200 = _core.Machine.builtin("4xh200")
    assert h200.ranks == 4 and h200.inter is None and h200.intra["gather_bandwidth"] == 319e9
    # A 1.7 GB layer: 1.7 * 3 / 4 / 319 = 4.0 ms; its reduction was measured at 4.1 ms.
    assert _core.collective_ns(h200, "all_gather", 4, 1_700_000_000) == pytest.approx(
        4.0e6, rel=0.02
    )
    reduce = _core.collective_ns(h200, "reduce_scatter", 4, 1_700_000_000)
    assert reduce == pytest.approx(4.1e6, rel=0.02)
    with pytest.raises(UserError, match="4xh200"):
        _core.Machine.builtin("4xh100")
    bad = json.loads(json.dumps(UNIT_MACHINE))
    bad["links"]["intra"]["reduce_bandwidth"] = -1
    with pytest.raises(UserError, match=r"links\.intra\.reduce_bandwidth: must be greater than 0"):
        _core.Machine.parse(json.dumps(bad))


def test_simulation():
    program = make_step()
    assert _core.analytic_costs(program.copy(), machine()) == 2
    _core.run_passes(program, ["zero3_compile"])
    sim = _core.simulate(program, machine())
    gather = next(i for i in sim.items if i.label == "gather a")
    section, index, label, resource, start, end = gather
    # Half of 512 B comes from the other rank, 1 byte a ns.
    assert (section, index, resource, start, end) == ("forward 0", 0, "link", 0, 256)
    assert gather.as_dict()["start_ns"] == 0
    run = next(i for i in sim.items if i.label == "run f")
    assert (run.start_ns, run.end_ns) == (256, 356)
    assert sim.time_ns >= max(i.end_ns for i in sim.items)
    assert sim.busy["link"] > 0 and sim.stall_ns > 0
    assert max(b for _, b in sim.memory) <= sim.peak_bytes
    assert sim.memory[0][1] >= sim.resident_bytes
    timeline = _core.memory_timeline(program)
    assert timeline["base"] == sim.resident_bytes
    program.world = 16
    with pytest.raises(UserError, match="has 2 ranks"):
        _core.simulate(program, machine())


def test_host_copies_are_simulated():
    program = make_step()
    _core.run_passes(program, ["zero3_compile"])
    update = program.sections[-1]
    update.add("offload_states", "a")
    update.add("evict_states", "a")
    sim = _core.simulate(program, machine())
    # They come back for the update by themselves, and go again after it.
    assert [i.resource for i in sim.items if i.label == "reload_states a"] == ["to_device"]
    assert sim.busy["to_host"] == sim.busy["to_device"] > 0
    assert _core.memory_timeline(program)["peak"] == sim.peak_bytes


def test_cost_table():
    program = make_step()
    _core.run_passes(program, ["zero3_compile"])
    costs = _core.CostTable(world=program.world)
    costs.set_curve("gather", [(512, 1000), (1024, 2000)])
    costs.run_overhead_ns = 7
    costs.compute_slowdown = 1.5
    gather = next(
        i for i in _core.simulate(program, machine(), costs).items if i.label == "gather a"
    )
    assert gather.end_ns - gather.start_ns == 1000
    again = _core.CostTable.parse(costs.serialize())
    assert again == costs and again.curve("gather") == [(512, 1000), (1024, 2000)]
    assert (again.world, again.run_overhead_ns, again.compute_slowdown) == (program.world, 7, 1.5)
    assert again.curve("norm") == []
    assert again.to_device_beside is again.to_host_beside is None
    costs.to_device_beside, costs.to_host_beside = 0.5, 1
    again = _core.CostTable.parse(costs.serialize())
    assert (again.to_device_beside, again.to_host_beside) == (0.5, 1)
    for wrong in (0, 1.5, float("nan")):
        with pytest.raises(UserError, match="must be from 0.01 to 1"):
            costs.to_host_beside = wrong
    with pytest.raises(UserError, match="there is no curve gahter. Known: gather, reduce"):
        costs.set_curve("gahter", [])
    with pytest.raises(UserError, match="rising order"):
        costs.set_curve("gather", [(2, 1), (1, 2)])
    with pytest.raises(UserError, match="Give `machine` too"):
        _core.run_passes(program, ["prefetch"], costs=costs)
    _core.run_passes(program, ["prefetch"], machine=machine(), costs=costs)
    with pytest.raises(UserError, match="measured with 8 ranks"):
        _core.simulate(program, machine(), _core.CostTable(world=8))


def test_reports():
    program = make_step()
    _core.run_passes(program, ["zero3_compile"])
    sim = _core.simulate(program, machine())
    text = _core.explain(program, sim)
    assert "param a: f32" in text and "why: kept sharded" in text
    graph = make_graph()
    _core.run_passes(graph, ["zero3_compile"])
    index = next(i for i, x in enumerate(graph.sections[0].instrs) if x.op == "run")
    records = [(5, 0, index, 1000, 1250)]
    rows = _core.compare(sim, [(5, graph)], records)
    row = next(r for r in rows if r.label == "run f")
    assert (row.predicted_ns, row.measured_ns, row.samples, row.ratio) == (100, 250, 1, 2.5)
    assert "run f" in _core.compare_table(rows)
    trace = json.loads(_core.perfetto_trace([("predicted", sim)], [(5, graph)], records, "rank 0"))
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert names == {"predicted", "rank 0"}
    program.sections[0].set_instrs([])
    with pytest.raises(UserError, match="has changed"):
        _core.explain(program, sim)
