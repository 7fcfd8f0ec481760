# SPDX-License-Identifier: Apache-2.0
"""Passes written for DeepSpeed's DeepCompile, on our programs.

Such a pass is called once for each direction of each graph with
``(gm, graph_id, graph_order, profiling_results, create_inputs_fn, mem_budget, param_manager,
bwd)``. It gets a torch.fx graph whose nodes are our instructions: gathers, waits, releases and
reductions under the names DeepSpeed gives them (``torch.ops.dc.allgather_param.default`` ...), and
one node a region. What it moves, adds or takes out of those is taken over; what has no meaning
here raises an error. docs/passes/custom.md has the table of what is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from .. import _core
from ..errors import UserError


def from_deepspeed(
    function: Callable[..., Any], contract: _core.PassContract | None = None
) -> Callable[[_core.StepProgram, _core.PassContext], None]:
    """``function``, of DeepSpeed's pass signature, as a pass for schedules.

    Forwards are shown in their order, then backwards in theirs. ``contract``: needs and provides
    in our facts; without it the pass needs ``gathers_placed``, as most of them do.
    """
    if not callable(function):
        raise UserError(f"[passes] from_deepspeed: {function!r} is not a function")

    @functools.wraps(function)
    def adapted(program: _core.StepProgram, context: _core.PassContext) -> None:
        from .deepspeed_graph import profile_of, read_graph, write_graph  # starts torch

        kinds = {(s.kind, s.graph): s for s in program.sections}
        forwards = [g for k, g in kinds if k in ("forward", "inference")]
        order = [(g, ("backward", g) in kinds) for g in forwards]
        passed = [("forward", g) if ("forward", g) in kinds else ("inference", g) for g in forwards]
        passed += [("backward", g) for k, g in kinds if k == "backward"]
        for kind, graph in passed:
            section = kinds[kind, graph]
            shown = write_graph(program, section, context)
            profiles = {g: profile_of(program, g, context) for g in forwards}
            managers = _ByGraph({g: ParamManager(program, shown.param_nodes) for g in forwards})
            gm = function(
                shown.module,
                graph,
                order,
                profiles,
                _no_inputs(context.pass_name),
                float(context.memory_budget or 0),
                managers,
                kind == "backward",
            )
            gm = shown.module if gm is None else gm
            if not hasattr(gm, "graph"):
                raise UserError(
                    f"[passes] {context.pass_name}: returned a {type(gm).__name__}. Return the "
                    "GraphModule it was given."
                )
            section.set_instrs(read_graph(gm.graph, program, section, context.pass_name))

    adapted.contract = contract or _core.PassContract(needs=["gathers_placed"])
    return adapted


def _no_inputs(name: str) -> Callable[[], Any]:
    def create_inputs_fn() -> Any:
        raise UserError(
            f"[passes] {name}: create_inputs_fn: nothing runs while a plan is made, so there are "
            "no inputs. Read times and sizes from profiling_results."
        )

    return create_inputs_fn


class _ByGraph(Mapping):
    """``param_manager[graph_id]``."""

    def __init__(self, managers: dict[int, ParamManager]):
        self._managers = managers

    def __getitem__(self, graph_id: int) -> ParamManager:
        return self._managers[graph_id]

    def __iter__(self) -> Any:
        return iter(self._managers)

    def __len__(self) -> int:
        return len(self._managers)

    def __getattr__(self, name: str) -> Any:
        # Some of DeepSpeed's passes annotate the manager of one graph; they are given all.
        if name.startswith("__"):
            raise AttributeError(name)
        raise UserError(f"[passes] param_manager.{name}: take param_manager[graph_id] first.")


class GraphParam:
    """What DeepSpeed's DSGraphParam says of a parameter. The shape is that of the flat buffer."""

    def __init__(self, param: Any, ds_id: int, node: Any):
        self.name, self.ds_id, self.node = param.name, ds_id, node
        self.numel, self.shape, self.ds_shape = param.numel, (param.numel,), (param.numel,)
        self.dtype, self.persistent = param.dtype, param.placement != "sharded"

    def __getattr__(self, name: str) -> Any:
        raise UserError(
            f"[passes] param_manager.params[...].{name}: there are no tensors while a plan is "
            "made. name, ds_id, node, numel, shape, dtype and persistent are there."
        )


class ParamManager:
    """What DeepSpeed's DSGraphParamManager says of a graph's parameters."""

    def __init__(self, program: _core.StepProgram, nodes: dict[str, Any]):
        self._nodes = nodes
        self.params: dict[str, GraphParam] = {}
        for ds_id, param in enumerate(program.params):
            if param.name in nodes:
                node = nodes[param.name]
                self.params[node.name] = GraphParam(param, ds_id, node)

    @property
    def param_names(self) -> list[str]:
        """Names of the graph's parameter placeholders."""
        return list(self.params)

    @property
    def ds_ids(self) -> dict[str, int]:
        return {name: param.ds_id for name, param in self.params.items()}

    def __getattr__(self, name: str) -> Any:
        raise UserError(
            f"[passes] param_manager[graph_id].{name}: is not there. params, param_names and "
            "ds_ids are; gradients are the nodes that reduce_grad reads."
        )
