# SPDX-License-Identifier: Apache-2.0
"""Recordings and the memory they read and write: the same values as the code gives, whatever else
uses that memory."""

from __future__ import annotations

import os
import subprocess
import sys

import alias_step
import pytest
import torch
import toy_step
from ranks import run_ranks
from test_budget_nccl import digest, start, train
from toy_step import Toy
from worlds import GPUS, TWO_GPUS

pytestmark = [
    pytest.mark.skipif(not GPUS, reason="needs a GPU"),
    pytest.mark.timeout(600),
]

KIND = {"dtype": torch.bfloat16, "device": "cuda"}
OPTIONS = {"dtype": torch.bfloat16, "device": "cuda:0", "reduce": "bf16"}


def recorder():
    from deepcompile.cuda_graphs import recorder as make

    return make("on", torch.device("cuda", 0))


def losses_of(toy, steps=8):
    """Host memory that a step has given back is used for something else before the next one."""
    found, others = [], []
    for _ in range(steps):
        found += [loss.item() for loss in toy.train(1, **KIND)]
        others += [torch.full((1024,), -1.0) for _ in range(200)]
    return found


def compare(codes) -> dict:
    twin, toy = Toy(codes=codes, **OPTIONS), Toy(codes=codes, recorder=recorder(), **OPTIONS)
    assert losses_of(toy) == losses_of(twin), toy.runtime.replays()
    found = toy.runtime.replays()
    assert found["replayed"] > 0, found
    return found


def test_an_output_on_the_host_is_there_in_later_steps(monkeypatch):
    alias_step.use(monkeypatch, alias_step.ON_HOST)
    assert "an output is on a cpu" in compare(alias_step.host_codes("cpu"))["refused"]


@pytest.mark.parametrize("case", alias_step.ALIASES)
def test_a_run_may_hand_on_another_part_of_what_it_read(monkeypatch, case):
    alias_step.use(monkeypatch, alias_step.ALIASED)
    assert compare(alias_step.ALIASES[case])["runs"] == 4


class Tutorial(torch.nn.Module):
    """Attention as tutorials have it: its scale is a tensor on the CPU, and its bias is one that
    goes to the device in each layer. The scale's square root is the same in all layers, so the cut
    puts it in front of them, in a region of its own."""

    def __init__(self, width=256, layers=5):
        super().__init__()
        self.embed = torch.nn.Embedding(512, width)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(width, 3 * width) for _ in range(layers))
        self.out = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))
        self.head = torch.nn.Linear(width, 512)
        self.width = width

    def forward(self, ids):
        x = self.embed(ids)
        for number, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            q, k, v = qkv(x).chunk(3, -1)
            scores = q @ k.transpose(-1, -2) / torch.sqrt(torch.tensor(float(self.width)))
            bias = torch.arange(scores.shape[-1], dtype=scores.dtype) * (0.01 * number)
            scores = scores + bias.to(scores.device, non_blocking=True)
            x = x + out(torch.softmax(scores, -1) @ v)
        return torch.nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def tutorial(rank, world):
    import deepcompile

    found, reports = [], []
    for setting in ("off", "auto"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        engine, _, _, _ = deepcompile.initialize(
            model=Tutorial(),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "bf16": {"enabled": True},
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000},
                "compile": {"cuda_graphs": setting, "region_bytes": 1 << 16},
            },
        )
        engine.compile(schedule=[(0, ["zero3_compile"])])
        losses = []
        for step in range(12):
            draw = torch.Generator().manual_seed(step)
            ids = (torch.randint(0, 512, (2, 1), generator=draw) + torch.arange(64)) % 512
            loss = engine(ids.to(engine.device))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        found.append(losses)
        reports.append(engine.compile_report()["cuda_graphs"])
    return found, reports


def test_a_model_with_tensors_on_the_host():
    ((plain, graphs), reports) = run_ranks(tutorial, 1, timeout=400, backend="nccl")[0]
    print(reports)
    assert reports[1]["replayed"] > 0, reports
    assert plain == graphs, reports


def test_memory_of_a_recording_is_not_filled_beside_who_uses_it():
    made = recorder()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty makes
    try:
        pool = made.begin()
        size = 1 << 26
        buffer = made.allocate(size)
        place = buffer.data_ptr()
        buffer.fill_(7)
        torch.cuda._sleep(1_000_000_000)  # the compute stream is behind the host, as in any step
        seen = buffer.clone()
        del buffer  # as a release: its memory is the next gather's
        again = made.allocate(size)
        assert again.data_ptr() == place
        torch.cuda.synchronize()
        assert bool((seen == 7).all()), "what was still to be read was filled"
        made.end()
        del pool
    finally:
        torch.use_deterministic_algorithms(False)


def run_script(text: str, **env: str) -> str:
    code = f"import sys; sys.path.insert(0, {os.path.dirname(toy_step.__file__)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", code + text], env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


OTHER_ALLOCATOR = """
import torch
from toy_step import Toy
from deepcompile import cuda_graphs
device = torch.device("cuda", 0)
assert cuda_graphs.recorder("auto", device) is None
try:
    cuda_graphs.recorder("on", device)
except Exception as error:
    print(error)
toy = Toy(dtype=torch.bfloat16, device="cuda:0", reduce="bf16")
print([loss.item() for loss in toy.train(3, dtype=torch.bfloat16, device="cuda")])
"""


def test_nothing_is_recorded_with_an_allocator_that_has_no_pools():
    said = run_script(OTHER_ALLOCATOR, PYTORCH_CUDA_ALLOC_CONF="backend:cudaMallocAsync")
    assert "the allocator cudaMallocAsync has no pools for them" in said


CLEARED = """
import torch
from deepcompile.cuda_graphs import recorder
device = torch.device("cuda", 0)
shapes = [(64, 1 << 16, 64), (128, 1 << 15, 256), (8, 1 << 17, 512), (1, 1 << 18, 64)]
pairs = [[torch.randn(m, k, device=device).bfloat16(), torch.randn(k, n, device=device).bfloat16()]
         for m, k, n in shapes]
made = recorder("on", device)
pool = made.begin()
made.prepare()
made.start([])
outputs, graph = made.finish([a @ b for a, b in pairs], None)  # split along k, with workspaces
graph.first()
torch.cuda.synchronize()
expected = [output.clone() for output in outputs]
made.end()
torch._C._cuda_clearCublasWorkspaces()  # as torch.compile(mode="reduce-overhead") of another model
torch.cuda.empty_cache()
kept = [torch.full((1 << 23,), 7, dtype=torch.uint8, device=device) for _ in range(64)]
kept += [torch.full((1 << 30,), 7, dtype=torch.uint8, device=device) for _ in range(4)]
for _ in range(3):
    graph.replay()
torch.cuda.synchronize()
assert all(bool((k == 7).all()) for k in kept), "a replay wrote to memory of others"
assert all(torch.equal(x, y) for x, y in zip(outputs, expected, strict=True))
"""


def test_workspaces_of_recorded_kernels_stay():
    run_script(CLEARED)


def short_for_some_steps(rank, world, hold):
    """From step 4 to 11 the device is filled by someone else, but for half of what a step takes."""
    engine = start(world, hidden=1024, layers=6)
    losses = train(engine, rank, 0, 4)
    torch.cuda.synchronize()
    held = None
    if hold:
        most = max(torch.cuda.max_memory_allocated(), engine.runtime.replays()["peak_bytes"])
        needed = most - torch.cuda.memory_allocated()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        held = torch.empty(free - needed // 2, dtype=torch.uint8, device="cuda")
    losses += train(engine, rank, 4, 12)
    del held
    torch.cuda.empty_cache()
    losses += train(engine, rank, 12, 24)
    return losses, digest(engine), engine.compile_report()


def test_memory_held_by_another_allocation_while_steps_are_recorded():
    """The same bits; and what is left of the plan runs from graphs once there is room again."""
    (free,), (held,) = (
        run_ranks(short_for_some_steps, 1, hold, timeout=200, backend="nccl")
        for hold in (False, True)
    )
    assert held[:2] == free[:2]
    for report in (free[2], held[2]):
        print(report["memory_relieved"], report["budgets_lowered"], report["cuda_graphs"])
        assert report["cuda_graphs"]["runs"] > 0
    assert held[2]["memory_relieved"] > free[2]["memory_relieved"] == 0


NUMEL = 1 << 24


def other_stream(rank, world):
    """Elements that were not what was gathered, read on another stream than it was gathered on."""
    import torch.distributed as dist

    from deepcompile import _runtime

    device = torch.device("cuda", rank)
    runtime = _runtime.Runtime(
        dist.group.WORLD, rank, world, device, "bf16", 0.0, 1, 60.0, "nccl", "nccl", {}
    )
    param = torch.nn.Parameter(torch.ones(NUMEL, device=device).bfloat16())
    runtime.add_param("p", [("p", param, 0)], NUMEL, "sharded", False)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    runtime.gather(["p"])  # the buffer is the default stream's
    runtime.wait(["p"])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(device)):
        seen = torch.empty(NUMEL, device=device, dtype=torch.bfloat16)
        runtime.wait(["p"])  # the runtime knows of this stream
        torch.cuda._sleep(1_000_000_000)
        seen.copy_(param.detach())
        runtime.release(["p"])  # to the default stream's memory, though this one still reads it
    others = [torch.full((NUMEL,), 7.0, device=device, dtype=torch.bfloat16) for _ in range(3)]
    torch.cuda.synchronize()
    del others
    return (seen != 1).sum().item()


@TWO_GPUS
def test_memory_is_given_back_behind_the_stream_that_used_it():
    assert run_ranks(other_stream, 2, backend="nccl", timeout=120) == [0, 0]
