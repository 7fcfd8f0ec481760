# SPDX-License-Identifier: Apache-2.0
"""The backend's contract: programs, errors, records, the entry function."""

import pytest
import torch
from reference_runner import (
    Compiled,
    ReferenceSink,
    Sequential,
    hf_loss,
    llama,
    mixtral,
    pair,
    tokens,
)
from torch import nn

from deepcompile import _core
from deepcompile.capture import CaptureOptions, make_backend, make_entry, surface_errors
from deepcompile.capture.attention import use_causal_attention
from deepcompile.capture.program import update_program
from deepcompile.errors import UserError
from deepcompile.params import MemberRef, ParamTable

X = torch.linspace(-1, 1, 4 * 16).reshape(4, 16)


@pytest.fixture(scope="module")
def captured():
    compiled = Compiled(pair(lambda: llama(4))[1], threshold=1000)
    hf_loss(compiled).backward()
    return compiled


def test_program_is_valid_and_holds_runs_only(captured):
    program = captured.graphs[0].program
    program.verify()
    text = str(program)
    assert str(_core.StepProgram.parse(text)) == text
    ops = {line.split()[0] for line in text.splitlines() if line.startswith("  ")}
    assert ops == {"run"}
    assert [s.kind for s in program.sections] == ["forward", "backward"]


class AskingSink(ReferenceSink):
    """Notes under what a graph is installed."""

    def __init__(self, table):
        super().__init__(table)
        self.modes = []

    def install(self, captured):
        modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        python = torch._C._dispatch_tls_is_dispatch_key_included(
            torch._C.DispatchKey.PythonDispatcher
        )
        self.modes.append((captured.inference, modes, python))
        return super().install(captured)


def test_a_graph_is_installed_when_its_tracing_is_over():
    """The sink may queue a collective, for which a dispatch in Python would hold the GIL."""
    compiled = Compiled(Sequential(), sink=AskingSink)
    compiled(X).sum().backward()
    with torch.no_grad():
        compiled(X)
    assert compiled.sink.modes == [(False, [], False), (True, [], False)]


def test_program_runs_through_the_passes(captured):
    graphs = [g.program for g in captured.graphs]
    whole = _core.merge_steps("llama", graphs, update_program(captured.table))
    _core.run_passes(whole, ["zero3_compile"])
    whole.verify()
    reduced = [x for x in str(whole).splitlines() if x.startswith("  reduce ")]
    assert len(reduced) == len(captured.table.params)


def test_every_gradient_has_one_value_and_no_parameter_is_a_value(captured):
    ir, table = captured.graphs[0].ir, captured.table
    grads = [v.grad_of for v in ir.values if v.grad_of is not None]
    assert sorted(grads, key=str) == sorted(table.refs(), key=str)
    backward = next(s for s in ir.sections if s.kind == "backward")
    made = {v for r in backward.regions for v in ir.region(r).outputs}
    assert {v.name for v in ir.values if v.grad_of is not None} <= made


def test_values_are_defined_before_use(captured):
    ir = captured.graphs[0].ir
    known = set()
    for section in ir.sections:
        known |= set(section.inputs)
        for name in section.regions:
            region = ir.region(name)
            assert {x for x in region.inputs if isinstance(x, str)} <= known
            known |= set(region.outputs)
        assert set(section.outputs) <= known
    assert known == {v.name for v in ir.values}


def step_flops(compiled, direction):
    return sum(r.flops for r in compiled.graphs[0].ir.regions if r.name.startswith(direction))


def matmul_flops(compiled, layers):
    """(weights', attention's, rotary table's) FLOPs of a forward over 2 x 32 tokens: 2 a weight
    and token; q k and p v of 4 heads of 16; frequencies x positions."""
    weights = sum(
        m.numel
        for p in compiled.table.params
        for m in p.members
        if "embed" not in m.name and len(m.shape) == 2
    )
    return 2 * weights * 64, layers * 2 * 2 * 2 * 4 * 32 * 32 * 16, 2 * 8 * 32


def test_costs(captured):
    weights, attention, rotary = matmul_flops(captured, 4)
    # The mask that transformers makes is explicit, so attention counts in full. Its rotary
    # table is a matmul in some versions, a multiplication in others.
    assert step_flops(captured, "fwd") - weights - attention in (0, rotary)
    assert step_flops(captured, "bwd") == 2 * weights + attention * 5 // 2
    for region in captured.graphs[0].ir.regions:
        assert region.moved > 0 and region.workspace >= 0


def distinct(make, layers):
    compiled = Compiled(pair(lambda: make(layers))[1], threshold=1000)
    hf_loss(compiled)
    graph = compiled.graphs[0]
    assert graph.cache["reused"] == len(graph.ir.regions) - graph.distinct_regions
    assert len(graph.codes) == graph.distinct_regions
    return graph.distinct_regions, len(graph.ir.regions)


def test_depth_does_not_change_the_number_of_distinct_regions():
    six, twelve = distinct(llama, 6), distinct(llama, 12)
    assert six[0] == twelve[0] == 9
    assert twelve[1] - six[1] == 12  # one region a layer and direction


def test_mixtral_layers_are_equal_too():
    assert distinct(mixtral, 6)[0] == 9


def test_regions_read_only_their_own_layer(captured):
    """No region but the first and last may read more than one layer's parameters."""
    ir, table = captured.graphs[0].ir, captured.table
    for region in ir.regions:
        names = [table.member(x).name for x in region.inputs if isinstance(x, MemberRef)]
        layers = {n.split(".")[2] for n in names if ".layers." in n and "norm" not in n}
        assert len(layers) <= 2, (region.name, names)


def test_times_and_places_are_recorded(captured):
    times = captured.graphs[0].times
    assert set(times) == {"dynamo", "aot", "partition", "cut", "compile"}
    assert all(t > 0 for t in times.values())
    assert captured.backend.times() == times
    assert "modeling_llama.py:" in captured.graphs[0].user_stack


def test_data_dependent_operators_are_errors_not_graph_breaks():
    class Data(nn.Linear):
        def forward(self, x):
            return super().forward(x[x.sum(1) > 0])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=False):
        compiled = Compiled(Data(16, 16), fullgraph=False)
        compiled(X)  # Dynamo's own break: recorded
        assert compiled.backend.graph_breaks

    def failing(*args):
        raise torch._subclasses.fake_tensor.DataDependentOutputException(torch.ops.aten.item)

    compiled = Compiled(Sequential(), fullgraph=False)
    compiled.sink.install = failing
    with pytest.raises(UserError, match=r"\[capture\].*depends on data.*fixed shapes"):
        compiled(X)


def test_errors_of_the_sink_come_out_as_they_are():
    def failing(captured):
        raise UserError("[plan] nothing fits: take more ranks.")

    compiled = Compiled(Sequential())
    compiled.sink.install = failing
    with pytest.raises(UserError, match=r"^\[plan\] nothing fits: take more ranks\.$"):
        compiled(X)


def test_other_errors_keep_their_type():
    with pytest.raises(ValueError, match="user"), surface_errors():
        raise ValueError("user")


def test_second_backward_is_refused_by_the_runner():
    compiled = Compiled(Sequential())
    loss = compiled(X).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(UserError, match="is over"):
        loss.backward()


def test_a_parameter_written_in_forward_is_refused():
    class Writes(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.bias.add_(1)
            return super().forward(x)

    with pytest.raises(UserError, match=r"\[capture\] bias: is written to in forward"):
        Compiled(Writes(16, 16))(X).sum().backward()


def test_settings_that_would_hide_failures_are_refused():
    table = ParamTable.build(Sequential())
    with torch._dynamo.config.patch(suppress_errors=True):
        with pytest.raises(UserError, match="suppress_errors"):
            make_backend(table, CaptureOptions(), None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "nvfuser"}, "backend 'nvfuser'"),
        ({"region_bytes": 0}, "region_bytes 0"),
        ({"region_host": "fortran"}, "region_host 'fortran'"),
        ({"inductor_options": {"max_autotoon": True}}, "max_autotoon"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(UserError, match=r"\[capture\]") as error:
        make_backend(ParamTable.build(Sequential()), CaptureOptions(**options), None)
    assert words in str(error.value)


def test_entry_detaches_all_but_the_loss():
    compiled = Compiled(pair(llama)[1], entry=True)
    out = compiled(**tokens())
    assert out.loss.requires_grad and not out.logits.requires_grad
    backward = compiled.graphs[0].ir.sections[1]
    assert len(backward.inputs) == 1  # the loss's tangent, no logits-sized one


def test_entry_leaves_other_results_alone():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), {"loss": None}

    with pytest.raises(UserError, match="differentiable_outputs 'some'"):
        make_entry(Sequential(), "some")
    out, extra = make_entry(Pair(16, 16))(X)
    assert out.requires_grad and extra == {"loss": None}
    assert make_entry(llama(), "all")(**tokens()).logits.requires_grad


def test_entry_of_a_dict():
    class Dict(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return {"loss": y.sum(), "parts": [y, (y, 3)]}

    out = make_entry(Dict(16, 16))(X)
    assert out["loss"].requires_grad
    assert not out["parts"][0].requires_grad and not out["parts"][1][0].requires_grad
    assert out["parts"][1][1] == 3


def test_causal_attention_has_no_mask_and_the_same_loss():
    reference, model = pair(llama)
    use_causal_attention(model)
    torch.testing.assert_close(hf_loss(model), hf_loss(reference))
    compiled = Compiled(model)
    torch.testing.assert_close(hf_loss(compiled).detach(), hf_loss(reference).detach())
    weights, attention, rotary = matmul_flops(compiled, 2)
    assert step_flops(compiled, "fwd") - weights - attention // 2 in (0, rotary)  # causal: half


def test_causal_attention_refuses_what_it_would_change():
    with pytest.raises(UserError, match="no Hugging Face model"):
        use_causal_attention(Sequential())
    bidirectional = llama()
    bidirectional.config.is_encoder_decoder = True
    with pytest.raises(UserError, match="not causal everywhere"):
        use_causal_attention(bidirectional)


def test_causal_attention_leaves_a_short_window_its_mask():
    reference, model = pair(lambda: mixtral(layers=1, sliding_window=16))
    use_causal_attention(model)
    compiled = Compiled(model)
    torch.testing.assert_close(hf_loss(compiled).detach(), hf_loss(reference).detach())
