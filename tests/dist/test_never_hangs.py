# SPDX-License-Identifier: Apache-2.0
"""Nothing that ranks do differently may hang them, whatever the planner does meanwhile.

Each case has a timeout, after which the ranks are killed and named with their stacks; before
that, the runtime gives a transfer up with a message that names rank, parameter and instruction.
"""

from __future__ import annotations

import re

import hang_cases
import pytest
import ranks
from ranks import RankError, run_ranks

pytestmark = pytest.mark.timeout(600)
CLASSICAL = [(0, ["zero3_compile"])]


def same(results: list[dict]) -> dict:
    """Rank 0's result; all ranks must hold the same weights after as many steps."""
    for key in ("digest", "steps", "replans"):
        assert len({result[key] for result in results}) == 1, key
    return results[0]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_that_do_all_sorts_of_things(world):
    """200 steps with lengths of each rank's own; and the classical plan gives the same bits."""
    steps = hang_cases.STEPS
    short = 50
    runs = [("all_sorts", (steps, None, short)), ("all_sorts", (short, CLASSICAL))]
    if world == 4:
        runs = [("all_sorts", (steps, None))]
    found = run_ranks(hang_cases.several, world, runs, timeout=400)
    long, *classical = [same([rank[at] for rank in found]) for at in range(len(runs))]
    assert long["steps"] == len([s for s in range(steps) if s % 17 != 5 and s % 41 != 11])
    assert long["graphs"] >= 3 and long["replans"] >= 1 and long["recompilations"] == 0
    print(f"{world} ranks: {long['steps']} steps, {long['graphs']} graphs, {long['seconds']:.0f} s")
    for result in classical:
        early = same([rank[0]["early"] for rank in found])
        for key in ("digest", "losses"):
            assert early[key] == result[key], f"{key}: plans differ from the classical ones"


@pytest.mark.parametrize("world", [2, 4])
def test_one_rank_compiles_while_others_wait_and_graphs_break(world):
    runs = [("new_length", ()), ("graph_breaks", ())]
    found = run_ranks(hang_cases.several, world, runs, timeout=300)
    lengths, breaks = ([rank[at] for rank in found] for at in range(2))
    same(lengths)
    same(breaks)
    assert [result["graphs"] for result in lengths] == [1] * (world - 1) + [4]
    assert all(result["graphs"] > 1 and result["breaks"] for result in breaks)


@pytest.mark.parametrize("at", [2, 6])
def test_a_rank_that_stops_is_an_error_with_rank_parameter_and_instruction(at, monkeypatch):
    """Before and after the planner's plan. The stopped rank is killed by the harness."""
    monkeypatch.setattr(ranks, "GRACE_S", 2.0)
    with pytest.raises(RankError) as caught:
        run_ranks(hang_cases.stopping, 2, at, timeout=60)
    said = str(caught.value)
    print("\n".join(line for line in said.splitlines() if "[runtime]" in line))
    assert re.search(
        r"\[runtime\] rank 0: (forward|backward) 0, instruction \d+ "
        r"\((gather|wait|reduce|accumulate) [\w.]+\)",
        said,
    ), said
    assert "rank 1 hung" in said and "hang_cases.py" in said


@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_short_of_memory_goes_on_with_the_same_bits(world):
    """The last rank helps itself; then all ranks plan again with less, once or more."""
    runs = [("short_of_memory", (True,)), ("short_of_memory", (False,))]
    found = run_ranks(hang_cases.several, world, runs, timeout=300)
    limited, free = ([rank[at] for rank in found] for at in range(2))
    same(limited)
    for rank, (mine, theirs) in enumerate(zip(limited, free, strict=True)):
        assert mine["digest"] == theirs["digest"] and mine["losses"] == theirs["losses"]
        assert (mine["relieved"] > 0) == (rank == world - 1) and theirs["relieved"] == 0
        assert mine["lowered"] >= 1 and mine["budget"] < theirs["budget"]
        assert mine["recompilations"] == 0
    print(
        f"{world} ranks: relieved {limited[-1]['relieved']} times, budget lowered "
        f"{limited[-1]['lowered']} times, from {free[0]['budget']:,} to {limited[0]['budget']:,}"
    )
