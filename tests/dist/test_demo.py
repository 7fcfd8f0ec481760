# SPDX-License-Identifier: Apache-2.0
"""The demo, shortened: it learns, reports, and goes on after a restart with the same losses."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SIZE = "--layers 2 --hidden 64 --sequence 64 --sample-bytes 24 --save-every 12".split()

pytestmark = pytest.mark.timeout(900)


def run_demo(out: Path, *arguments: str, ranks: int = 2) -> str:
    """Start the demo as a user would; its output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "examples/demo/train.py", "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *SIZE, *arguments], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert "No CUDA runtime" not in done.stderr, "a warning in each process, of no use here"
    return done.stdout


def test_quick_start_learns():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--nproc-per-node=2", "examples/quick_start.py"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    losses = [float(value) for value in re.findall(r"step \d+: loss ([\d.]+)", done.stdout)]
    assert len(losses) == 5
    assert losses[-1] < losses[0] / 2


def history_of(out: Path) -> dict:
    return json.loads((out / "history.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 24 steps and what it printed."""
    out = tmp_path_factory.mktemp("whole")
    return out, run_demo(out, "--steps", "24")


def test_demo_learns_and_says_so(whole):
    out, printed = whole
    losses = [row["loss"] for row in history_of(out)["loss"]]
    assert len(losses) == 24
    assert 5.3 < losses[0] < 5.8
    assert losses[-1] < losses[0] - 1.5
    held = [row["loss"] for row in history_of(out)["validation"]]
    assert held[-1] < held[0] - 1.5
    for said in ("validation loss", "tokens/s", "Before training", "After 24 steps", "report.html"):
        assert said in printed


def test_demo_ends_with_commands_that_work(whole):
    out, printed = whole
    (resume,) = re.findall(r"\] resume    (.*)", printed)
    assert shlex.split(resume)[1:] == [
        *("--nproc-per-node", "2", "examples/demo/train.py", "--out", str(out), *SIZE),
        *("--resume", "--steps", "48"),
    ]
    (why,) = re.findall(r"\] why       (.*)", printed)
    command, *words = shlex.split(why)
    assert command.endswith("deepcompile") and words == ["explain", str(out / "plan.txt")]
    done = subprocess.run(
        [sys.executable, "-m", "deepcompile.cli", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "plan.run.json" in done.stdout and "why: chosen: " in done.stdout
    assert "why: kept " in done.stdout and " instead: " in done.stdout


def test_demo_report_holds_the_run(whole):
    out, _ = whole
    page = (out / "report.html").read_text(encoding="utf-8")
    for heading in ("Loss", "One step", "Memory over the step", "Predicted and measured"):
        assert f"<h2>{heading}</h2>" in page
    more = "Compile time", "Why it is so", "What the next best would have cost", "The plan"
    for heading in more:
        assert f"<h2>{heading}</h2>" in page
    charts = json.loads(re.search(r'id="charts">(.*?)</script>', page, re.S).group(1))
    assert len(charts["loss"]) == 24
    for side in ("predicted", "measured"):
        resources = {item["resource"] for item in charts["timeline"][side]}
        assert {"compute", "link"} <= resources
        assert max(item["end_ns"] for item in charts["timeline"][side]) > 0
    assert charts["memory"]["predicted"]
    trace = json.loads((out / "trace.json").read_text())
    assert len(trace["traceEvents"]) > 10


def test_demo_resumes_with_the_same_losses(whole, tmp_path):
    straight = [row["loss"] for row in history_of(whole[0])["loss"]]
    kept = tmp_path / "checkpoints"  # as if the run had ended there
    shutil.copytree(whole[0] / "checkpoints" / "step12", kept / "step12")
    (kept / "latest").write_text("step12")
    printed = run_demo(tmp_path, "--steps", "24", "--resume")
    assert "resumed after step 12" in printed
    resumed = [row["loss"] for row in history_of(tmp_path)["loss"]]
    assert resumed == straight
