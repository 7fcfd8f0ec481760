# SPDX-License-Identifier: Apache-2.0
"""A sweep's mistakes: one error with exit code 2 before anything starts, and no rows."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepcompile import budget, cli
from deepcompile.bench import beforehand, depth, one, process, suites, sweep
from deepcompile.bench.conditions import Condition
from deepcompile.bench.measure import Meter, allocator
from deepcompile.bench.options import Options
from deepcompile.bench.process import Place
from deepcompile.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TINY = Condition("llama-tiny", "fsdp", num_layers=1, seq_length=16, world=2, dtype="fp32")


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """What a command line says that starts nothing and writes nothing."""
    for name in ("MODEL", "SLURM", "NUM_NODES", "HOSTFILE", "PROFILE_DIR", "LOG_BASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NGPUS_PER_NODE", "2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(process.subprocess, "Popen", lambda *_, **__: pytest.fail("it started"))

    def run(*words: str) -> str:
        capsys.readouterr()
        try:
            code = cli.main(["bench", *words])
        except SystemExit as ended:  # argparse's way
            code = ended.code
        assert code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == ["file"]
        return error

    return run


@pytest.mark.parametrize(
    ("framework", "said"),
    [
        ("deepcompile@best", "deepcompile has no best settings"),
        ("single@best", "single has no best settings"),
        ("deepcompile/nonsense", "no variant 'nonsense'"),
        ("deepcompile/budgt=3", 'did you mean "budget"?'),
        ("deepcompile/budget=abc", "abc is not a size"),
        ("deepcompile/budget=fspd_c", 'did you mean "fsdp_c"?'),
        ("deepcompile/budget=", "budget= has no value"),
        ("fsdp_c/budget=3", "FSDP has no variant 'budget=3'"),
        ("fsdp_c/copy_engin", 'did you mean "copy_engine"?'),
        ("fsdp/overlap", "use fsdp_c"),
        ("ddp/prefetch", "ddp has no variant"),
        ("fspd", 'did you mean "fsdp"?'),
    ],
)
def test_what_a_framework_does_not_have(framework, said, refused):
    for words in (["tiny"], ["depth", "--model", "llama-tiny"]):
        error = refused(*words, "--frameworks", f"fsdp,{framework}")
        assert said in error and f"framework '{framework}'" in error


def test_what_frameworks_have():
    for text in ("fsdp_c@best/overlap", "fsdp/copy_engine", "ddp@best", "zero3@best",
                 "ds_deepcompile:prefetch@best", "deepcompile/budget=0.5", "deepcompile/name=x",
                 "deepcompile/budget=fsdp_c"):  # fmt: skip
        assert suites.parse_spec(text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--frameworks", ""], "--frameworks: give at least one name"),
        (["--models", " , "], "--models/--model: give at least one name"),
        (["--once", ""], "--once '': names"),
        (["--time-limit", "nan"], "--time-limit: 'nan' is not a number above 0"),
        (["--time-limit=-5"], "--time-limit: '-5' is not a number above 0"),
        (["--condition-limit", "0"], "--condition-limit: '0' is not a number above 0"),
        (["--timeout", "0"], "--timeout: '0' is not a number above 0"),
        (["--learning_rate", "inf"], "learning_rate inf: must not be negative, nor infinite"),
    ],
)
def test_values_that_cannot_be(words, said, refused):
    """What a variable that is not set leaves is no wish for all of a suite."""
    assert said in refused("tiny", *words)


def test_values_that_a_search_cannot_have(refused):
    for words in (["--frameworks", ""], ["--host-reserve", "1.5"], ["--host-reserve", "nan"]):
        assert f"argument {words[0]}: " in refused("depth", "--model", "llama-tiny", *words)


def test_models_that_are_not_there(refused):
    for words in (["tiny", "--models", "llama-tinny"], ["depth", "--model", "llama-tinny"]):
        assert 'did you mean "llama-tiny"?' in refused(*words)


def test_folders_that_cannot_be_written(refused):
    for words in (["tiny"], ["depth", "--model", "llama-tiny"]):
        for given in (["--result_dir", "file"], ["--result_dir", "file/below"],
                      ["--logs", "file"], ["--profile", "--profile_dir", "file",
                                           "--result_dir", "other"]):  # fmt: skip
            error = refused(*words, *given)
            assert "cannot be written (file is a file)" in error.replace(os.getcwd() + "/", "")


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_folder_of_another_user(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        beforehand.folder(tmp_path / "new" / "folder", "rows.jsonl")


def test_logs_that_cannot_be_written_later(tmp_path):
    (tmp_path / "logs").write_text("")
    with pytest.raises(UserError, match="logs/x.log: cannot be written"):
        process.run(Place(), [], tmp_path / "logs" / "x.log")
    watch = sweep.Watch([TINY], sweep.Display(0, 0, True), lambda _: None, tmp_path / "logs")
    with pytest.raises(UserError, match="cannot be written"):
        watch._enter(dataclasses.replace(TINY, seq_length=32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of hosts without GPUs")
def test_models_that_the_host_cannot_hold(refused, monkeypatch, tmp_path):
    """16 bytes of each of 15.8 billion parameters."""
    monkeypatch.setattr(budget, "host_memory", lambda: (100 << 30, 90 << 30))
    error = refused("w1")
    assert "Llama-3-70B-16L: its 15.8 B parameters take 235 GiB to train" in error
    assert "no GPU and 100 GiB" in error and "--num-layers" in error and "tiny" in error
    assert "Llama-3-8B: its 8.0 B parameters" in refused("tiny", "w3")
    big = dataclasses.replace(TINY, model="llama-3-70b", num_layers=16)
    beforehand.host_memory([TINY], Place(1, 2))
    beforehand.host_memory([big], Place(2, 2))  # other hosts, of which this one knows nothing
    beforehand.host_memory([big], Place(1, 2, slurm=True))
    assert one.main(["--backend", "fsdp", "--model", "llama-3-8b"]) == 2
    monkeypatch.setattr(budget, "host_memory", lambda: (500 << 30, 90 << 30))
    beforehand.host_memory([big], Place(1, 2))


def test_what_only_a_simulation_has(refused, monkeypatch):
    """The command that is advised is one that is taken."""
    advised = []
    for words in ("w1 --machine 4xh200 --seq-lengths=512", "acc --machine 2x-cpu --dtype bf16",
                  "cut w2 --machine=4xh200 --model llama-tiny --num-layers 2", "--machine 2x-cpu",
                  "tiny --memory-budget 1GiB --machine 4xh200"):  # fmt: skip
        error = refused(*words.split())
        advised.append(error.partition("`")[2].partition("`")[0].split())
    for command in advised:
        options = cli.build_parser().parse_args(command[1:])
        assert options.simulate and options.machine in ("4xh200", "2x-cpu")
    said = [" ".join(command) for command in advised]
    assert "--models meta-llama/Meta-Llama-3-70B-Instruct --layers 16" in said[0]
    assert "--seq 512 " in said[0] and said[1].startswith("deepcompile bench acc --simulate")
    assert "--models llama-tiny" in said[2] and "--layers 2" in said[2]


def test_help_of_clipping(capsys):
    for words, said in (
        (["tiny"], "default: 1.0; cut, w1, w2, w3: 0"),
        (["depth"], "default: 0.0"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["bench", *words, "--help"])
        assert f"no clipping; {said}" in " ".join(capsys.readouterr().out.split())


def test_one_condition_without_a_launcher_has_one_line(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    words = "--framework fsdp --model_name llama-tiny --num_layers 1 --dtype fp32"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "train" / "run_bench_lm.py", *words.split()],
        capture_output=True, text=True, timeout=240, cwd=tmp_path, env=env,
    )  # fmt: skip
    assert done.returncode == 2 and "Start it with torchrun" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_the_allocators_settings_are_in_the_row(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert allocator() == "default"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    assert allocator() == "max_split_size_mb:128"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert allocator() == "expandable_segments:True"
    meter = Meter.__new__(Meter)
    meter._device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": 3})
    assert meter.retries() == 3


def test_a_search_refuses_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    swept = sweep.Sweep([], Options(result_dir=str(tmp_path / "file")), Place(1, 2), tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        depth.Depth([depth.Search(TINY, 1, 2)], swept).run(quiet=True)
