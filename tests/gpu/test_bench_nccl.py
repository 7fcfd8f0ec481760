# SPDX-License-Identifier: Apache-2.0
"""The benchmark's peers on real GPUs: the same losses in bf16, memory that is measured, lengths
that share a process. Skipped where there are fewer than two GPUs."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
from worlds import TWO_GPUS

from deepcompile.bench import peers, suites
from deepcompile.bench.results import Results

pytestmark = [
    TWO_GPUS,
    pytest.mark.timeout(900),
]
FRAMEWORKS = ("fsdp", "fsdp_c", "fsdp_c@best", "fsdp_c/overlap", "fsdp_c/prefetch", "fsdp+offload",
              "fsdp_c/copy_engine", "ddp", "deepcompile")  # fmt: skip
LENGTHS = (64, 128)


def test_peers_train_the_same_and_lengths_share_a_process(tmp_path):
    words = [",".join(FRAMEWORKS), ",".join(str(n) for n in LENGTHS)]
    command = [sys.executable, "-m", "deepcompile.bench.sweep", "tiny", "--frameworks", words[0],
               "--seq-lengths", words[1], "--learning_rate", "1e-3", "--warmup_step", "6",
               "--bench_step", "12"]  # fmt: skip
    env = {**os.environ, "NGPUS_PER_NODE": "2", "OMP_NUM_THREADS": "4"}
    env.pop("PROFILE_DIR", None)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = Results.load(tmp_path / "profiles")
    tiny = dataclasses.replace(
        suites.SUITES["tiny"], frameworks=FRAMEWORKS, seq_lengths=LENGTHS[:1]
    )
    found = suites.conditions(tiny, 2, 1, "bf16")
    reference = rows.find(next(c for c in found if c.framework == "ddp"))
    for condition in found:
        row = rows.find(condition)
        if peers.why_not(condition):
            assert row.failure == "not installed"
            continue
        assert row.ok, row.error
        assert row.machine["kind"] == "cuda" and row.versions["nccl"]
        assert 0 < row.alloc_bytes <= row.peak_bytes
        assert row.in_a_row > 0, condition.label
        assert min(row.effective["device_bytes_of_ranks"]) >= row.peak_bytes
        # The first length's losses: the second goes on with the same model.
        assert row.losses == pytest.approx(reference.losses, abs=0.02), condition.label
    engine = rows.find(next(c for c in found if c.ours))
    assert engine.effective["plan_passes"] == ["auto"]
    assert len([r for r in rows if r.ok]) >= 2 * (len(found) - 1)
