# SPDX-License-Identifier: Apache-2.0
import operator
import time

import numpy as np
import pytest
import torch
from torch import fx

from deepcompile.capture.canonical import MetaKeys, region_key, region_module
from deepcompile.capture.repeats import Repeat, find_repeat
from deepcompile.capture.split import cut

aten = torch.ops.aten


def repeat(text):
    return find_repeat(np.array([ord(c) for c in text]), 0, len(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("abcd", None),
        ("aa", Repeat(0, 1, 2, 0)),
        ("xabababy", Repeat(1, 2, 3, 0)),
        ("abcabcab", Repeat(0, 3, 2, 2)),
        ("zabbabbabbz", Repeat(1, 3, 3, 0)),  # the longer period covers more than "bb"
        ("aaaabcbcbcbc", Repeat(4, 2, 4, 0)),
    ],
)
def test_repeat(text, expected):
    assert repeat(text) == expected


def test_repeat_in_a_part():
    sequence = np.array([1, 1, 1, 1, 7, 8, 7, 8])
    assert find_repeat(sequence, 4, 8) == Repeat(4, 2, 2, 0)


def chain(layers, *, width=8, ops=2, tail=True):
    """relu(x @ w) for ``layers`` weights, with ``ops`` matmuls a layer; one shared table that
    every layer adds."""
    graph = fx.Graph()
    fake = torch._subclasses.FakeTensorMode()

    def emit(target, *args):
        node = graph.call_function(target, args)
        with fake:
            values = fx.node.map_arg(args, lambda n: n.meta["val"])
            node.meta["val"] = target(*values)
        return node

    def placeholder(name, *shape):
        node = graph.placeholder(name)
        with fake:
            node.meta["val"] = torch.empty(shape)
        return node

    x, positions = placeholder("x", 4, width), placeholder("positions", 4, width)
    weights = [placeholder(f"w{i}", width, width) for i in range(layers * ops)]
    table = emit(aten.cos.default, positions)
    for i in range(0, len(weights), ops):
        for j in range(ops):
            x = emit(aten.mm.default, x, emit(aten.permute.default, weights[i + j], [1, 0]))
        x = emit(aten.relu.default, emit(aten.add.Tensor, x, table))
    out = emit(aten.sum.default, x) if tail else x
    graph.output((out,))
    return fx.GraphModule(torch.nn.Module(), graph), weights


def regions_of(gm, weights, region_bytes=1 << 40):
    return cut(gm, set(weights), set(weights), set(), region_bytes)


def names(region):
    return [n.name for n in region.nodes]


def test_layers_become_equal_regions():
    gm, weights = chain(6)
    regions = regions_of(gm, weights)
    keys = [region_key(gm, r.nodes, r.inputs, r.outputs, set(weights), MetaKeys()) for r in regions]
    # The shared table comes first; one region a layer; the sum makes the last one different.
    assert names(regions[0]) == ["cos_default"]
    assert len(regions) == 7
    assert len(set(keys)) == 3


def test_the_number_of_different_regions_does_not_grow():
    found = set()
    for layers in (4, 8, 16):
        gm, weights = chain(layers)
        regions = regions_of(gm, weights)
        params = set(weights)
        found.add(
            tuple(
                dict.fromkeys(
                    region_key(gm, r.nodes, r.inputs, r.outputs, params, MetaKeys())
                    for r in regions
                )
            )
        )
    assert len(found) == 1


def test_region_bytes_cuts_inside_a_layer():
    gm, weights = chain(4)
    one = 8 * 8 * 4  # bytes of a weight
    assert len(regions_of(gm, weights, 2 * one)) == 5  # table, 4 layers
    assert len(regions_of(gm, weights, 2 * one - 1)) == 9  # table, 8 halves


def test_regions_compute_what_the_graph_does():
    gm, weights = chain(3)
    values = {}
    inputs = gm.graph.find_nodes(op="placeholder")
    torch.manual_seed(0)
    for node in inputs:
        values[node] = torch.randn(tuple(node.meta["val"].shape))
    expected = gm(*[values[n] for n in inputs])[0]
    for region in regions_of(gm, weights, 300):
        module = region_module(gm, region.nodes, region.inputs, region.outputs)
        results = module(*[values[n] for n in region.inputs])
        values.update(zip(region.outputs, results, strict=True))
    assert torch.equal(values[gm.graph.find_nodes(op="output")[0].args[0][0]], expected)


def test_views_of_parameters_never_cross_a_seam():
    gm, weights = chain(4)
    for region in regions_of(gm, weights, 300):
        assert not any(n.target is aten.permute.default for n in region.inputs + region.outputs)


def test_a_gradient_ends_a_segment():
    gm, weights = chain(2, ops=1, tail=False)
    relu = [n for n in gm.graph.nodes if n.target is aten.relu.default]
    regions = cut(gm, set(weights), set(weights), {relu[0]}, 1)
    assert relu[0] in regions[0].nodes and relu[0] is regions[0].nodes[-1]


def test_multi_output_operators_stay_with_their_getitems():
    graph = fx.Graph()
    fake = torch._subclasses.FakeTensorMode()
    x, w, v = (graph.placeholder(n) for n in "xwv")
    with fake:
        for node in (x, w, v):
            node.meta["val"] = torch.empty(4, 4)
        top = graph.call_function(aten.sort.default, (x,))
        top.meta["val"] = aten.sort.default(x.meta["val"])
        first = graph.call_function(aten.mm.default, (x, w))
        first.meta["val"] = torch.empty(4, 4)
        item = graph.call_function(operator.getitem, (top, 0))
        item.meta["val"] = top.meta["val"][0]
        last = graph.call_function(aten.mm.default, (item, v))
        last.meta["val"] = torch.empty(4, 4)
    graph.output((first, last))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    regions = cut(gm, {w, v}, {w, v}, set(), 1)
    for region in regions:
        assert (top in region.nodes) == (item in region.nodes)
        assert top not in region.inputs


def test_eighty_layers_are_cut_in_seconds():
    gm, weights = chain(80, ops=9)
    start = time.process_time()
    regions = regions_of(gm, weights)
    keys = MetaKeys()
    for r in regions:
        region_key(gm, r.nodes, r.inputs, r.outputs, set(weights), keys)
    assert len(regions) == 81
    assert time.process_time() - start < 3
