# SPDX-License-Identifier: Apache-2.0
"""The benchmark's peers do the same work: equal losses on 2 ranks, with accumulation and clipping;
and a sweep from its command line to its rows."""

from __future__ import annotations

import os
import subprocess
import sys

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
STEPS = 6


def condition(kind: str, **changes) -> Condition:
    given = {
        "model": "llama-tiny", "framework": kind, "num_layers": 1, "batch_size": 1,
        "seq_length": 16, "accumulation": 2, "backend": "eager", "world": 2, "dtype": "fp32",
    }  # fmt: skip
    return Condition(**(given | KINDS[kind] | changes))


def losses(rank: int, world: int, folder: str) -> dict[str, list[float]]:
    from deepcompile.bench import worker
    from deepcompile.distributed import join

    options = Options(
        bench_step=STEPS, warmup_step=1, max_grad_norm=0.5, learning_rate=1e-3, result_dir=folder
    )
    ranks = join()
    found = [condition(kind) for kind in KINDS]
    rows = worker.run_conditions(found, options, ranks)
    return dict(zip(KINDS, ([row.losses, row.effective] for row in rows), strict=True))


def test_all_peers_train_the_same(tmp_path):
    results, _ = run_ranks(losses, 2, str(tmp_path), timeout=280)
    reference, _ = results["ddp"]
    assert len(reference) == STEPS and reference[-1] < reference[0]
    for kind, (found, _) in results.items():
        assert found == pytest.approx(reference, abs=2e-5), kind
    facts = {kind: effective for kind, (_, effective) in results.items()}
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


def test_a_sweep_from_its_command_line(tmp_path):
    command = [sys.executable, "-m", "deepcompile.bench.sweep", "tiny", "--frameworks", "ddp,zero3",
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
    rows = Results.load(tmp_path / "profiles")
    assert [row.failure for row in rows] == ["not installed", ""]
    log = tmp_path / "logs" / "debug_n0_llama-tiny_ddp_np2z0c0dc0E0b2seq16g1a0pALL_L1_fp32.log"
    assert "Epoch 1, Step 3, Loss:" in log.read_text()
    assert (tmp_path / "profiles" / "result.txt").read_text().count("iteration time:") == 1
