# SPDX-License-Identifier: Apache-2.0
"""The kernels of libdeepcompile_cuda.so, through their C interface and through the runtime.

Results are compared with torch.optim in float64, and bit by bit with the same operations done
one after another on a CPU. Arrays lie between guards, and what is written starts as NaN.
"""

from __future__ import annotations

import itertools
import random

import numpy
import pytest
import torch

from deepcompile import _core, _runtime, cuda_kernels
from deepcompile.cuda_kernels import Segment
from deepcompile.errors import UserError

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(
        not cuda_kernels.library_path().exists(), reason="built without a CUDA toolkit"
    ),
]
DEVICE = "cuda:0"
GUARD = 64
"""Elements before and after each array that nothing may write to."""
GRADIENTS = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = [None, torch.bfloat16, torch.float16]
SETTINGS = dict(lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)


@pytest.fixture(scope="module")
def kernels():
    return cuda_kernels.Kernels()


def guarded(values: torch.Tensor, offset: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(view, whole): the values `offset` elements past an aligned address, between NaNs."""
    size = GUARD + offset + values.numel() + GUARD
    whole = torch.full((size,), float("nan"), dtype=values.dtype, device=device)
    view = whole[GUARD + offset : GUARD + offset + values.numel()]
    view.copy_(values)
    return view, whole


class Arrays:
    """One stretch of parameters, its states and gradient, on a device."""

    def __init__(self, numel, gradient, weight, offsets=(0,) * 5, seed=0, device=DEVICE):
        generator = torch.Generator().manual_seed(seed)

        def normal(scale=1.0):
            return torch.randn(numel, generator=generator) * scale

        values = [normal(), normal(0.1), normal(0.01).abs(), normal().to(gradient)]
        if weight is not None:
            values.append(torch.full((numel,), float("nan"), dtype=weight))
        pairs = [guarded(v, o, device) for v, o in zip(values, offsets, strict=False)]
        self.views, self.wholes = map(list, zip(*pairs, strict=True))
        self.given = self.views[3].clone()

    def segment(self, start=0, stop=None, **settings):
        views = [view[start:stop] for view in self.views]
        weight = views[4] if len(views) > 4 else None
        return Segment(*views[:4], weight, **{**SETTINGS, **settings})

    def results(self):
        """master, exp_avg, exp_avg_sq and weight, on the host; checks what must not change."""
        for view, whole in zip(self.views, self.wholes, strict=True):
            start = view.storage_offset()
            around = torch.cat([whole[:start], whole[start + view.numel() :]])
            assert torch.isnan(around).all(), "a kernel wrote outside of its arrays"
        same = (self.views[3] == self.given) | (self.views[3].isnan() & self.given.isnan())
        assert same.all(), "a kernel wrote to a gradient"
        return [view.cpu() for view in (*self.views[:3], *self.views[4:])]


def step_by_step(arrays, grad_scale, factor, step, decoupled):
    """The update on a CPU, one operation after another, each rounded to f32."""
    master, exp_avg, exp_avg_sq, gradient = (view.cpu() for view in arrays.views[:4])

    def f32(value):
        return torch.tensor(value, dtype=torch.float32)

    lr, (beta1, beta2), decay = SETTINGS["lr"], SETTINGS["betas"], SETTINGS["weight_decay"]
    g = gradient.float() * f32(grad_scale) * f32(factor)
    g = g + f32(0.0 if decoupled else decay) * master
    m = exp_avg + f32(1.0 - beta1) * (g - exp_avg)
    v = exp_avg_sq * f32(beta2) + f32(1.0 - beta2) * g * g
    root = torch.from_numpy(numpy.sqrt(v.numpy()))  # torch's may be an ulp off on a CPU
    scale = root / f32((1.0 - beta2**step) ** 0.5) + f32(SETTINGS["eps"])
    kept = master * f32(1.0 - lr * decay if decoupled else 1.0)
    master = kept + f32(-(lr / (1.0 - beta1**step))) * (m / scale)
    weights = [master.to(view.dtype) for view in arrays.views[4:]]
    return [master, m, v, *weights]


def assert_same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b), f"{(a != b).sum()} of {a.numel()} {a.dtype} differ"


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize(("gradient", "weight"), list(itertools.product(GRADIENTS, WEIGHTS)))
def test_adamw_equals_torch_in_f64(kernels, gradient, weight, decoupled):
    numel, scale, factor = 100_003, 0.25, 0.7
    arrays = Arrays(numel, gradient, weight)
    for view in arrays.views[1:3]:
        view.zero_()
    parameter = torch.nn.Parameter(arrays.views[0].double())
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind([parameter], **SETTINGS)
    clip = torch.tensor(factor, device=DEVICE)
    for step in (1, 2, 3, 4):
        values = torch.randn(numel, generator=torch.Generator().manual_seed(step)).to(gradient)
        arrays.views[3].copy_(values)
        arrays.given.copy_(values)
        parameter.grad = arrays.views[3].double() * scale * clip.double()
        optimizer.step()
        segment = arrays.segment(grad_scale=scale, step=step, decoupled=decoupled)
        kernels.adamw([segment], clip)
    master, exp_avg, exp_avg_sq, *weights = arrays.results()
    state = optimizer.state[parameter]
    torch.testing.assert_close(master.double(), parameter.detach().cpu(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(exp_avg.double(), state["exp_avg"].cpu(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        exp_avg_sq.double(), state["exp_avg_sq"].cpu(), rtol=1e-5, atol=1e-10
    )
    for rounded in weights:
        assert torch.equal(rounded, master.to(weight))


@pytest.mark.parametrize("factor", [None, 0.3])
@pytest.mark.parametrize(("gradient", "weight"), list(itertools.product(GRADIENTS, WEIGHTS)))
def test_adamw_has_the_bits_of_a_cpu(kernels, gradient, weight, factor):
    """For any size and alignment."""
    draw = random.Random(f"{gradient} {weight}")
    sizes = [1, 2, 3, 4, 5, 31, 8191, 8192, 8193, 16387, 100_001]
    for seed, numel in enumerate(sizes + [draw.randrange(1, 50_000) for _ in range(5)]):
        start = draw.randrange(8)
        for offsets in ([0] * 5, [start] * 5, [draw.randrange(8) for _ in range(5)]):
            arrays = Arrays(numel, gradient, weight, offsets, seed)
            step, decoupled, scale = draw.randrange(1, 50), bool(draw.randrange(2)), 1 / 3
            expected = step_by_step(arrays, scale, factor or 1.0, step, decoupled)
            segment = arrays.segment(grad_scale=scale, step=step, decoupled=decoupled)
            kernels.adamw([segment], factor and torch.tensor(factor, device=DEVICE))
            assert_same_bits(arrays.results(), expected)


def test_any_cut_gives_the_same_bits(kernels):
    numel, draw = 300_007, random.Random(1)
    expected = None
    for pieces in (1, 2, 7, 200):
        arrays = Arrays(numel, torch.bfloat16, torch.bfloat16)
        cuts = sorted(draw.randrange(numel) for _ in range(pieces - 1))
        segments = [arrays.segment(a, b) for a, b in zip([0, *cuts], [*cuts, numel], strict=True)]
        kernels.adamw(segments)
        results = arrays.results()
        expected = expected or results
        assert_same_bits(results, expected)


def test_segments_keep_their_own_settings(kernels):
    draw = random.Random(2)
    together, alone = [
        [Arrays(1000 + 37 * i, torch.bfloat16, torch.float16, seed=i) for i in range(150)]
        for _ in range(2)
    ]
    settings = [
        dict(
            lr=draw.random(),
            betas=(draw.random(), draw.random()),
            eps=1e-6,
            weight_decay=draw.random(),
            step=1 + i,
            decoupled=bool(i % 2),
            grad_scale=draw.random(),
        )
        for i in range(150)
    ]
    kernels.adamw([a.segment(**s) for a, s in zip(together, settings, strict=True)])
    for a, s in zip(alone, settings, strict=True):
        kernels.adamw([a.segment(**s)])
    for a, b in zip(together, alone, strict=True):
        assert_same_bits(a.results(), b.results())


def test_values_that_are_not_finite_stay_where_they_are(kernels):
    arrays, plain = (Arrays(1001, torch.float32, torch.bfloat16) for _ in range(2))
    special = [float("inf"), float("-inf"), float("nan"), 3e38, 1e-42, 0.0]
    places = torch.arange(len(special)) * 100 + 3
    arrays.views[3][places] = torch.tensor(special, device=DEVICE)
    arrays.given.copy_(arrays.views[3])
    expected = step_by_step(arrays, 1.0, 1.0, 1, True)
    kernels.adamw([arrays.segment()])
    kernels.adamw([plain.segment()])
    others = torch.ones(1001, dtype=torch.bool)
    others[places] = False
    for found, unharmed, want in zip(arrays.results(), plain.results(), expected, strict=True):
        assert torch.equal(found[others], unharmed[others])
        assert torch.equal(found[places].isnan(), want[places].isnan())
        torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.alone
def test_more_elements_than_32_bits_count(kernels):
    numel = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 20 * numel:
        pytest.skip("needs 43 GB of GPU memory")
    states = [torch.zeros(numel, device=DEVICE) for _ in range(3)]
    gradient = torch.full((numel,), 0.5, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.full((numel,), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    kernels.adamw([Segment(*states, gradient, weight, lr=0.125, weight_decay=0.0)])
    for tensor, value in zip([*states[1:], weight], [0.05, 0.00025, -0.125], strict=True):
        assert tensor.min() == tensor.max()
        assert tensor[-1].item() == pytest.approx(value, rel=1e-2)
    out = torch.empty((), dtype=torch.float64, device=DEVICE)
    assert kernels.squared_sum([gradient], [2.0], out).item() == numel


@pytest.mark.parametrize("dtype", [*GRADIENTS, torch.float64])
def test_squared_sum_equals_f64(kernels, dtype):
    for numel in (0, 1, 5, 32_767, 32_768, 32_769, 1_000_003):
        values = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
        expected = (values.double() / 3).square().sum().item()
        found = set()
        for offset in (0, 1, 5):
            view, _ = guarded(values, offset, DEVICE)
            for out_type in (torch.float64, torch.float32):
                out = torch.full((), float("nan"), dtype=out_type, device=DEVICE)
                partials = torch.full((64,), float("nan"), dtype=torch.float64, device=DEVICE)
                sum_ = kernels.squared_sum([view], [1 / 3], out, partials).item()
                rel = 1e-12 if out_type == torch.float64 else 1e-7
                assert sum_ == pytest.approx(expected, rel=rel)
                found.add((out_type, sum_))
        assert len(found) == 2, "the bits depend on the alignment"


def test_squared_sum_of_many_gradients(kernels):
    draw = random.Random(3)
    types = [*GRADIENTS, torch.float64]
    gradients = [
        torch.randn(draw.randrange(0, 60_000), device=DEVICE).to(draw.choice(types))
        for _ in range(300)
    ]
    scales = [draw.random() for _ in gradients]
    expected = sum(
        (g.double() * s).square().sum().item() for g, s in zip(gradients, scales, strict=True)
    )
    sums = set()
    for _ in range(5):
        out = torch.full((), float("nan"), dtype=torch.float64, device=DEVICE)
        sums.add(kernels.squared_sum(gradients, scales, out).item())
    assert len(sums) == 1 and sums.pop() == pytest.approx(expected, rel=1e-12)
    assert kernels.squared_sum([], [], out).item() == 0.0
    with pytest.raises(UserError, match="too few partial sums"):
        kernels.squared_sum(gradients, scales, out, out.view(1))


@pytest.mark.parametrize("count", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("dtype", [*GRADIENTS, torch.float64])
def test_piece_sums_add_in_order_and_round_once(kernels, dtype, count):
    all_pieces, outs, wholes, totals = [], [], [], []
    sizes = [(1, 0), (100_003, 0), (1 << 20, 0), (70_001, 1), *((64 * n, 0) for n in range(26))]
    for numel, offset in sizes:
        generator = torch.Generator().manual_seed(numel)
        values = [torch.randn(numel, generator=generator).to(dtype) for _ in range(count)]
        total = values[0].to(torch.promote_types(dtype, torch.float32))
        for value in values[1:]:
            total = total + value
        totals.append(total.to(dtype))
        all_pieces.append([guarded(value, offset, DEVICE)[0] for value in values])
        out, whole = guarded(torch.zeros(numel, dtype=dtype), offset, DEVICE)
        outs.append(out)
        wholes.append(whole)
    kernels.piece_sums(all_pieces, outs)
    for out, whole, total in zip(outs, wholes, totals, strict=True):
        assert torch.equal(out.cpu(), total)
        outside = whole.numel() - out.numel()
        assert whole.isnan().sum() == outside, "a kernel wrote outside of its arrays"


@pytest.mark.parametrize("count", [1, 2, 4, 5])
@pytest.mark.parametrize("dtype", [*GRADIENTS, torch.float64])
def test_piece_totals_add_rounded_sums(kernels, dtype, count):
    kind = torch.promote_types(dtype, torch.float32)
    all_pieces, totals, wholes, expected = [], [], [], []
    for numel, offset in [(1, 0), (100_003, 0), (1 << 20, 0), (70_001, 1)]:
        generator = torch.Generator().manual_seed(numel)
        pieces = [torch.randn(numel, generator=generator).to(dtype) for _ in range(count)]
        all_pieces.append([guarded(piece, offset, DEVICE)[0] for piece in pieces])
        total, whole = guarded(torch.full((numel,), float("nan"), dtype=kind), offset, DEVICE)
        totals.append(total)
        wholes.append(whole)
        out = torch.empty(numel, dtype=dtype, device=DEVICE)
        kernels.piece_sums(all_pieces[-1:], [out])
        scaled = out.cpu().to(kind) * (1 / 3)
        expected.append(scaled + scaled)
    for first in (True, False):
        kernels.piece_totals(all_pieces, totals, [first] * len(totals), 1 / 3)
    for total, whole, wanted in zip(totals, wholes, expected, strict=True):
        assert torch.equal(total.cpu(), wanted)
        outside = whole.numel() - total.numel()
        assert whole.isnan().sum() == outside, "a kernel wrote outside of its arrays"


def test_the_current_stream_and_cuda_graphs(kernels):
    expected, arrays = (Arrays(50_001, torch.bfloat16, torch.bfloat16) for _ in range(2))
    factors = [0.5, 2.0, 0.25]
    for factor in factors:
        kernels.adamw([expected.segment()], torch.tensor(factor, device=DEVICE))
    factor = torch.ones((), device=DEVICE)
    out = torch.zeros((), dtype=torch.float64, device=DEVICE)
    partials = torch.zeros(8, dtype=torch.float64, device=DEVICE)
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        kernels.adamw([arrays.segment()], factor)
        kernels.squared_sum([arrays.views[0]], [1.0], out, partials)
    with torch.cuda.stream(side):
        for value in factors:
            torch.cuda._sleep(10_000_000)
            factor.fill_(value)
            graph.replay()
    side.synchronize()
    assert_same_bits(arrays.results(), expected.results())
    sum_ = arrays.views[0].double().square().sum().item()
    assert out.item() == pytest.approx(sum_, rel=1e-12)


def test_refusals(kernels):
    arrays = Arrays(100, torch.bfloat16, torch.bfloat16)
    with pytest.raises(UserError, match="a step number below 1"):
        kernels.adamw([arrays.segment(step=0)])
    segment = arrays.segment()
    segment.gradient = segment.gradient.double()
    with pytest.raises(UserError, match="an element type that this kernel does not take"):
        kernels.adamw([segment])


# ---- the runtime's use of them

PROGRAM = """
step kernels world=1 reduce={reduce} clip

param p {dtype} {numel}
param small {dtype} 1024 whole (a, b, c, d)

update
  norm
  update p
  update small
  gather small
  wait small
end
"""
NUMEL, NAMES = 70_003, "abcd"


def updated(device, dtype, reduce, clip):
    """Two steps of the runtime with fixed gradients: its pieces, norms and launches."""
    words = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float64: "f64"}
    text = PROGRAM.format(dtype=words[dtype], reduce=reduce, numel=NUMEL)
    runtime = _runtime.Runtime(None, 0, 1, torch.device(device), reduce, clip)

    def values(name, numel, step=-1):
        generator = torch.Generator().manual_seed(100 * ord(name[0]) + step + 1)
        return torch.randn(numel, generator=generator).to(dtype).to(device)

    numels = {"p": NUMEL, **{name: 250 - i for i, name in enumerate(NAMES)}}
    keep = {name: torch.nn.Parameter(values(name, n)) for name, n in numels.items()}
    runtime.add_param("p", [("p", keep["p"], 0)], NUMEL, "sharded", True)
    members = [(name, keep[name], 256 * i) for i, name in enumerate(NAMES)]
    runtime.add_param("small", members, 1024, "whole", True)
    for name in numels:  # a and b differ in the rate, c and d are as p
        runtime.set_hyper(name, 1e-2 if name in "ab" else 1e-3, 0.9, 0.95, 1e-8, 0.1, name != "a")
    plan = runtime.load_plan(_core.freeze(_core.StepProgram.parse(text)).serialize(), [])
    norms = []
    for step in range(2):
        runtime.reduce("p", {"p": values("p", NUMEL, step)})
        # c has no gradient in the first step: b and d are two runs, a one of its own
        grads = {n: values(n, numels[n], step) for n in NAMES if step or n != "c"}
        runtime.reduce("small", grads)
        for name in ("p", "small"):
            runtime.accumulate(name)
        norms.append(float(runtime.step(plan)["grad_norm"]))
    found = {
        piece["member"]: [piece[k].cpu() for k in ("weight", "master", "exp_avg", "exp_avg_sq")]
        for piece in runtime.pieces()
    }
    return found, norms, runtime.kernels()


@pytest.mark.parametrize(
    ("dtype", "reduce"),
    [(torch.bfloat16, "bf16"), (torch.bfloat16, "f32"), (torch.float32, "f32")],
)
def test_the_runtime_uses_them_and_has_the_bits_of_a_cpu(dtype, reduce):
    on_gpu, gpu_norms, who = updated(DEVICE, dtype, reduce, clip=1e9)
    on_cpu, cpu_norms, _ = updated("cpu", dtype, reduce, clip=1e9)
    assert who["adamw"] == who["norm"] == "deepcompile_cuda"
    assert who["library"] == str(cuda_kernels.library_path())
    assert gpu_norms == pytest.approx(cpu_norms, rel=1e-6)
    for member, tensors in on_cpu.items():
        assert_same_bits(on_gpu[member], tensors)


def launches_of_adamw(profile):
    found = profile.key_averages()
    return sum(e.count for e in found if "deepcompile" in e.key and "adamw" in e.key)


def test_f64_parameters_stay_with_torch():
    """Their norm is the library's; their update has f64's precision."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        on_gpu, gpu_norms, _ = updated(DEVICE, torch.float64, "f64", clip=1e9)
    assert launches_of_adamw(profile) == 0
    on_cpu, cpu_norms, _ = updated("cpu", torch.float64, "f64", clip=1e9)
    assert gpu_norms == pytest.approx(cpu_norms, rel=1e-6)
    for member, tensors in on_cpu.items():
        for found, expected in zip(on_gpu[member], tensors, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_clipping_is_near_the_cpus():
    on_gpu, gpu_norms, _ = updated(DEVICE, torch.bfloat16, "bf16", clip=0.5)
    on_cpu, cpu_norms, _ = updated("cpu", torch.bfloat16, "bf16", clip=0.5)
    assert gpu_norms == pytest.approx(cpu_norms, rel=1e-6)
    for member, (_, *tensors) in on_cpu.items():
        for found, expected in zip(on_gpu[member][1:], tensors, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_one_launch_updates_what_stands_together():
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        updated(DEVICE, torch.bfloat16, "bf16", clip=1.0)
    # The first step makes p's moments, then small's; the second has one launch for both.
    assert launches_of_adamw(profile) == 3
