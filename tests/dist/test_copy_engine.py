# SPDX-License-Identifier: Apache-2.0
"""Gathers by copy engine, on CPUs: the real transport over a driver that does its work at once.

tests/fake_cuda stands in for libcuda. Its hooks delay a rank's pulls, and switch waits off to show
that what they prevent would be seen.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fake_driver import COMPILER, FAKE, ROOT, Fake
from ranks import run_ranks
from toy_step import PACK, Toy, batch

from deepcompile import _runtime
from deepcompile.errors import UserError

CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
WEIGHTS = ("w1", "w2")
STEPS = 2


@pytest.mark.skipif(not (CUDA / "cuda.h").is_file(), reason=f"needs {CUDA}/cuda.h")
def test_the_drivers_declarations_are_those_of_cuda_h():
    command = [COMPILER, "-std=c++20", "-fsyntax-only", f"-I{ROOT / 'core'}", f"-I{CUDA}"]
    subprocess.run([*command, str(FAKE / "declarations.cpp")], check=True)


def pulling(rank: int, world: int, library: str, stage: int = 3, engine=(), **options) -> Toy:
    """A toy whose gathers are pulls, the smallest shards' too."""
    more = {"library": library, "least_bytes": 1, **dict(engine)}
    return Toy(
        rank, world, stage, group=dist.group.WORLD, gather="copy_engine", copy_engine_options=more,
        **options,
    )  # fmt: skip


def grouped(rank: int, world: int, stage: int = 3, **options) -> Toy:
    return Toy(rank, world, stage, group=dist.group.WORLD, **options)


# ---- the same bits as over the process group


def life(toy: Toy, rank: int, world: int, job: dict, plan: str) -> list[torch.Tensor]:
    """All that a training run does to parameters; what it saw on the way."""
    dtype = job.get("dtype", torch.float32)
    seen = toy.train(STEPS, rank, world, dtype=dtype)
    seen += toy.full_values().values()  # an evaluation between steps
    if plan != "early":  # a step that all skip, or micro-batches that are dropped
        toy.micro_step(*batch(99 + rank, dtype=dtype), factor=float("nan") if rank == 1 else 1.0)
        if toy.accumulation == 1:
            assert toy.step(check_finite=True)["skipped"]
        else:
            toy.runtime.zero_grad()
    if not job and rank == 1:  # this rank is short of memory
        held = sum(v for k, v in toy.runtime.buffer_report().items() if "host" not in k)
        toy.runtime.limit_bytes(held * 5 // 2)
    seen += toy.train(STEPS, rank, world, dtype=dtype)
    toy.runtime.limit_bytes(0)
    # A store of what was written into whole parameters, then a checkpoint's load.
    toy.runtime.settle()
    toy.runtime.gather(["w1", PACK])
    toy.runtime.wait(["w1", PACK])
    for name in ("w1", "bias"):
        getattr(toy.model, name).data.mul_(0.5)
    toy.runtime.store(["w1", PACK])
    toy.runtime.release(["w1", PACK])
    seen += toy.train(1, rank, world, dtype=dtype)
    for piece in toy.runtime.pieces():
        piece["master"].mul_(0.75)
        piece["exp_avg"].zero_()
    toy.runtime.masters_changed()
    seen += toy.full_values().values()
    seen += toy.train(STEPS, rank, world, dtype=dtype)
    return seen + list(toy.everything().values())


JOBS = [
    (dict(), ("", "deferred", "deferred, updated in the forward", "values", "early")),
    (
        dict(accumulation=2, clip=0.5, dtype=torch.bfloat16, reduce="bf16"),
        ("", "deferred, updated in the forward", "states"),
    ),
    (dict(stage=1, accumulation=2, boundary=True), ("", "deferred")),
    (dict(engine={"in_step_bytes": 600, "signals": "copies"}), ("remade",)),
]


def compare(rank, world, library, jobs):
    """(job, plan) of what differs from the process group's; pulls of all."""
    fake = Fake(library)
    fake.set(pull_ms=int(rank == 1))  # it drifts behind
    wrong = []
    for job, plans in jobs:
        plain = {key: value for key, value in job.items() if key != "engine"}
        for plan in plans:
            one = grouped(rank, world, plan=plan, **plain)
            two = pulling(rank, world, library, plan=plan, **job)
            expected, found = (life(toy, rank, world, job, plan) for toy in (one, two))
            pairs = zip(expected, found, strict=True)
            if not all(torch.equal(a, b) for a, b in pairs):
                wrong.append((job, plan))
            assert two.runtime.gathers["transport"] == "copy_engine"
    counts = fake.count("pulls"), fake.count("copied_words")
    return wrong, counts, two.runtime.outside_bytes()


@pytest.mark.parametrize("world", [2, 4])
def test_the_same_bits_as_over_the_process_group(world, driver):
    few = [*JOBS[:2], JOBS[-1]]
    jobs = JOBS if world == 2 else [(job, plans[-1:]) for job, plans in few]
    for wrong, (pulls, words), bytes_outside in run_ranks(compare, world, driver, jobs):
        assert wrong == [] and pulls > 50 * (world - 1) and words > 0
        # One block for small shards; with several peers one for the words of rounds.
        assert bytes_outside == (64 << 20) + (world > 2) * (2 << 20)


# ---- what the waits prevent


def late_writer(rank, world, library, hooks):
    """Rank 1 writes its shard late: what rank 0 gathers at once."""
    toy = pulling(rank, world, library)
    toy.full_values()
    if rank == 0:
        Fake(library).set(**hooks)
    if rank == 1:
        time.sleep(0.5)
    for piece in toy.runtime.pieces():
        piece["weight"].fill_(7.0)
    toy.runtime.gather(["w1"])
    toy.runtime.wait(["w1"])
    return torch.equal(toy.model.w1.detach(), torch.full_like(toy.model.w1, 7.0))


def early_writer(rank, world, library, hooks):
    """Rank 0 writes its shard while rank 1, which is slow, still pulls: what rank 1 got."""
    toy = pulling(rank, world, library)
    before = toy.full_values()["w1"]
    fake = Fake(library)
    if rank == 0:
        fake.set(**hooks)
    if rank == 1:
        fake.set(pull_ms=500)
    toy.runtime.gather(["w1"])
    toy.runtime.wait(["w1"])
    same = torch.equal(toy.model.w1.detach(), before)
    for piece in toy.runtime.pieces() if rank == 0 else ():
        piece["weight"].fill_(9.0)
    return same


def writers(rank, world, library):
    """Each writer twice: as it is, and where rank 0 waits for nothing."""
    fake, found = Fake(library), []
    for job, hook in ((late_writer, "ignore_odd_waits"), (early_writer, "ignore_even_waits")):
        for ignored in (0, 1):
            found.append(job(rank, world, library, {hook: ignored}))
            dist.barrier()
            fake.set(pull_ms=0, **{hook: 0})
    return found


def test_no_rank_reads_what_is_not_written_or_writes_what_is_read(driver):
    reader, slow = run_ranks(writers, 2, driver)
    assert reader == [True, False, True, True]  # without the wait it reads what was before
    assert slow == [True, True, True, False]  # without the wait the writer is too early for it


def absent_peer(rank, world, library):
    toy = pulling(rank, world, library, timeout_s=1.5)
    toy.full_values()
    dist.barrier()
    if rank == 1:
        time.sleep(4)
        return None
    begin = time.monotonic()
    messages = []
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            toy.runtime.gather(["w1"])
            toy.runtime.wait(["w1"])
        messages.append(str(caught.value))
    return messages, time.monotonic() - begin


def slow_alone(rank, world, library, pull_ms):
    """What rank 0, which is impatient and slow itself, says of a gather."""
    toy = pulling(rank, world, library, timeout_s=1.0 if rank == 0 else 20.0)
    toy.full_values()
    dist.barrier()
    Fake(library).set(pull_ms=pull_ms * (rank == 0))
    try:
        for _ in range(2):
            toy.runtime.gather(["w1"])
            toy.runtime.wait(["w1"])
            Fake(library).set(pull_ms=0)
    except UserError as error:
        return str(error)
    return ""


def test_who_is_late_itself_blames_nobody_and_has_as_long_again(driver):
    assert run_ranks(slow_alone, 2, driver, 1500) == ["", ""]
    said = run_ranks(slow_alone, 2, driver, 4000, timeout=60)[0]
    assert "waited 1 s for its own stream: all ranks were there" in said


# ---- where it is taken


def chosen(rank, world, library):
    """What is said of each way to ask, on this rank."""

    def ask(gather, **options):
        try:
            runtime = _runtime.Runtime(
                dist.group.WORLD, rank, world, torch.device("cpu"), timeout_s=20.0, gather=gather,
                copy_engine_options=options,
            )  # fmt: skip
        except UserError as error:
            return str(error)
        return runtime.gathers["transport"], runtime.gathers["why"]

    fake, one = Fake(library), int(rank == 1)
    said = {
        "fits": ask("auto", library=library),
        "default": ask("nccl"),
        "cpu": ask("copy_engine"),
        "auto on a cpu": ask("auto"),
        "hosts": ask("copy_engine", library=library, host=f"host{rank}"),
        "missing": ask("auto", library="libc.so.6"),
        "nonsense": ask("symmetric"),
    }
    for hook in ("no_access", "no_memory", "no_handle", "no_mapping", "no_batches", "deaf"):
        fake.set(**{hook: one})
        said[hook] = ask("auto", library=library)
        fake.set(**{hook: 0})
    for hook, value in (("no_remote_writes", one), ("newer", 10)):
        fake.set(**{hook: value})
        said[hook] = ask("auto", library=library)
        fake.set(**{hook: 0})
    said["threads"] = fake.count("threads"), fake.count("bare_threads")
    return said


def dropped(rank, world, library):
    """Mappings and allocations while there is an engine and when it is gone."""
    fake, seen = Fake(library), []
    before = mapped, allocated = fake.count("mappings"), fake.count("allocations")

    def look():
        seen.append((fake.count("mappings") - mapped, fake.count("allocations") - allocated))

    for _ in range(2):
        toy = pulling(rank, world, library)
        toy.full_values()
        piece = toy.runtime.pieces()[0]["weight"]
        look()
        del toy
        gc.collect()
        assert piece.isfinite().all()  # a view keeps the memory, not the mappings
        look()
        del piece
    look()
    measured = pulling(rank, world, library).runtime.measure_links([64, 4096, 1 << 20], 1)
    return seen, before, [size for size, _ in measured["gather"]]


def other_ends(rank, world, library):
    """Everything here in one start of the ranks: an absent peer comes last."""
    said = chosen(rank, world, library)
    memory = dropped(rank, world, library)
    return said, memory, absent_peer(rank, world, library)


@pytest.fixture(scope="module")
def ends(driver):
    return run_ranks(other_ends, 2, driver)


def test_it_is_taken_where_it_works_and_refused_by_name(ends):
    for said, _, _ in ends:
        assert said["fits"][0] == "copy_engine" and "one host" in said["fits"][1]
        assert said["default"] == ("nccl", "compile.gather says so")
        assert re.search('"copy_engine", which is not possible here: rank 0: .*CPU', said["cpu"])
        assert said["auto on a cpu"][0] == "nccl" and "CPU" in said["auto on a cpu"][1]
        assert "rank 1: it is on another host than rank 0" in said["hosts"]
        assert said["missing"][0] == "nccl" and "no function cuInit" in said["missing"][1]
        assert "Use nccl, copy_engine or auto" in said["nonsense"]
        for hook in ("no_remote_writes", "newer"):
            assert said[hook][0] == "copy_engine" and said[hook][1].endswith("signals are copied")
        assert "rank 1: GPU fake:01.0 cannot access" in said["no_access"][1]
        assert "rank 1: it has no memory for a block" in said["no_memory"][1]
        assert "rank 1: cuIpcGetMemHandle: CUDA_ERROR_INVALID_VALUE" in said["no_handle"][1]
        assert "rank 1: cuIpcOpenMemHandle: CUDA_ERROR_MAP_FAILED" in said["no_mapping"][1]
        assert "rank 1: cuStreamBatchMemOp: " in said["no_batches"][1]
        assert "rank 0: a word written by rank 1 did not arrive" in said["deaf"][1]


def test_the_watch_works_in_the_context_of_its_device(ends):
    for said, _, _ in ends:  # without one, CUDA makes another on device 0
        threads, bare = said["threads"]
        assert threads > 0 and bare == 0


def test_a_dropped_engine_gives_its_memory_back(ends):
    for _, (seen, left, sizes), _ in ends:
        assert seen == [(1, 1), (0, 1), (1, 1), (0, 1), (0, 0)]
        # Of trials that failed: a peer that was deaf, or had no words, cannot say that it let go.
        assert max(left) <= 2
        # Gathers are measured up to the largest shard: half of w1's 37 x 29, padded.
        assert sizes[0] == 64 and sizes[-1] == 2 * 4 * 576


def test_an_absent_peer_is_named_in_time(ends):
    messages, seconds = ends[0][2]
    for message in messages:
        assert "rank 0: gather w1 (outside a plan) failed" in message
        assert "the gather of w1 waited 1.5 s for rank 1" in message
    assert seconds < 3
