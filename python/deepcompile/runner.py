# SPDX-License-Identifier: Apache-2.0
"""What a compiled function calls: one captured graph's sections, by its newest plan."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any


class StepWatch:
    """What the running step has called so far, and whether parameters are behind."""

    def __init__(self) -> None:
        self.forwards: dict[int, None] = {}
        """Graphs by number, in the order of their first forward."""
        self.late = False
        """Whether the plan leaves updates to the next step."""
        self.on_backward: Callable[[], None] | None = None
        """Called before each backward."""

    def end(self) -> list[int]:
        """The graphs of the step that ends here."""
        order = list(self.forwards)
        self.forwards.clear()
        return order


class PlanRunner:
    """Runs one captured graph's sections by its newest plan; a backward runs by the plan that
    its forward ran by."""

    def __init__(self, runtime: Any, graph: int = 0, watch: StepWatch | None = None):
        self._runtime = runtime
        self._graph = graph
        self._watch = watch or StepWatch()
        self._plan_id = -1
        self._sections: dict[str, int] = {}
        self._since = [0]
        self._plans: list[tuple[int, dict[str, int]]] = []
        self.newest_call = 0

    def use(self, plan_id: int, sections: dict[str, int]) -> None:
        """From the next call on, run `plan_id`; `sections` maps kind to index in it."""
        self._plan_id, self._sections = plan_id, sections
        if self._plans:
            self._since.append(self.newest_call + 1)
        self._plans.append((plan_id, sections))

    def forward(self, inputs: list) -> tuple[Any, Sequence[Any]]:
        self._watch.forwards[self._graph] = None
        call_id, token = self._runtime.new_call(self._plan_id)
        self.newest_call = call_id
        return token, self._runtime.run(self._plan_id, self._sections["forward"], call_id, inputs)

    def backward(self, call_id: int, inputs: list) -> Sequence[Any]:
        if self._watch.on_backward is not None:
            self._watch.on_backward()
        plan, sections = self._plan_id, self._sections
        if len(self._plans) > 1:
            plan, sections = self._plans[bisect.bisect_right(self._since, call_id) - 1]
        return self._runtime.run(plan, sections["backward"], call_id, inputs)

    def inference(self, inputs: list) -> Sequence[Any]:
        if self._watch.late:
            self._runtime.settle()  # weights of this step, whatever the plan left to the next
        return self._runtime.run(self._plan_id, self._sections["inference"], -1, inputs)


def section_kinds(program: Any) -> dict[str, int]:
    """Section kind to index in a program of one graph."""
    return {section.kind: index for index, section in enumerate(program.sections)}
