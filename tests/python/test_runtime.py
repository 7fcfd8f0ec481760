# SPDX-License-Identifier: Apache-2.0
"""The runtime on one rank: optimizer, slots, calls, errors."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch
import toy_step
from toy_step import GRAPH, UPDATE, Reference, Toy, batch, plan_text, reseal

from deepcompile import _runtime
from deepcompile.errors import UserError


def train_reference(optimizer_type, steps, clip=0.0, micro=1, **settings):
    """Parameters and norms of plain PyTorch."""
    model = Reference()
    optimizer = optimizer_type(model.parameters(), lr=1e-2, betas=(0.9, 0.95), **settings)
    norms = []
    for step in range(steps):
        for i in range(micro):
            (model(*batch(step * micro + i)) / micro).backward()
        if clip:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in model.named_parameters()}, norms


def assert_close(values, expected, rtol=1e-6, atol=2e-7):
    for name, tensor in expected.items():
        torch.testing.assert_close(values[name], tensor, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(
    "optimizer_type, adamw", [(torch.optim.AdamW, True), (torch.optim.Adam, False)]
)
def test_optimizer_equals_torch(optimizer_type, adamw, stage):
    expected, _ = train_reference(optimizer_type, 10, weight_decay=0.1)
    toy = Toy(stage=stage, hyper={"adamw": adamw})
    for step in range(10):
        toy.micro_step(*batch(step))
        assert toy.step() == {"grad_norm": None, "skipped": False}
    assert_close(toy.full_values(), expected)
    assert toy.runtime.optimizer_steps() == 10


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_no_number_spoils_all_weights_as_in_torch(bad):
    toy = Toy(clip=1.0)
    for name in ("w1", "w2"):
        gradient = torch.ones_like(getattr(toy.model, name))
        if name == "w1":
            gradient.view(-1)[0] = bad
        toy.runtime.reduce(name, {name: gradient})
        toy.runtime.accumulate(name)
    toy.step()
    spoilt = {name: bool(toy.full_values()[name].isnan().all()) for name in ("w1", "w2")}
    one = torch.nn.Parameter(torch.ones(3))  # what torch does
    one.grad = torch.tensor([bad, 1.0, 1.0])
    torch.nn.utils.clip_grad_norm_(one, 1.0)
    assert spoilt["w2"] == one.grad[1:].isnan().all().item() == (bad != bad)
    assert spoilt["w1"] == one.grad.isnan().all().item()


def test_clipping_equals_torch():
    expected, norms = train_reference(torch.optim.AdamW, 6, clip=0.5, weight_decay=0.1)
    toy = Toy(clip=0.5)
    for step, norm in enumerate(norms):
        toy.micro_step(*batch(step))
        assert toy.step()["grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert_close(toy.full_values(), expected)


def test_accumulation_equals_torch():
    expected, _ = train_reference(torch.optim.AdamW, 3, micro=4, weight_decay=0.1)
    toy = Toy(accumulation=4)
    for step in range(3):
        for i in range(4):
            toy.micro_step(*batch(step * 4 + i), factor=0.25)
        toy.step()
    assert_close(toy.full_values(), expected)


def test_bf16_weights_follow_f32_masters():
    toy = Toy(dtype=torch.bfloat16, reduce="bf16")
    masters = {
        n: torch.nn.Parameter(p.detach().float())
        for n, p in Reference(dtype=torch.bfloat16).named_parameters()
    }
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    compute = Reference(dtype=torch.bfloat16)
    for step in range(5):
        inputs = batch(step, dtype=torch.bfloat16)
        toy.micro_step(*inputs)
        toy.step()
        compute.zero_grad()
        compute(*inputs).backward()
        for name, parameter in compute.named_parameters():
            masters[name].grad = parameter.grad.float()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in compute.named_parameters():
                parameter.copy_(masters[name])
    values = toy.full_values()
    for piece in toy.runtime.pieces():
        flat = masters[piece["member"]].detach().flatten()[piece["start"] : piece["stop"]]
        torch.testing.assert_close(piece["master"], flat, rtol=1e-6, atol=2e-7)
        weight = values[piece["member"]].flatten()[piece["start"] : piece["stop"]]
        assert torch.equal(weight, piece["master"].bfloat16())


def test_f64_weights_are_their_own_masters():
    toy = Toy(dtype=torch.float64, reduce="f64")
    toy.micro_step(*batch(0, dtype=torch.float64))
    toy.step()
    model = Reference(dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    model(*batch(0, dtype=torch.float64)).backward()
    optimizer.step()
    expected = {n: p.detach() for n, p in model.named_parameters()}
    assert_close(toy.full_values(), expected, rtol=1e-13, atol=1e-14)


def test_parameters_keep_identity_shape_and_values():
    toy = Toy()
    parameter, shape = toy.model.w1, toy.model.w1.shape
    assert parameter.untyped_storage().nbytes() == 0 and parameter.shape == shape
    toy.runtime.gather(["w1"])
    toy.runtime.wait(["w1"])
    assert torch.equal(parameter.detach(), Reference().w1.detach())
    assert toy.model.w1 is parameter and parameter.requires_grad and toy.runtime.is_whole("w1")
    toy.runtime.release(["w1"])
    assert parameter.untyped_storage().nbytes() == 0 and not toy.runtime.is_whole("w1")
    assert toy.model.bias.untyped_storage().nbytes() == toy.model.bias.nbytes


def test_a_transposed_parameter_keeps_its_values():
    values = torch.randn(7, 5)
    parameter = torch.nn.Parameter(values.T)
    runtime = _runtime.Runtime(None, 0, 1, torch.device("cpu"))
    runtime.add_param("p", [("p", parameter, 0)], 35, "sharded", True)
    runtime.gather(["p"])
    runtime.wait(["p"])
    assert torch.equal(parameter.detach(), values.T)


def test_what_autograd_saved_of_a_released_parameter_comes_back():
    toy = Toy()
    runtime, weight = toy.runtime, toy.model.w1
    x = torch.randn(4, toy_step.WIDTH, requires_grad=True)
    runtime.gather(["w1"])
    runtime.wait(["w1"])
    y = torch.nn.functional.linear(x, weight)
    runtime.release(["w1"])
    runtime.gather(["w1"])
    runtime.wait(["w1"])
    y.sum().backward()
    torch.testing.assert_close(x.grad, Reference().w1.detach().sum(0).expand(4, -1))


def test_changes_inside_a_gather_are_stored():
    toy = Toy()
    toy.runtime.gather(["w1"])
    toy.runtime.wait(["w1"])
    with torch.no_grad():
        toy.model.w1.fill_(2.0)
    toy.runtime.store(["w1"])
    toy.runtime.release(["w1"])
    assert torch.all(toy.full_values()["w1"] == 2.0)


def test_other_storage_is_refused():
    toy = Toy()
    toy.model.w1.data = torch.zeros_like(toy.model.w1)
    toy.runtime.gather(["w1"])
    with pytest.raises(UserError, match="w1 was given other storage"):
        toy.runtime.wait(["w1"])


def test_dropping_the_token_drops_saved_values():
    saved = []

    def code_first(args):
        outputs = toy_step.code_first(args)
        saved.append(weakref.ref(outputs[0]))
        return outputs

    toy = Toy(codes=[code_first, *toy_step.CODES[1:]])
    call, token = toy.runtime.new_call(toy.graph)
    assert token.dtype == torch.int64 and token.tolist() == [call]
    toy.runtime.run(toy.graph, 0, call, list(batch(0)))
    assert toy.runtime.buffer_report()["saved"] > 0
    del token
    gc.collect()
    assert toy.runtime.buffer_report()["saved"] == 0
    assert saved[0]() is None
    with pytest.raises(UserError, match="its saved values are gone"):
        toy.runtime.run(toy.graph, 1, call, [torch.ones(())])


def test_a_token_may_outlive_its_runtime():
    toy = Toy()
    _, token = toy.runtime.new_call(toy.graph)
    del toy
    gc.collect()
    del token


def test_interleaved_calls_stay_apart():
    toy, expected = Toy(accumulation=2), Reference()
    first, _token1 = toy.runtime.new_call(toy.graph)
    second, _token2 = toy.runtime.new_call(toy.graph)
    toy.runtime.run(toy.graph, 0, first, list(batch(0)))
    toy.runtime.run(toy.graph, 0, second, list(batch(1)))
    toy.runtime.run(toy.graph, 1, first, [torch.ones(())])
    toy.runtime.run(toy.graph, 1, second, [torch.ones(())])
    (expected(*batch(0)) + expected(*batch(1))).backward()
    numel = expected.w1.numel()
    gradient = toy.runtime.gradient("w1")[:numel].view_as(expected.w1)
    torch.testing.assert_close(gradient, expected.w1.grad)
    assert toy.runtime.buffer_report()["saved"] == 0


def test_a_second_backward_is_an_error():
    toy = Toy()
    call, _token = toy.runtime.new_call(toy.graph)
    with pytest.raises(UserError, match="without a forward"):
        toy.runtime.run(toy.graph, 1, call, [torch.ones(())])
    toy.micro_step(*batch(0))
    with pytest.raises(UserError, match="retain_graph=True is not supported"):
        toy.runtime.run(toy.graph, 1, call, [torch.ones(())])


def test_inputs_die_as_planned():
    """A boxed region holds the last reference to an input that dies with it."""
    alive = []

    def code_second(args):
        h = weakref.ref(args[0])
        outputs = toy_step.code_second(args)
        alive.append(h() is not None)
        return outputs

    codes = [*toy_step.CODES]
    codes[1] = code_second
    toy = Toy(codes=codes)
    toy.micro_step(*batch(0))
    assert alive == [True]  # the backward reads h
    assert toy.runtime.buffer_report()["saved"] == 0


def test_a_failing_region_leaves_the_runtime_usable():
    fail = [True]

    def code_second(args):
        if fail[0]:
            raise ValueError("out of luck")
        return toy_step.code_second(args)

    codes = [*toy_step.CODES]
    codes[1] = code_second
    toy = Toy(codes=codes)
    with pytest.raises(ValueError, match="out of luck"):
        toy.micro_step(*batch(0))
    assert toy.runtime.buffer_report()["saved"] == 0
    assert toy.model.w1.untyped_storage().nbytes() == 0
    fail[0] = False
    toy.micro_step(*batch(0))
    toy.step()


def test_values_are_tensors_numbers_bools_and_none():
    toy = Toy()
    with pytest.raises(UserError, match="an input of a section is a str"):
        toy.runtime.run(toy.graph, 0, -1, ["x", 1])
    with pytest.raises(UserError, match="takes 2 inputs, got 1"):
        toy.runtime.run(toy.graph, 0, -1, [1])
    seen = []

    def code_first(args):
        seen.extend(args[:1])
        raise KeyboardInterrupt

    toy = Toy(codes=[code_first, *toy_step.CODES[1:]])
    for value in (3, 2.5, True, None):
        with pytest.raises(KeyboardInterrupt):
            toy.runtime.run(toy.graph, 0, -1, [value, None])
    assert seen == [3, 2.5, True, None] and [type(v) for v in seen[:3]] == [int, float, bool]


def test_a_use_before_the_gather_is_an_error():
    toy = Toy()
    text = plan_text(1, 3, GRAPH)
    edited = text.replace('       {"op":"wait","param":0},\n', "", 1)
    assert edited != text
    plan = toy.runtime.load_plan(reseal(edited), toy_step.CODES)
    message = r"forward 0, instruction 1 \(run fwd.0\): parameter w1 is not whole"
    with pytest.raises(UserError, match=message):
        toy.runtime.run(plan, 0, -1, list(batch(0)))


def test_plans_of_another_job_are_refused():
    toy = Toy()
    text = plan_text(1, 3, GRAPH)
    with pytest.raises(UserError, match="made for 2 ranks, this job has 1"):
        toy.runtime.load_plan(plan_text(2, 3, GRAPH), toy_step.CODES)
    with pytest.raises(UserError, match="accumulates 4 gradients"):
        toy.runtime.load_plan(plan_text(1, 3, GRAPH, accumulation=4), toy_step.CODES)
    with pytest.raises(UserError, match="reduces in bf16"):
        toy.runtime.load_plan(plan_text(1, 3, GRAPH, reduce="bf16"), toy_step.CODES)
    with pytest.raises(UserError, match="hash"):
        toy.runtime.load_plan(text.replace('"fwd.0"', '"fwd.9"'), toy_step.CODES)
    with pytest.raises(UserError, match="no parameter other"):
        toy.runtime.load_plan(reseal(text.replace('"w2"', '"other"')), toy_step.CODES)
    with pytest.raises(UserError, match="needs code 3 of 3"):
        toy.runtime.load_plan(text, toy_step.CODES[:3])
    frozen = Toy(trainable=False)
    with pytest.raises(UserError, match="frozen"):
        frozen.runtime.load_plan(plan_text(1, 3, GRAPH), toy_step.CODES)


def test_frozen_parameters_have_weights_only():
    toy = Toy(trainable=False)
    assert {piece["member"] for piece in toy.runtime.pieces()} == {"w1", "w2", "bias", "scale"}
    for piece in toy.runtime.pieces():
        assert piece["weight"].numel() == piece["stop"] - piece["start"]
        assert piece["master"] is None and piece["exp_avg"] is None
    assert toy.runtime.buffer_report()["states"] == 0
    assert torch.equal(toy.full_values()["w2"], Reference().w2.detach())
    with pytest.raises(UserError, match="w1 is frozen"):
        toy.runtime.reduce("w1", {"w1": torch.zeros(toy.model.w1.shape)})


def test_gradients_of_one_member_from_two_regions_add_up():
    def halves(args):
        return [
            part for grad in toy_step.code_first_backward(args) for part in (grad / 2, grad / 2)
        ]

    sections = GRAPH.replace(
        "value g.bias 64B grad=small\n",
        "value g.bias 64B grad=small\nvalue g.bias2 64B grad=small\nvalue g.w1b 64B grad=w1\n",
    ).replace("(g.w1, g.bias)", "(g.w1, g.w1b, g.bias, g.bias2)")
    toy, plain = Toy(), Toy()
    codes = [*toy_step.CODES[:3], halves]
    toy.graph = toy.runtime.load_plan(plan_text(1, 3, sections), codes)
    for each in (toy, plain):
        each.micro_step(*batch(0))
    for name in ("w1", "small"):
        assert torch.equal(toy.runtime.gradient(name), plain.runtime.gradient(name))


def test_members_without_a_gradient_are_left_alone():
    toy, model = Toy(), Reference()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        gradient = torch.randn(toy_step.HIDDEN)
        model.bias.grad = gradient
        optimizer.step()
        toy.runtime.reduce("small", {"bias": gradient, "scale": None})
        toy.runtime.accumulate("small")
        toy.step()
    assert_close(toy.full_values(), {n: p.detach() for n, p in model.named_parameters()})
    steps = {piece["member"]: piece["step"] for piece in toy.runtime.pieces()}
    assert steps == {"w1": 0, "w2": 0, "bias": 3, "scale": 0}


def test_masters_can_be_restored():
    source, target = Toy(dtype=torch.bfloat16), Toy(dtype=torch.bfloat16)
    for step in range(3):
        source.micro_step(*batch(step, dtype=torch.bfloat16))
        source.step()
    for ours, theirs in zip(target.runtime.pieces(), source.runtime.pieces(), strict=True):
        for key in ("master", "exp_avg", "exp_avg_sq"):
            ours[key].copy_(theirs[key])
        target.runtime.set_member_step(ours["member"], theirs["step"])
    target.runtime.masters_changed()
    for toy in (source, target):
        toy.micro_step(*batch(9, dtype=torch.bfloat16))
        toy.step()
    values, expected = target.full_values(), source.full_values()
    assert all(torch.equal(values[name], expected[name]) for name in expected)


def test_a_gradient_that_is_not_finite_skips_the_step():
    toy, twin = Toy(dtype=torch.float16, reduce="f16"), Toy(dtype=torch.float16, reduce="f16")
    before = toy.full_values()
    toy.micro_step(*batch(0, dtype=torch.float16), factor=float("inf"))
    assert toy.step(loss_scale_inv=2.0**-10)["skipped"] is True
    after = toy.full_values()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert toy.runtime.optimizer_steps() == 0
    toy.micro_step(*batch(1, dtype=torch.float16), factor=2.0**10)
    assert toy.step(loss_scale_inv=2.0**-10)["skipped"] is False
    twin.micro_step(*batch(1, dtype=torch.float16))
    twin.step()
    # Powers of two scale exactly, except where an unscaled f16 gradient is subnormal.
    assert_close(toy.full_values(), twin.full_values(), rtol=1e-3, atol=1e-3)


def test_bad_gradients_are_named():
    toy = Toy()
    with pytest.raises(UserError, match="gradient of w1 has 3 elements"):
        toy.runtime.reduce("w1", {"w1": torch.zeros(3)})
    with pytest.raises(UserError, match="w1 is sparse"):
        toy.runtime.reduce("w1", {"w1": torch.zeros(toy.model.w1.shape).to_sparse()})
    with pytest.raises(UserError, match="no member nothing"):
        toy.runtime.reduce("w1", {"nothing": torch.zeros(3)})
    with pytest.raises(UserError, match="no reduction of it was started"):
        toy.runtime.accumulate("w1")
    toy.runtime.reduce("w1", {})
    with pytest.raises(UserError, match="reduced again"):
        toy.runtime.reduce("w1", {})
    with pytest.raises(UserError, match="not accumulated"):
        toy.step()


def test_bad_parameters_are_named():
    runtime = _runtime.Runtime(None, 0, 1, torch.device("cpu"))
    good = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(UserError, match="overlaps another or leaves"):
        runtime.add_param("p", [("p", good, 0)], 3, "sharded", True)
    with pytest.raises(UserError, match="floating-point"):
        runtime.add_param("p", [("p", torch.zeros(4, dtype=torch.int64), 0)], 4, "whole", False)
    with pytest.raises(UserError, match='placement is "here"'):
        runtime.add_param("p", [("p", good, 0)], 4, "here", True)
    runtime.add_param("p", [("p", good, 0)], 4, "sharded", True)
    with pytest.raises(UserError, match="added before"):
        runtime.add_param("p", [("q", torch.zeros(4), 0)], 4, "sharded", True)
    with pytest.raises(UserError, match="belongs to parameter p"):
        runtime.add_param("q", [("p", torch.zeros(4), 0)], 4, "sharded", True)
    with pytest.raises(UserError, match="no memory"):
        other = _runtime.Runtime(None, 0, 1, torch.device("cpu"))
        other.add_param("p", [("p", good, 0)], 4, "sharded", True)
    with pytest.raises(UserError, match="no parameter nothing"):
        runtime.gather(["nothing"])
    with pytest.raises(UserError, match="need a process group"):
        _runtime.Runtime(None, 0, 2, torch.device("cpu"))
    with pytest.raises(UserError, match="reduce_dtype"):
        _runtime.Runtime(None, 0, 1, torch.device("cpu"), "int8")


def test_records_cover_every_instruction():
    toy = Toy()
    toy.runtime.trace(True)
    toy.micro_step(*batch(0))
    toy.step()
    toy.runtime.trace(False)
    records = toy.runtime.records()
    expected = sum(plan_text(1, 3, sections).count('{"op"') for sections in (GRAPH, UPDATE))
    assert len(records) == len({r[:3] for r in records}) == expected
    assert all(0 <= start <= stop for *_, start, stop, _ in records)


def test_buffer_report_counts_bytes():
    toy = Toy(dtype=torch.bfloat16)
    padded = {name: -(-getattr(toy.model, name).numel() // 64) * 64 for name in ("w1", "w2")}
    report = toy.runtime.buffer_report()
    assert report["shards"] == 2 * sum(padded.values())
    assert report["full"] == 2 * 64
    assert report["masters"] == 4 * (sum(padded.values()) + 64)
    assert report["states"] == report["gradients"] == 0
    toy.micro_step(*batch(0, dtype=torch.bfloat16))
    assert toy.runtime.buffer_report()["gradients"] > 0
    toy.runtime.zero_grad()
    assert toy.runtime.buffer_report()["gradients"] == 0


def test_queries_wait_for_another_threads_region():
    """A region holds the runtime and wants Python's lock, so a query must not have that."""
    script = """
import sys, threading
sys.path.insert(0, sys.argv[1])
import toy_step
runs, goes_on = threading.Event(), threading.Event()
def slow(args):
    runs.set()
    goes_on.wait(0.2)
    return toy_step.CODES[0](args)
toy = toy_step.Toy(codes=[slow, *toy_step.CODES[1:]])
for name in ("relieved", "buffer_report", "replays", "kernels", "peak_bytes", "records"):
    runs.clear()
    thread = threading.Thread(target=lambda: toy.micro_step(*toy_step.batch(0)))
    thread.start()
    runs.wait()
    getattr(toy.runtime, name)()
    thread.join()
    toy.step()
"""
    folder = toy_step.__file__.rpartition("/")[0]
    subprocess.run([sys.executable, "-c", script, folder], check=True, timeout=100)
