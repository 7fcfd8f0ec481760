# SPDX-License-Identifier: Apache-2.0
"""`deepcompile launch --hostfile` on two nodes: networks of their own, joined by ssh."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from two_nodes import NoServer, TwoNodes, why_not, with_stand_in

from deepcompile.bench.results import Results

SCRIPT = str(Path(__file__).parent / "two_nodes_rank.py")
RUN_MULTINODE = Path(__file__).parents[2] / "benchmarks" / "train" / "run_multinode.sh"
START_S = 60
"""How long four ranks may take to start, in seconds."""
END_S = 40

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory):
    reason = why_not()
    if reason:
        pytest.skip(reason)
    try:
        made = TwoNodes(tmp_path_factory.mktemp("nodes"))
    except NoServer as error:
        pytest.skip(str(error))
    yield made
    made.close()


def wait_for_ranks(job: subprocess.Popen, folder: Path) -> None:
    deadline = time.monotonic() + START_S
    while len(list(folder.glob("rank*.pid"))) < 4:
        if job.poll() is not None or time.monotonic() > deadline:
            job.kill()
            pytest.fail("the ranks did not start: " + "".join(job.communicate()))
        time.sleep(0.05)


def test_four_ranks_on_two_nodes_train_as_pytorch(nodes: TwoNodes, tmp_path: Path):
    logs = tmp_path / "logs"
    with nodes.launch(
        "--log-dir", str(logs), "--env", "GREETING=it's \"$HOME\"; two words", "--workdir",
        str(tmp_path), SCRIPT, "train", str(tmp_path),
    ) as job:  # fmt: skip
        out, err = job.communicate(timeout=START_S + END_S)
    assert job.returncode == 0, out + err + (logs / "node-1.log").read_text()
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert [(r["node"], r["local"]) for r in ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(r["world"] == 4 and r["sum"] == 1111.0 for r in ranks)
    networks = [r["network"] for r in ranks]
    assert networks[0] == networks[1] != networks[2] == networks[3]
    assert all(r["losses"] == ranks[0]["losses"] for r in ranks)
    assert ranks[0]["worst"] < 1e-5
    assert {r["folder"] for r in ranks} == {str(tmp_path)}
    assert {r["greeting"] for r in ranks} == {'it\'s "$HOME"; two words'}
    assert "rank 0 of 4 is done" in out and "rank 2" not in out
    assert "rank 2 of 4 is done" in (logs / "node-1.log").read_text()
    assert "rank 0 of 4 is done" in (logs / "node-0.log").read_text()
    assert nodes.left(5) == []


def test_a_rank_that_dies_ends_the_other_node(nodes: TwoNodes, tmp_path: Path):
    with nodes.launch(SCRIPT, "die", str(tmp_path)) as job:
        out, err = job.communicate(timeout=START_S + END_S)
    assert job.returncode == 1, out + err
    assert "node-1 ended with exit code 1; ending all nodes" in err
    assert err.splitlines()[-1] == "deepcompile launch: node-1 ended with exit code 1"
    assert "[node-1] rank 2 waits" in out and "\nrank 0 waits" in f"\n{out}"
    assert "[node-1]" in err and "exitcode  : 7" in err, "torchrun's own account of it"
    assert nodes.left(2) == []


def test_one_condition_of_the_benchmark_on_two_nodes(nodes: TwoNodes, tmp_path: Path):
    """With a rank on each, by the script and its variables alone."""
    unset = ("PROFILE_DIR", "LOG_BASE", "MODEL", "NUM_LAYERS", "NGPUS_PER_NODE", "SLURM")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    variables = {
        "PYTHON": sys.executable,
        "NUM_NODES": "2",
        "HOSTFILE": nodes.hostfile(slots=1),
        "LAUNCH_ARGS": shlex.join([*nodes.launcher, "--env", "CUDA_VISIBLE_DEVICES="]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    words = "tiny --frameworks fsdp --seq-lengths 32"
    words += " --num-layers 1 --backend eager --dtype fp32 --bench_step 2 --warmup_step 1"
    with nodes.start(
        str(RUN_MULTINODE), *words.split(), "--result_dir", "rows",
        cwd=tmp_path, env={**kept, **variables},
    ) as job:  # fmt: skip
        out, err = job.communicate(timeout=START_S + END_S)
    logs = "".join(path.read_text() for path in (tmp_path / "logs").glob("*.log"))
    assert job.returncode == 0, out + err + logs
    (row,) = Results.load(tmp_path / "rows").rows
    assert (row.condition.nodes, row.condition.world, row.ok) == (2, 2, True)
    assert len(row.times) == 2 and all(len(times) == 1 for times in row.times)
    assert nodes.left(5) == []


@pytest.fixture
def quick(tmp_path: Path) -> dict[str, str]:
    return with_stand_in(tmp_path)


def test_a_host_that_cannot_be_reached_is_named(nodes: TwoNodes, tmp_path: Path, quick):
    with nodes.launch(SCRIPT, "wait", str(tmp_path), nodes=3, env=quick) as job:
        out, err = job.communicate(timeout=START_S + END_S)
    assert job.returncode == 2, out + err
    last = err.splitlines()[-1]
    assert last.startswith("deepcompile: error: [launch] node-2: cannot be reached over ssh: ")
    assert nodes.left(2) == []


def test_ctrl_c_ends_all_ranks(nodes: TwoNodes, tmp_path: Path):
    with nodes.launch(SCRIPT, "wait", str(tmp_path)) as job:
        wait_for_ranks(job, tmp_path)
        job.send_signal(signal.SIGINT)
        _, err = job.communicate(timeout=END_S)
    assert job.returncode == 130 and "ended by SIGINT; ending all nodes" in err
    assert nodes.left(2) == []


def test_a_launcher_that_is_killed_leaves_no_ranks(nodes: TwoNodes, tmp_path: Path, quick):
    """It can do nothing any more: the nodes notice."""
    with nodes.launch(SCRIPT, "wait", str(tmp_path), env=quick) as job:
        wait_for_ranks(job, tmp_path)
        job.kill()
        job.communicate(timeout=END_S)
    assert nodes.left(END_S) == []
