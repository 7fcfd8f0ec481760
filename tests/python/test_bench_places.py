# SPDX-License-Identifier: Apache-2.0
"""Where a sweep's ranks run: hosts, Slurm, the commands that start them, and the scripts."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepcompile.bench import process
from deepcompile.bench.process import Place
from deepcompile.errors import UserError
from deepcompile.launch import options as launch_options

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "benchmarks" / "train"
HERE = [sys.executable, "-m", "deepcompile", "launch"]


def hostfile(path: Path, *slots: int) -> str:
    path.write_text("".join(f"node-{i} slots={n}\n" for i, n in enumerate(slots)))
    return str(path)


def test_places_and_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert process.place_from({"NGPUS_PER_NODE": "4"}) == Place(1, 4)
    assert process.place_from({"NGPUS_PER_NODE": "4", "NUM_NODES": "1"}) == Place(1, 4)
    assert "--standalone" in process.command(Place(1, 2), [])
    hosts = hostfile(tmp_path / "hosts", 4, 4, 4)
    place = process.place_from({"NUM_NODES": "2", "HOSTFILE": hosts})
    assert place == Place(2, 4, hosts) and place.world == 8
    assert process.place_from({"HOSTFILE": hosts, "NGPUS_PER_NODE": "3"}) == Place(3, 3, hosts)
    command = process.command(place, ["--job", "{}"])
    assert command == [*HERE, "--hostfile", hosts, "--num-nodes", "2", "--nproc-per-node", "4",
                       "-m", "deepcompile.bench.worker", "--job", "{}"]  # fmt: skip
    hostfile(tmp_path / "hostfile_n2", 8, 8)
    more = {"NUM_NODES": "2", "LAUNCH_ARGS": "--ssh-args='-i key' --ssh-port 22"}
    place = process.place_from(more)
    assert place == Place(2, 8, "hostfile_n2", False, ("--ssh-args=-i key", "--ssh-port", "22"))
    at = process.command(place, []).index("--ssh-args=-i key")
    assert process.command(place, [])[at + 3] == "-m"
    no_gpu = "no GPU, and it decides for all" in capsys.readouterr().err
    assert no_gpu is not torch.cuda.is_available()


def test_places_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hosts = hostfile(tmp_path / "hosts", 8, 4)
    for given, said in (
        ({"NUM_NODES": "0"}, "NUM_NODES=0: must be a positive integer"),
        ({"NGPUS_PER_NODE": "all"}, "NGPUS_PER_NODE=all: must be"),
        ({"NUM_NODES": "2"}, "no hostfile hostfile_n2. Write one"),
        ({"NUM_NODES": "3", "HOSTFILE": hosts}, "2 nodes of .* can take part"),
        ({"HOSTFILE": hosts}, "Set NGPUS_PER_NODE to 4 or fewer"),
        ({"HOSTFILE": hosts, "NGPUS_PER_NODE": "8"}, "hosts of 4 slots"),
        ({"SLURM": "yes"}, "SLURM=yes: must be 1 or 0"),
        ({"SLURM": "1"}, "SLURM_JOB_NODELIST is not set"),
        ({"SLURM": "1", "SLURM_JOB_NODELIST": "n0", "PATH": "/no"}, "Set NGPUS_PER_NODE"),
        ({"LAUNCH_ARGS": "'", "NGPUS_PER_NODE": "1"}, "LAUNCH_ARGS"),
    ):
        with pytest.raises(UserError, match=said):
            process.place_from(given)


def test_a_slurm_allocation():
    given = {"SLURM": "1", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_GPUS_ON_NODE": "8", "PATH": "/no"}
    place = process.place_from(given)
    assert place == Place(4, 8, slurm=True)
    worker = ["-m", "deepcompile.bench.worker", "--job", "{}"]
    assert process.command(place, ["--job", "{}"]) == [
        *HERE, "--slurm", "--num-nodes", "4", "--nproc-per-node", "8", *worker
    ]  # fmt: skip
    one = process.place_from({**given, "NUM_NODES": "1", "NGPUS_PER_NODE": "2",
                              "LAUNCH_ARGS": "--srun-args=--mem=0"})  # fmt: skip
    assert one == Place(1, 2, slurm=True, launcher=("--srun-args=--mem=0",))
    request = launch_options.parse(process.command(one, ["--job", "{}"])[4:])
    assert request.slurm and request.num_nodes == 1 and request.srun_args == "--mem=0"
    assert request.torchrun == worker


def test_the_launcher_takes_the_command():
    hosts = SCRIPTS / "hostfile_n4"
    command = process.command(Place(4, 8, str(hosts)), ["--job", '{"conditions": []}'])
    request = launch_options.parse(command[4:])
    assert request.num_nodes == 4 and request.hostfile == str(hosts)
    assert request.torchrun[-2:] == ["--job", '{"conditions": []}']


# ---- scripts


def script(tmp_path, name: str, *words: str, **env: str) -> subprocess.CompletedProcess:
    """A script with a Python that says what it was to run."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho RUN $PROFILE_DIR $LOG_BASE $HOSTFILE "$@"\n')
    python.chmod(0o755)
    unset = ("PROFILE_DIR", "LOG_BASE", "HOSTFILE", "NUM_NODES", "MODEL")
    kept = {k: v for k, v in os.environ.items() if k not in unset}
    return subprocess.run(
        [SCRIPTS / name, *words], capture_output=True, text=True, timeout=60, cwd=tmp_path,
        env={**kept, "PYTHON": str(python), **env},
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(p.name for p in SCRIPTS.glob("run*.sh")))
def test_scripts_explain_themselves(name, tmp_path):
    done = script(tmp_path, name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"benchmarks/train/{name}" in done.stdout and "NGPUS_PER_NODE" in done.stdout
    assert "SPDX" not in done.stdout and "--help" in done.stdout


def test_scripts_run_their_suites(tmp_path):
    def ran(name: str, *words: str, **env: str) -> str:
        return script(tmp_path, name, *words, **env).stdout.splitlines()[-1]

    assert ran("run_bench.sh", "--force") == "RUN -m deepcompile.bench.sweep bench --force"
    assert ran("run_bench_acc.sh") == "RUN profile_acc -m deepcompile.bench.sweep acc"
    assert ran("run_bench_z1.sh", NUM_LAYERS="-4").endswith("sweep z1 --num-layers=-4")
    assert ran("run_bench_offload.sh") == (
        "RUN profile_offload logs_offload -m deepcompile.bench.sweep offload"
    )
    assert ran("run.sh", "--compile").endswith("-m deepcompile.bench.one --compile")


def test_scripts_on_several_hosts(tmp_path):
    def ran(name: str, *words: str, **env: str) -> str:
        done = script(tmp_path, name, *words, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1].replace("-m deepcompile.bench.", "")

    hosts = str(SCRIPTS / "hostfile_n4")
    for name, said in (("run_bench.sh", "sweep bench"), ("run_bench_acc.sh", "sweep acc"),
                       ("run_bench_z1.sh", "sweep z1"), ("run.sh", "one")):  # fmt: skip
        assert ran(name, NUM_NODES="4").endswith(f" {hosts} {said}"), name
        assert ran(name, NUM_NODES="4", HOSTFILE="mine").endswith(f" mine {said}")
        assert hosts not in ran(name)
    # The seed's command line is one condition; a suite is a sweep.
    seeds = ("--backend", "fsdp", "--model", "llama-tiny")
    assert ran("run_multinode.sh", *seeds, NUM_NODES="4") == f"RUN {hosts} one {' '.join(seeds)}"
    assert ran("run_multinode.sh", *seeds, NUM_NODES="1") == f"RUN one {' '.join(seeds)}"
    assert ran("run_multinode.sh") == "RUN one"
    assert ran("run_multinode.sh", "run.sh", "--eager") == "RUN one --eager"
    assert ran("run_multinode.sh", "acc", "--force", NUM_NODES="4") == (
        f"RUN {hosts} sweep acc --force"
    )
    hostfile(tmp_path / "hostfile_n4", 8, 8, 8, 8)  # one in this folder comes first: Python's
    assert ran("run_bench.sh", NUM_NODES="4") == "RUN sweep bench"


def test_make_bench_has_an_end_and_draws_all_that_is_known():
    """25 minutes, of which stopping and drawing take the last; its folder may have blanks."""
    done = subprocess.run(
        ["make", "-n", "-C", str(ROOT), "bench", "SKIP_INSTALL=1", "PYTHON=python3", "BENCH=a b"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    limit = int(done.stdout.partition("--time-limit ")[2].split()[0])
    assert limit + process.GRACE_S + 60 < 25 * 60
    (plot,) = [line for line in done.stdout.splitlines() if "deepcompile plot" in line]
    assert shlex.split(plot.split("||")[0])[-2:] == ["--result_dir", "a b"]
    assert '--logs "a b/logs"' in done.stdout and '--result_dir "a b" ' in done.stdout
