# SPDX-License-Identifier: Apache-2.0
"""Traced steps, made up by simulating with costs that the profile does not know: simulated again
with what it finds in the trace, each must take as long as it took."""

import pytest

from deepcompile import _core, links
from deepcompile.profile import apply_costs, region_costs, take_times
from deepcompile.trace_costs import trace_costs

LAYERS = 6


def plain(accumulation=1, dtype="bf16"):
    """A chain of layers of one region forward and one backward, and a pack of norms."""
    numel, size = 1 << 20, 2 if dtype == "bf16" else 4
    lines = [f"step s world=2 accumulation={accumulation} clip reduce=f32"]
    lines += [f"param w.{i} {dtype} {numel}" for i in range(LAYERS)]
    lines.append(f"param norms {dtype} 4096 whole (n.0, n.1)")
    lines += ["value x 1MiB", "value t 4B"]
    for i in range(LAYERS):
        lines += [f"value h.{i} 1MiB", f"value d.{i} 1MiB"]
        lines.append(f"value g.{i} {numel * size}B grad=w.{i}")
    for k in range(2):
        lines.append(f"value gn.{k} {2048 * size}B grad=norms[{k}]")
    forward, backward = [], []
    for i in range(LAYERS):
        before = "x" if i == 0 else f"h.{i - 1}"
        after = "t" if i == LAYERS - 1 else f"d.{i + 1}"
        norms = ", gn.0, gn.1" if i == 0 else ""
        lines.append(f"region f.{i} code=1 ({before}, w.{i}, norms) -> (h.{i})")
        code = 3 if i == 0 else 2
        lines.append(
            f"region b.{i} code={code} ({after}, h.{i}, w.{i}, norms) -> (d.{i}, g.{i}{norms})"
        )
        forward.append(f"  run f.{i}")
        backward.insert(0, f"  run b.{i}")
    lines += [f"forward 0 (x) -> (h.{LAYERS - 1})", *forward, "end"]
    lines += ["backward 0 (t) -> ()", *backward, "end", "update", "end"]
    return _core.StepProgram.parse("\n".join(lines) + "\n")


def machine():
    return _core.Machine.builtin("4xh200")


def truth():
    """A machine that is not as it was measured alone, with a host that takes its time."""
    table = _core.CostTable(2)
    table.set_curve("gather", [(0, 20_000), (2 << 20, 150_000)])
    table.set_curve("reduce", [(0, 30_000), (4 << 20, 210_000)])
    table.set_curve("update", [(0, 9_000), (1 << 20, 31_000)])
    table.set_curve("accumulate", [(0, 4_000), (2 << 20, 17_000)])
    table.set_curve("norm", [(0, 44_000)])
    table.set_curve("staging", [(0, 6_000), (4 << 20, 25_000)])
    table.run_overhead_ns = 12_000
    for kind, ns in (("forward", 150_000), ("backward", 210_000), ("update", 90_000)):
        table.set_section_overhead(kind, ns)
    return table


def traced(program, costs):
    """Records of a simulated step as the runtime makes them, and its length."""
    result = _core.simulate(program, machine(), costs)
    records, kinds = [], {i: s for i, s in enumerate(program.sections)}
    for item in result.items:
        instr = kinds[item.section_index].instrs[item.index]
        op, start, end = instr.op, item.start_ns, item.end_ns
        if item.resource == "none":
            start = item.issue_ns
        if op == "accumulate":
            start = item.issue_ns  # waits inside of its span
        if op == "run":
            start += costs.run_overhead_ns
        records.append((0, item.section_index, item.index, start, end, -1))
    return records, result.time_ns


def alone():
    """What is known without a trace: links that nothing disturbs."""
    table = _core.CostTable(2)
    table.set_curve("gather", [(1 << 16, 15_000), (64 << 20, 700_000)])
    table.set_curve("reduce", [(1 << 16, 15_000), (64 << 20, 800_000)])
    return table


def planned(passes, **options):
    program = plain(**options)
    for region in program.regions:
        program.set_region_time(region.name, {1: 130_000, 2: 260_000, 3: 300_000}[region.code])
    _core.run_passes(program, passes, machine=machine(), memory_budget=1 << 40)
    return program


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize(
    "passes",
    [["zero3_compile"], ["zero3_compile", "prefetch"], ["zero3_compile", "selective_gather"]],
    ids="-".join,
)
def test_a_traced_step_simulates_as_long_as_it_took(passes, dtype, accumulation):
    program = planned(passes, dtype=dtype, accumulation=accumulation)
    records, length = traced(program, truth())
    plans, table = [(0, program)], alone()
    costs = region_costs(records, plans)
    blind = _core.simulate(apply_costs(program, costs), machine(), table).time_ns
    assert abs(blind - length) > 0.05 * length  # what the trace says between its records matters
    found = trace_costs(records, plans, _core.compute_slowdown(program, machine(), table))
    found.put_into(table)
    take_times(costs, found.runs)
    again = _core.simulate(apply_costs(program, costs), machine(), table).time_ns
    assert again == pytest.approx(length, rel=0.02)


def test_the_parts_are_found():
    program = planned(["zero3_compile"])
    costs = truth()
    found = trace_costs(*_one(program, costs), _core.compute_slowdown(program, machine(), costs))
    assert found.run_overhead == pytest.approx(12_000, rel=0.05)
    assert found.sections == {"forward": 150_000, "backward": 210_000, "update": 90_000}
    assert found.runs[1] == pytest.approx(130_000, rel=0.02)
    assert found.runs[2] == pytest.approx(260_000, rel=0.02)
    assert dict(found.curves["gather"])[2 << 20] == 150_000
    assert dict(found.curves["staging"])[4 << 20] == pytest.approx(25_000, rel=0.1)
    assert dict(found.curves["update"])[1 << 20] == pytest.approx(31_000, rel=0.1)
    assert dict(found.curves["accumulate"])[2 << 20] == pytest.approx(17_000, rel=0.1)
    assert found.curves["norm"][0][1] == pytest.approx(44_000, rel=0.1)


def _places(program, section):
    instrs = program.sections[section].instrs
    return {(i.op, i.region or i.param): k for k, i in enumerate(instrs)}


def test_a_transfer_that_waits_for_a_late_rank_disturbs_no_kernels():
    program = planned(["zero3_compile"])
    at = _places(program, 0)
    records, ms = [], 1_000_000
    for i in range(LAYERS):  # 0.1 ms each, but the other rank comes to the last 4.9 ms late
        end = (i + 1) * ms // 10 if i < LAYERS - 1 else LAYERS * ms // 10 + 49 * ms // 10
        records.append((0, 0, at["gather", f"w.{i}"], i * ms // 10, end, -1))
    for i in range(LAYERS):
        start = ms // 2 + i * ms
        records.append((0, 0, at["run", f"f.{i}"], start, start + ms, -1))
        records.append((0, 0, at["release", f"w.{i}"], start + ms, start + ms, -1))
    found = trace_costs(records, [(0, program)], 1.5)
    assert found.runs[1] == ms
    assert dict(found.curves["gather"])[2 << 20] == ms // 10


def test_transfers_that_overtake_each_other_take_time_too():
    program = planned(["zero3_compile"])
    at, us = _places(program, 0), 1000
    ends = [400, 300, 200, 700, 600, 500]  # three at a time, from 100 on
    records = [(0, 0, at["gather", f"w.{i}"], 100 * us, end * us, -1) for i, end in enumerate(ends)]
    records += [(0, 0, at["release", f"w.{i}"], 800 * us, 800 * us, -1) for i in range(LAYERS)]
    found = trace_costs(records, [(0, program)])
    assert dict(found.curves["gather"]) == {2 << 20: 100 * us}


def test_reductions_that_end_when_they_are_waited_for_say_nothing():
    program = planned(["zero3_compile"])
    at, ms = _places(program, 1), 1_000_000
    records = []
    for i in reversed(range(LAYERS)):
        start = (LAYERS - i) * ms
        records.append((0, 1, at["run", f"b.{i}"], start, start + ms, -1))
        records.append((0, 1, at["reduce", f"w.{i}"], start + ms, start + 2 * ms, -1))
    assert "reduce" in trace_costs(records, [(0, program)], 1.5).curves
    found = trace_costs(records, [(0, program)], 1.5, reductions_end=False)
    assert "reduce" not in found.curves
    assert found.runs[2] == ms


def _one(program, costs):
    return traced(program, costs)[0], [(0, program)]


def test_links_measured_alone_stay_outside_of_the_steps_sizes():
    program, table = planned(["zero3_compile"]), alone()
    found = trace_costs(*_one(program, truth()), 1.0)
    found.put_into(table)
    assert dict(table.curve("gather")) == {1 << 16: 15_000, 2 << 20: 150_000, 64 << 20: 700_000}
    copy = _core.CostTable.parse(table.serialize())
    assert copy.section_overhead("backward") == 210_000
    assert copy == table


def test_a_step_without_records_says_nothing():
    table = alone()
    trace_costs([], [(0, plain())]).put_into(table)
    assert table == alone()


def test_deferred_updates_are_no_launches():
    program = planned(["zero3_compile", "place_optimizer"])
    update = next(s for s in program.sections if s.kind == "update")
    assert any(i.op == "defer" for i in update.instrs) or any(
        i.op == "update" for s in program.sections if s.kind != "update" for i in s.instrs
    )
    found = trace_costs(*_one(program, truth()), 1.29)
    assert found.run_overhead is None or found.run_overhead < 30_000


def test_gathers_of_what_is_whole_are_no_transfers():
    program = planned(["zero3_compile", "selective_gather"])
    records = [
        # Its span is two events, one after the other.
        (*r[:3], r[3], max(r[4], r[3] + 700), -1)
        if program.sections[r[1]].instrs[r[2]].op == "gather"
        else r
        for r in traced(program, truth())[0]
    ]
    found = trace_costs(records, [(0, program)], 1.29)
    assert dict(found.curves["gather"])[2 << 20] == 150_000


def test_links_are_measured_with_what_memory_is_left():
    sizes = links.SIZES["cuda"]
    assert links.sizes_within("cuda", 1 << 40) == list(sizes)
    assert links.sizes_within("cuda", 100 << 20) == list(sizes[:-1])
    assert links.sizes_within("cuda", 0) == [sizes[0]]
