# SPDX-License-Identifier: Apache-2.0
"""The generator of random plans: what it makes is valid, repeatable and varied."""

from __future__ import annotations

from collections import Counter

import pytest
from random_plans import EDITS, MOVES_STATES, MOVES_VALUES, random_plan

from deepcompile import _core

GRAPH = """
step toy world=2 accumulation={accumulation} {clip}reduce=f32

param embed f32 4096
param L0.up f32 2048
param L0.down f32 2048
param L1.up f32 2048
param L1.down f32 2048
param table f32 512 frozen
param small f32 64 whole (L0.norm, L1.norm)

value ids 64B
value h0 1KiB
value a0 2KiB
value mask0 512B
value h1 1KiB
value a1 2KiB
value h2 1KiB
value loss 4B
value g.loss 4B
value g.h2 1KiB
value g.h1 1KiB
value g.h0 1KiB
value g.up1 8KiB grad=L1.up
value g.down1 8KiB grad=L1.down
value g.up0 8KiB grad=L0.up
value g.down0 8KiB grad=L0.down
value g.embed 16KiB grad=embed
value g.norm0 128B grad=small
value g.norm1 128B grad=small[1]

region fwd.in code=0 workspace=1KiB moved=17KiB (ids, embed, table) -> (h0)
region fwd.0 code=1 moved=30KiB flops=40000 (h0, L0.up, small) -> (a0)
region fwd.drop code=2 moved=30KiB once (a0, L0.down) -> (h1, mask0)
region fwd.1 code=1 moved=30KiB flops=40000 (h1, L1.up, small[1]) -> (a1)
region fwd.2 code=3 moved=30KiB (a1, L1.down) -> (h2)
region fwd.out code=4 (h2) -> (loss)
region bwd.out code=5 (g.loss, h2) -> (g.h2)
region bwd.2 code=6 (g.h2, a1, h1, L1.down, L1.up, small[1]) -> (g.h1, g.up1, g.down1, g.norm1)
region bwd.0 code=7 (g.h1, a0, mask0, h0, L0.down, L0.up, small) -> (g.h0, g.up0, g.down0, g.norm0)
region bwd.in code=8 (g.h0, ids) -> (g.embed)

forward 0 (ids) -> (loss)
  run fwd.in
  run fwd.0
  run fwd.drop
  run fwd.1
  run fwd.2
  run fwd.out
end
backward 0 (g.loss) -> ()
  run bwd.out
  run bwd.2
  run bwd.0
  run bwd.in
end
update
end
"""
PLANS = 150
MACHINE = _core.Machine.builtin("4xh200")


def plain(accumulation: int = 1, clip: bool = False):
    text = GRAPH.format(accumulation=accumulation, clip="clip " if clip else "")
    return _core.StepProgram.parse(text)


@pytest.fixture(scope="module")
def plans():
    return [
        random_plan(plain(1 + 3 * (seed % 2), seed % 4 > 1), "zero3_compile", seed, MACHINE)
        for seed in range(PLANS)
    ]


def test_plans_are_valid_and_differ(plans):
    texts = set()
    for plan in plans:
        plan.program.verify_plan()
        text = str(plan.program)
        assert str(_core.StepProgram.parse(text)) == text, plan
        assert _core.freeze(plan.program).hash
        texts.add(text)
    assert len(texts) > 0.9 * PLANS


def test_every_edit_is_taken_and_every_instruction_met(plans):
    edits = sum((plan.edits for plan in plans), Counter())
    print("accepted edits:", dict(edits))
    assert set(edits) == set(EDITS)
    met = {i.op for plan in plans for s in plan.program.sections for i in s.instrs}
    assert met >= {*MOVES_STATES, *MOVES_VALUES, "defer", "norm", "release"}


def test_the_seed_is_all_that_matters(plans):
    for seed in (3, 8):
        again = random_plan(plain(1 + 3 * (seed % 2), seed % 4 > 1), "zero3_compile", seed, MACHINE)
        assert str(again.program) == str(plans[seed].program)


def test_runs_keep_their_order_and_regions_that_draw_random_numbers_run_once(plans):
    first = [i.region for s in plain().sections for i in s.instrs]
    again = 0
    for plan in plans:
        runs = [i.region for s in plan.program.sections for i in s.instrs if i.op == "run"]
        assert list(dict.fromkeys(runs)) == first, plan
        assert runs.count("fwd.drop") == 1, plan
        again += len(runs) - len(first)
    assert again > 0


def test_plans_can_be_simulated(plans):
    for plan in plans:
        _core.analytic_costs(plan.program, MACHINE)
        sim = _core.simulate(plan.program, MACHINE)
        assert sim.time_ns > 0 and sim.peak_bytes > 0, plan
        assert _core.memory_timeline(plan.program)["peak"] > 0, plan


def test_a_plan_is_kept_as_text_with_its_history(plans, tmp_path):
    path = plans[1].keep(tmp_path, "toy")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# seed 1: passes zero3_compile")
    assert str(_core.StepProgram.parse(text)) == str(plans[1].program)
