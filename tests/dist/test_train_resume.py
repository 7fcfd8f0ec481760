# SPDX-License-Identifier: Apache-2.0
"""Resuming from checkpoints: on the same and on another number of ranks, and after a crash."""

from __future__ import annotations

import os
from pathlib import Path

import cases
import numpy as np
import pytest
from ranks import RankError, run_ranks

TOLERANCE = 1e-5
HALF = cases.STEPS // 2
BACKENDS = {"llama_tied": "eager", "frozen": None, "sequential": None}
NAMES = list(BACKENDS)
STEP_LR = {"type": "StepLR", "params": {"step_size": 5, "gamma": 0.5}}

pytestmark = pytest.mark.timeout(600)


def _config(world: int, stage: int = 3) -> dict:
    return cases.config_for(world, stage, scheduler=STEP_LR, gradient_clipping=0.5)


def _save_half(rank: int, world: int, folder: str, names: list[str]) -> list[dict]:
    """Train half, save, go on to the end: what a resumed run must equal."""
    results = []
    for name in names:
        engine = cases.start(name, _config(world), BACKENDS[name])
        first = cases.train_steps(engine, 0, HALF)
        engine.save_checkpoint(f"{folder}/{name}", client_state={"epoch": 3, "who": name})
        second = cases.train_steps(engine, HALF, cases.STEPS)
        results.append(cases.result_of(engine, first[0] + second[0], first[1] + second[1]))
    return results


def _resume(rank: int, world: int, folder: str, names: list[str], stage: int, same: bool) -> list:
    """Go on from the middle; `same`: compiled or not as the saving run was."""
    results = []
    for name in names:
        engine = cases.start(name, _config(world, stage), BACKENDS[name] if same else None)
        path, client = engine.load_checkpoint(f"{folder}/{name}")
        assert path.endswith(f"global_step{HALF}") and client == {"epoch": 3, "who": name}
        assert engine.global_steps == HALF
        assert engine.get_lr() == [pytest.approx(cases.ADAMW["lr"] * 0.25)]
        losses, norms = cases.train_steps(engine, HALF, cases.STEPS)
        results.append(cases.result_of(engine, losses, norms))
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of checkpoints made half-way by 2 ranks, and their runs to the end."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    return folder, run_ranks(_save_half, 2, folder, NAMES, timeout=300)[0]


def test_saving_run_equals_pytorch(saved):
    for name, whole in zip(NAMES, saved[1], strict=True):
        expected = cases.reference(name, clip=0.5, schedule=True)
        assert cases.worst(whole, expected) < TOLERANCE


def test_same_ranks_go_on_with_the_same_bits(saved):
    folder, runs = saved
    for whole, resumed in zip(
        runs, run_ranks(_resume, 2, folder, NAMES, 3, True, timeout=300)[0], strict=True
    ):
        assert resumed["losses"] == whole["losses"][HALF:]
        assert resumed["norms"] == whole["norms"][HALF:]
        for key, value in whole["state"].items():
            assert np.array_equal(value, resumed["state"][key]), key


@pytest.mark.parametrize(("world", "stage"), [(1, 3), (4, 3), (2, 0)])
def test_other_ranks_stages_and_modes_go_on(saved, world, stage):
    folder, runs = saved
    resumed = run_ranks(_resume, world, folder, NAMES, stage, False, timeout=400)[0]
    for whole, result in zip(runs, resumed, strict=True):
        expected = {"losses": whole["losses"][HALF:], "state": whole["state"]}
        assert cases.worst(result, expected) < TOLERANCE


def _wrong_batch(rank: int, world: int, folder: str) -> str:
    """A job whose steps see half the samples that the checkpoint's saw."""
    import deepcompile

    config = _config(world) | {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1}
    engine = cases.start("sequential", config, None)
    try:
        engine.load_checkpoint(folder)
    except deepcompile.UserError as error:
        engine.load_checkpoint(folder, strict_batch=False)
        assert engine.global_steps == HALF
        return str(error)
    return "no error"


def test_other_batch_size_is_an_error_unless_allowed(saved):
    for said in run_ranks(_wrong_batch, 2, f"{saved[0]}/sequential", timeout=120):
        assert "saved with train_batch_size 4 (2 x 1 accumulation x 2 ranks)" in said
        assert "this job has train_batch_size 2 (1 x 1 accumulation x 2 ranks)" in said


def _die_while_saving(rank: int, world: int, folder: str, when: str) -> None:
    """Save a good checkpoint, then lose rank 0 in the middle of the next: before it is written,
    before `latest` points at it, or between the renames that put it in the good one's place."""
    from deepcompile import checkpoint

    engine = cases.start("sequential", _config(world), None)
    cases.train_steps(engine, 0, 1)
    engine.save_checkpoint(folder, tag="good")
    cases.train_steps(engine, 1, 2)
    rename = Path.rename

    def die_before_last(path: Path, target: Path) -> Path:
        return os._exit(9) if path.name == "good.tmp" else rename(path, target)

    if rank == 0 and when == "writing":
        checkpoint.dcp.save = lambda *args, **kwargs: os._exit(9)
    elif rank == 0 and when == "pointing":
        checkpoint.os.replace = lambda *args: os._exit(9)
    elif rank == 0:
        Path.rename = die_before_last
    engine.save_checkpoint(folder, tag="good" if when == "replacing" else "next")


def _load_good(rank: int, world: int, folder: str) -> tuple:
    engine = cases.start("sequential", _config(world), None)
    path, _ = engine.load_checkpoint(folder)
    return os.path.basename(path), engine.global_steps


@pytest.mark.parametrize(
    ("when", "left"), [("writing", "good"), ("pointing", "good"), ("replacing", "good.old")]
)
def test_a_save_that_dies_leaves_the_last_one(tmp_path, when, left):
    with pytest.raises(RankError, match="rank 0 ended with code 9"):
        run_ranks(_die_while_saving, 2, str(tmp_path), when, timeout=60)
    for loaded in run_ranks(_load_good, 2, str(tmp_path), timeout=60):
        assert loaded == (left, 1)
