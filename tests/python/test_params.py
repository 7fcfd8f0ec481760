# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from deepcompile.errors import UserError
from deepcompile.params import MEMBER_ALIGNMENT, MemberRef, ParamTable, ir_name


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight


def build(model, **kwargs):
    return ParamTable.build(model, **{"persistence_threshold": 100, **kwargs})


def test_large_parameters_alone_small_ones_packed():
    net = Net()
    table = build(net)
    assert [p.name for p in table.params] == ["embed.weight", "pack.f32"]
    pack = table.params[1]
    assert pack.packed and pack.placement == "whole" and pack.trainable
    assert [(m.name, m.offset, m.numel) for m in pack.members] == [
        ("norm.weight", 0, 7),
        ("norm.bias", MEMBER_ALIGNMENT, 7),
    ]
    assert pack.numel == MEMBER_ALIGNMENT + 7  # last member's offset and size, no tail


def test_tied_parameters_are_one_member():
    net = Net()
    table = build(net)
    assert table.lookup(net.head.weight) == table.lookup(net.embed.weight) == MemberRef(0)
    assert table.find("head.weight") is None
    assert table.find("norm.bias") == MemberRef(1, 1)
    assert table.lookup(net.embed.weight.detach()) is None
    assert table.tensor(MemberRef(1, 1)) is net.norm.bias


def test_operands_and_seams():
    table = build(Net())
    refs = list(table.refs())
    assert [table.operand(r) for r in refs] == ["embed.weight", "pack.f32", "pack.f32[1]"]
    assert [table.is_seam(r) for r in refs] == [True, False, False]


def test_one_pack_per_dtype_and_trainability():
    net = nn.ModuleDict({n: nn.LayerNorm(4) for n in ("a", "b", "c")})
    net["b"].to(torch.bfloat16)
    net["c"].requires_grad_(False)
    packs = {p.name: (len(p.members), p.trainable) for p in build(net).params}
    assert packs == {
        "pack.f32": (2, True),
        "pack.bf16": (2, True),
        "pack.f32.frozen": (2, False),
    }


@pytest.mark.parametrize(
    ("stage", "placements"),
    [(3, ["sharded", "whole"]), (0, ["replicated"]), (1, ["whole"]), (2, ["whole"])],
)
def test_stage_changes_placement_never_the_grouping(stage, placements):
    table = build(Net(), stage=stage)
    assert sorted({p.placement for p in table.params}) == sorted(placements)
    assert [p.members for p in table.params] == [p.members for p in build(Net()).params]


def test_threshold_is_the_size_of_the_smallest_large_parameter():
    net = nn.Linear(10, 10, bias=False)
    assert not build(net, persistence_threshold=100).params[0].packed
    assert build(net, persistence_threshold=101).params[0].packed


def test_names_fit_the_step_program():
    assert ir_name("0.weight") == "_0.weight"
    assert ir_name("a b.weight") == "a_b.weight"
    net = nn.Module()
    net.register_parameter("x y", nn.Parameter(torch.ones(200)))
    net.register_parameter("x_y", nn.Parameter(torch.ones(200)))
    assert [p.name for p in build(net).params] == ["x_y", "x_y.2"]


def test_a_parameter_called_like_a_pack():
    inner = nn.Module()
    inner.f32 = nn.Parameter(torch.ones(200))
    net = nn.Module()
    net.pack, net.norm = inner, nn.LayerNorm(4)
    assert [p.name for p in build(net).params] == ["pack.f32", "pack.f32_"]


def refused(model, *words):
    with pytest.raises(UserError) as error:
        build(model)
    for word in ("[params]", *words):
        assert word in str(error.value)


def one(tensor, requires_grad=False):
    net = nn.Linear(2, 2)
    net.register_parameter("odd", nn.Parameter(tensor, requires_grad=requires_grad))
    return net


def test_refuses_what_cannot_be_trained_or_sharded():
    refused(nn.Linear(2, 2).requires_grad_(False), "Linear", "no parameter requires a gradient")
    refused(nn.ReLU(), "ReLU", "no parameter requires a gradient")
    refused(one(torch.ones(2, 2).to_sparse()), "odd", "layout torch.sparse_coo")
    refused(one(torch.ones(2, dtype=torch.complex64)), "odd", "dtype torch.complex64")
    refused(one(torch.ones(2, dtype=torch.int8)), "odd", "dtype torch.int8")
    refused(one(torch.ones(0)), "odd", "no elements")
    refused(one(torch.ones(2, 3).t()), "odd", "not contiguous")
    refused(one(torch.ones(2, device="meta")), "odd", "is on meta, while weight is on cpu")
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    refused(one(quantised), "odd", "quantised")
    refused(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)), "1.weight", "no shape yet")
    refused(nn.Sequential(nn.Embedding(4, 4, sparse=True)), "0: makes sparse", "sparse=False")


def test_refuses_memory_shared_without_tying():
    net = nn.Linear(4, 4)
    net.register_parameter("view", nn.Parameter(net.weight.data.view(16)))
    refused(net, "view", "shares memory with weight")


def test_refuses_tensor_subclasses():
    from torch.testing._internal.two_tensor import TwoTensor

    net = nn.Linear(4, 4)
    net.weight = nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)))
    refused(net, "weight", "tensor subclass")


def test_refuses_an_unknown_stage():
    with pytest.raises(UserError, match=r"\[params\] stage 4: does not exist"):
        build(Net(), stage=4)
