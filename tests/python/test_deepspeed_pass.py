# SPDX-License-Identifier: Apache-2.0
"""Passes written for DeepSpeed, on our programs."""

from __future__ import annotations

import functools

import pytest
import torch
from test_passes import step
from torch.fx import Graph

from deepcompile import _core
from deepcompile.errors import UserError
from deepcompile.passes import PassContract, from_deepspeed, prefetch
from deepcompile.schedule import check_schedule


def run(function, *before, **options):
    program = step()
    adapted = from_deepspeed(function, **options)
    machine = _core.Machine.builtin("2x-cpu")
    _core.run_passes(
        program, [*(before or ["zero3_compile"]), adapted], machine=machine, memory_budget=64 << 20
    )
    return program


def instrs(program, section=0):
    return [f"{i.op} {i.operand}" for i in program.sections[section].instrs]


def test_a_pass_that_only_looks_changes_nothing():
    seen = []

    def look(
        gm, graph_id, graph_order, profiling_results, create_inputs_fn, mem_budget, managers, bwd
    ):
        seen.append((graph_id, bwd))
        assert graph_order == [(0, True)] and mem_budget == 64 << 20
        profile = profiling_results[graph_id]
        times = dict((n, t) for n, t, _ in (profile.bwd_time if bwd else profile.fwd_time))
        assert times["run_b_a" if bwd else "run_f_a"] == pytest.approx(20 if bwd else 10)
        names = [n.name for n in gm.graph.nodes if n.op != "output"]
        memory = profile.bwd_mem if bwd else profile.fwd_mem
        assert [m[0] for m in memory] == names
        assert all(peak >= now for _, now, _, peak in memory)
        assert managers[graph_id].ds_ids == {"a": 0, "b": 1}
        assert managers[graph_id].params["b"].numel == 1 << 20
        gm.graph.lint()
        return gm

    looked, plain = run(look), step()
    _core.run_passes(plain, ["zero3_compile"])
    assert seen == [(0, False), (0, True)]
    assert str(looked) == str(plain)


def test_a_prefetch_written_for_deepspeed():
    """Rebuilds the graph, as its passes do, with all gathers first and fused."""

    def gather_first(gm, graph_id, order, profiles, create_inputs_fn, budget, managers, bwd):
        gathers = [n for n in gm.graph.nodes if n.target == torch.ops.dc.allgather_param.default]
        rebuilt, env = Graph(), {}
        started = False
        for node in gm.graph.nodes:
            if node.op != "placeholder" and not started:
                started = True
                params = [env[n.args[0].name] for n in gathers]
                rebuilt.call_function(
                    torch.ops.dc.prefetch_params_fused.default,
                    args=(graph_id, params, [n.args[2] for n in gathers]),
                )
            env[node.name] = rebuilt.node_copy(node, lambda n: env[n.name])
        rebuilt.lint()
        gm.graph = rebuilt
        return gm

    program = run(gather_first)
    assert instrs(program)[:4] == ["gather a", "gather b", "gather a", "wait a"]
    program.verify()
    plain = step()
    _core.run_passes(plain, ["zero3_compile"])
    machine = _core.Machine.builtin("2x-cpu")
    assert _core.simulate(program, machine).time_ns < _core.simulate(plain, machine).time_ns


def test_releases_can_be_taken_out():
    def keep(gm, graph_id, order, profiles, create_inputs_fn, budget, managers, bwd):
        if not bwd:
            for node in list(gm.graph.nodes):
                if node.target == torch.ops.dc.release_param.default:
                    gm.graph.erase_node(node)
        return gm

    program = run(keep)
    assert not any(i.startswith("release") for i in instrs(program))
    assert any(i.startswith("release") for i in instrs(program, 1))


def test_every_operator_of_deepspeeds_can_be_looked_for():
    """Its own prefetch asks each node whether it is a reload_parameter."""
    others = (
        "free_tensors", "offload_tensor", "reload_tensor", "wait_offload", "wait_reload",
        "offload_parameter", "reload_parameter", "end_backward",
    )  # fmt: skip

    def look(gm, graph_id, order, profiles, create_inputs_fn, budget, managers, bwd):
        packets = [getattr(torch.ops.dc, name) for name in others]
        assert not any(n.target in (p, p.default) for p in packets for n in gm.graph.nodes)

    run(look)


def offload(gm, graph_id, *_):
    first = next(iter(gm.graph.nodes))
    with gm.graph.inserting_after(first):
        gm.graph.call_function(torch.ops.dc.offload_parameter.default, (first, graph_id, 0))


def erase_run(gm, *_):
    last = [n for n in gm.graph.nodes if n.name.startswith("run_")][-1]
    last.replace_all_uses_with(last.args[-1])
    gm.graph.erase_node(last)


def add_compute(gm, *_):
    gm.graph.inserting_before(next(iter(gm.graph.find_nodes(op="output"))))
    gm.graph.call_function(torch.ops.aten.relu.default, (next(iter(gm.graph.nodes)),))


def reduce_again(gm, graph_id, order, profiles, inputs, budget, managers, bwd):
    if not bwd:
        with gm.graph.inserting_before(gm.graph.find_nodes(op="output")[0]):
            node = next(iter(gm.graph.nodes))
            gm.graph.call_function(torch.ops.dc.reduce_grad.default, (node, graph_id, 0))


def ask_inputs(gm, graph_id, order, profiles, create_inputs_fn, *_):
    create_inputs_fn()


def ask_tensor(gm, graph_id, order, profiles, inputs, budget, managers, bwd):
    return managers[graph_id].params["a"].param


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (erase_run, "erase_run: forward 0: region f.b no longer runs once"),
        (offload, "calls dc.offload_parameter.default, which has no counterpart"),
        (add_compute, "calls aten.relu.default, which has no counterpart"),
        (reduce_again, "whose gradient is not made here"),
        (ask_inputs, "create_inputs_fn: nothing runs while a plan is made"),
        (ask_tensor, "there are no tensors while a plan is made"),
        (lambda *_: 3, "returned a int"),
        (lambda gm, g, o, p, c, m, managers, b: managers.params, r"take param_manager\[graph_id\]"),
        (lambda gm, g, o, p, c, m, managers, b: managers[0].get_grad_name, "is not there"),
    ],
)
def test_what_has_no_meaning_here_is_an_error(bad, words):
    with pytest.raises(UserError, match=words):
        run(bad)


def test_contracts():
    with pytest.raises(UserError, match="look: needs gathers_placed"):

        def look(gm, *_):
            return gm

        _core.run_passes(step(), [from_deepspeed(look)])
    _core.run_passes(step(), [from_deepspeed(look, PassContract())])
    with pytest.raises(UserError, match="is not a function"):
        from_deepspeed(3)


def theirs(
    gm, graph_id, graph_order, profiling_results, create_inputs_fn, mem_budget, param_manager, bwd
):
    return gm


class Theirs:
    def __call__(self, gm, graph_id, *_):
        return gm


class Ours:
    def __call__(self, program, context):
        pass


def resolve(given, registered=None):
    return check_schedule([(0, ["zero3_compile", given])], 3, registered or {})


@pytest.mark.parametrize("given", [theirs, reduce_again, Theirs, Theirs(), "registered"])
def test_a_pass_that_is_not_wrapped_is_named_where_it_is_given(given):
    name = getattr(given, "__name__", "registered" if given == "registered" else "Theirs")
    with pytest.raises(UserError, match=rf"\[passes\] {name}: .*deepcompile.passes.from_deepspeed"):
        resolve(given, {"registered": theirs})


@pytest.mark.parametrize("given", [lambda program: None, lambda program, context, more: None])
def test_a_pass_of_other_arguments_is_named_too(given):
    with pytest.raises(
        UserError, match=r"takes \(program.*; a pass is a function of \(program, con"
    ):
        resolve(given)


@pytest.mark.parametrize(
    "given",
    [
        Ours, Ours(), print, lambda *_: None, prefetch.schedule_prefetch, from_deepspeed(theirs),
        functools.partial(lambda scale, program, context: None, 2),
    ],
)  # fmt: skip
def test_what_can_be_called_with_program_and_context_is_taken(given):
    assert resolve(given)[0].passes[0] == "zero3_compile"
