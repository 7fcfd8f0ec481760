# SPDX-License-Identifier: Apache-2.0
"""From a trace's records to costs."""

from deepcompile import _core
from deepcompile.profile import apply_costs, region_costs, take_times

PROGRAM = _core.StepProgram.parse(
    """
step s world=2 accumulation=1 reduce=f32
param a f32 128
param b f32 1280
value x 8B
value y 8B
value z 8B
region one code=4 (x, a) -> (y)
region two code=4 (y, b) -> (z)
forward 0 (x) -> (z)
  run one
  run two
end
"""
)
PLANS = [(10, PROGRAM)]


def test_equal_regions_share_the_median_and_the_largest_workspace():
    times, scratch = [100, 700, 120, 110], [64, -1, 256, 0]
    records = [
        (10, 0, i % 2, 1000, 1000 + t, w)
        for i, (t, w) in enumerate(zip(times, scratch, strict=True))
    ]
    cost = region_costs([*records, (99, 0, 0, 0, 5, -1)], PLANS)
    assert set(cost) == {4}
    assert (cost[4].time_ns, cost[4].workspace) == (115, 256)
    timed = apply_costs(PROGRAM, cost)
    assert [(r.time, r.workspace) for r in timed.regions] == [(115, 256)] * 2
    assert [r.time for r in PROGRAM.regions] == [None, None]


def test_no_workspace_leaves_the_estimate():
    cost = region_costs([(10, 0, 0, 0, 5, -1)], PLANS)
    assert cost[4].workspace is None
    assert apply_costs(PROGRAM, cost).regions[0].workspace == 0


def test_better_times_go_before_the_median():
    cost = region_costs([(10, 0, 0, 0, 5, 7)], PLANS)
    take_times(cost, {4: 3, 9: 1})
    assert set(cost) == {4}
    assert (cost[4].time_ns, cost[4].workspace) == (3, 7)
