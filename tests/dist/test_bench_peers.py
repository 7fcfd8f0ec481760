# SPDX-License-Identifier: Apache-2.0
"""The benchmark's peers do the same work: equal losses on 2 ranks, with accumulation and clipping;
and a sweep from its command line to its rows."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import os
import subprocess
import sys
import weakref

import pytest
from ranks import run_ranks

from deepcompile.bench.conditions import Condition
from deepcompile.bench.options import Options
from deepcompile.bench.results import Results

KINDS = {
    "ddp": {"zero_stage": 0},
    "fsdp": {},
    "fsdp best": {"framework": "fsdp", "settings": "best"},
    "fsdp offload": {"framework": "fsdp", "offload_adam": True, "variant": "prefetch"},
    "overlap": {"framework": "fsdp_c", "variant": "overlap", "compile": True},
    "deepcompile": {"compile": True, "passes": ("prefetch", "selective_gather")},
}
DEEPSPEED = {
    "ddp": {"zero_stage": 0},
    "zero1": {"zero_stage": 1},
    "zero1_c": {"zero_stage": 1, "compile": True},
    "zero3": {},
    "zero3_c": {"compile": True, "activation_checkpointing": True},
}
STEPS = 6


def condition(kind: str, **changes) -> Condition:
    given = {
        "model": "llama-tiny", "framework": kind, "num_layers": 1, "batch_size": 1,
        "seq_length": 16, "accumulation": 2, "backend": "eager", "world": 2, "dtype": "fp32",
    }  # fmt: skip
    return Condition(**(given | (KINDS | DEEPSPEED)[kind] | changes))


def options(folder: str) -> Options:
    return Options(
        bench_step=STEPS, warmup_step=1, max_grad_norm=0.5, learning_rate=1e-3, result_dir=folder
    )


def losses(
    rank: int, world: int, folder: str, kinds: list[str], accumulation: int = 2
) -> tuple[dict[str, list], str]:
    """By kind, and what the rank printed."""
    from deepcompile.bench import worker
    from deepcompile.distributed import join

    ranks = join()
    found = [condition(kind, accumulation=accumulation) for kind in kinds]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        rows = worker.run_conditions(found, options(folder), ranks)
    by_kind = dict(zip(kinds, ([row.losses, row.effective] for row in rows), strict=True))
    return by_kind, said.getvalue()


def test_all_peers_train_the_same(tmp_path):
    (results, said), _ = run_ranks(losses, 2, str(tmp_path), list(KINDS), timeout=280)
    reference, _ = results["ddp"]
    assert len(reference) == STEPS and reference[-1] < reference[0]
    for kind, (found, _) in results.items():
        assert found == pytest.approx(reference, abs=2e-5), kind
    facts = {kind: effective for kind, (_, effective) in results.items()}
    for kind, value in (("FSDP", "true"), ("FSDP best", "false")):
        (line,) = (x for x in said.splitlines() if x.startswith(f"[bench] {kind} in force: "))
        assert f'"reshard_after_forward": {value}' in line
    assert facts["fsdp"]["reshard_after_forward"] is True
    assert facts["fsdp best"]["reshard_after_forward"] is False
    assert facts["fsdp best"]["reshard_between_micro_batches"] is False
    assert facts["deepcompile"]["plan_passes"] == ["zero3_compile", "prefetch", "selective_gather"]
    assert facts["deepcompile"]["plan_pending"] is False
    for effective in facts.values():
        assert len(effective["peak_bytes_of_ranks"]) == 2
    rows = Results.load(tmp_path)
    assert not rows.problems and len(rows) == len(KINDS)
    assert all(len(row.times) == 2 and len(row.times[0]) == STEPS - 1 for row in rows)


SHARED = ("ddp", "fsdp", "fsdp best", "fsdp offload", "overlap", "deepcompile")


def shared_lengths(rank: int, world: int, folder: str, kind: str) -> list[tuple[list, dict]]:
    """A length, another with the same model, the first again; and the second by itself."""
    from deepcompile.bench import worker
    from deepcompile.distributed import join

    ranks, first = join(), condition(kind)
    longer = dataclasses.replace(first, seq_length=32)
    given = dataclasses.replace(options(folder), eval=True)
    rows = worker.run_conditions([first, longer, first], given, ranks)
    rows += worker.run_conditions([longer], given, ranks)
    return [(row.losses, row.effective) for row in rows]


@pytest.mark.parametrize("kind", SHARED)
def test_conditions_of_one_process_start_from_the_first_weights(kind, tmp_path):
    found, _ = run_ranks(shared_lengths, 2, str(tmp_path), kind, timeout=280)
    (first, _), (longer, facts), (again, _), (alone, _) = found
    assert longer == pytest.approx(alone, abs=1e-5) and again == pytest.approx(first, abs=1e-5)
    assert facts["starts_from"] == "the first weights"


# DeepSpeed builds an extension for its collectives on CPUs with g++ when it first runs.


@pytest.mark.parametrize("accumulation", [1, 2])
def test_deepspeed_trains_the_same(tmp_path, accumulation):
    pytest.importorskip("deepspeed")
    (results, _), _ = run_ranks(
        losses, 2, str(tmp_path), list(DEEPSPEED), accumulation, timeout=600
    )  # fmt: skip
    reference, _ = results["ddp"]
    for kind, (found, _) in results.items():
        assert found == pytest.approx(reference, abs=2e-5), kind
    facts = {kind: effective for kind, (_, effective) in results.items()}
    assert facts["zero1"]["zero_optimizer"] == "DeepSpeedZeroOptimizer"
    assert facts["zero3"]["zero_optimizer"] == "DeepSpeedZeroOptimizer_Stage3"
    assert facts["zero3"]["optimizer"] == "AdamW"


def frames_and_what_is_left(rank: int, world: int, folder: str) -> tuple[list[int], list[bool]]:
    """How often Dynamo has compiled after each step, and what lives on when the peer is closed."""
    from torch._dynamo.utils import counters

    from deepcompile.bench import peers, worker
    from deepcompile.bench.batches import named_text, training_batches
    from deepcompile.distributed import join

    ranks, given = join(), condition("zero3_c")
    peer = peers.setup(given, options(folder), ranks)
    engine = peer.engine
    kept = [weakref.ref(it) for it in (engine, engine.module, engine.optimizer)]
    text = named_text(None, "", ranks)
    batches = training_batches(text, 256, 1, given.seq_length, 0, ranks)
    frames = []
    for _ in range(5):
        peer.step([worker.on_device(next(batches), ranks.device) for _ in range(2)])
        frames.append(counters["frames"]["total"])
    del engine
    peer.close()
    worker.free(ranks)
    return frames, [it() is not None for it in kept]


def test_deepspeed_compiles_once_and_gives_its_memory_back(tmp_path):
    pytest.importorskip("deepspeed")
    frames, left = run_ranks(frames_and_what_is_left, 2, str(tmp_path), timeout=600)[0]
    assert frames[0] > 0 and frames[2] == frames[-1], frames
    assert left == [False, False, False]


def test_deepspeeds_passes_are_those_it_has():
    """Its own check of what a pass needs before it, which it makes on GPUs."""
    pytest.importorskip("deepspeed")
    from deepspeed.compile.passes import offload_adam_states, prefetch, selective_gather
    from deepspeed.compile.passes import zero3_compile as gather
    from deepspeed.compile.passes.contract import register_pass_contract, validate_schedule

    from deepcompile.bench.peers.deepspeed import schedule
    from deepcompile.errors import UserError

    names = {gather.NAME: gather.add_z3_gather_release, prefetch.NAME: prefetch.schedule_prefetch,
             selective_gather.NAME: selective_gather.selective_gather,
             offload_adam_states.NAME: offload_adam_states.move_opt_states,
             offload_adam_states.NAME_FOR_INIT: offload_adam_states.offload_adam_states_for_init,
             }  # fmt: skip
    for module in (gather, prefetch, selective_gather, offload_adam_states):
        register_pass_contract(module.NAME, module.CONTRACT)
    register_pass_contract(offload_adam_states.NAME_FOR_INIT, offload_adam_states.CONTRACT_FOR_INIT)
    given = Condition("llama-tiny", "ds_deepcompile", compile=True)
    for passes in ((), ("prefetch",), ("selective_gather",), ("zero3_compile",),
                   ("prefetch", "selective_gather"), ("offload_adam_states",)):  # fmt: skip
        planned = schedule(dataclasses.replace(given, passes=passes))
        validate_schedule(planned, names)
        assert all(name in names.values() for _, step in planned for name in step)
    with pytest.raises(UserError, match="Inductor does not compile"):
        schedule(dataclasses.replace(given, passes=("offload_adam_states_sync",)))


def test_a_sweep_from_its_command_line(tmp_path):
    command = [sys.executable, "-m", "deepcompile.bench.sweep", "tiny",
               "--frameworks", "ddp,ds_deepcompile",
               "--seq-lengths", "16", "--num-layers", "1", "--warmup_step", "1",
               "--bench_step", "3"]  # fmt: skip
    env = {**os.environ, "NGPUS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for name in ("PROFILE_DIR", "MODEL", "LOG_BASE", "NUM_NODES", "RANK", "WORLD_SIZE"):
        env.pop(name, None)
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 measured, 1 skipped" in done.stdout
    there = importlib.util.find_spec("deepspeed") is not None
    words = "cannot run here" if there else "not installed"
    rows = Results.load(tmp_path / "profiles")
    assert [row.failure for row in rows] == [words, ""]
    log = tmp_path / "logs" / "debug_n0_llama-tiny_ddp_np2z0c0dc0E0b2seq16g1a0pALL_L1_fp32.log"
    assert "Epoch 1, Step 3, Loss:" in log.read_text()
    assert (tmp_path / "profiles" / "result.txt").read_text().count("iteration time:") == 1
