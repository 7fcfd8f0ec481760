# SPDX-License-Identifier: Apache-2.0
"""Inductor regions: numerics, disk cache, locks."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import pytest
import torch
from reference_runner import Compiled, compare
from torch import nn
from torch._inductor.exc import CppCompileError
from torch._inductor.runtime.cache_dir_utils import cache_dir

from deepcompile.capture import cache_folder
from deepcompile.capture import compile as regions
from deepcompile.errors import UserError

X = torch.linspace(-1, 1, 8 * 16).reshape(8, 16)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(6)])
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x):
        for layer in self.layers:
            x = torch.nn.functional.gelu(layer(x))
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return (x - self.mean).pow(2).sum() + x.mean()


def run(model):
    return model(X)


def test_inductor_numerics_and_disk_cache(tmp_path):
    known = Path(cache_dir()) / "deepcompile-vector-checks"  # half a minute, in a new cache
    if known.is_dir():
        shutil.copytree(known, tmp_path / known.name)
    options = {"backend": "inductor", "cache_dir": str(tmp_path), "compile_threads": 1}
    first = compare(Mlp, run, tol=1e-5, **options).graphs[0]
    n = first.distinct_regions
    assert first.cache["disk_misses"] == n > 2 and first.cache["disk_hits"] == 0
    assert first.cache["reused"] > 0
    # As at the second start of a job: every region comes from disk.
    second = compare(Mlp, run, tol=1e-5, **options).graphs[0]
    assert second.cache["disk_hits"] == n and second.cache["disk_misses"] == 0
    assert (tmp_path / "deepcompile-locks").is_dir()

    # A region that another process holds is waited for, and named if that takes too long.
    locks = [
        filelock.FileLock(str(p), thread_local=False)
        for p in (tmp_path / "deepcompile-locks").iterdir()
    ]
    held = locks[0]
    held.acquire()
    timer = threading.Timer(1.0, held.release)
    timer.start()
    third = Compiled(Mlp(), **options)
    third(X)
    assert third.graphs[0].cache["disk_hits"] == n


@pytest.mark.parametrize("host", ["python", "cpp"])
def test_the_host_of_regions_is_inductors_wrapper(host, monkeypatch):
    # What comes of it is compared in tests/gpu: here C++ takes half a minute to compile.
    seen = []

    def compile_region(gm, examples, **settings):
        seen.append((settings["cpp_wrapper"], regions.inductor_config.cpp_wrapper))
        return regions._eager(gm)

    monkeypatch.setattr(regions, "compile_fx_inner", compile_region)
    compiled = Compiled(nn.Linear(16, 16), backend="inductor", region_host=host)
    torch.testing.assert_close(compiled(X).shape, X.shape)
    assert set(seen) == {(host == "cpp", host == "cpp")}
    assert not regions.inductor_config.cpp_wrapper  # the process's own setting stays


def test_a_lock_that_is_never_released_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(regions, "LOCK_TIMEOUT_S", 0.2)
    pending = regions._Pending(0, "key", "fwd0.3", lambda: None, False, ())
    path = str(tmp_path / "key.lock")
    with filelock.FileLock(path), pytest.raises(UserError, match=r"\[capture\] fwd0.3.*key.lock"):
        with regions._acquire(pending, filelock.FileLock(path)):
            pass


def test_inductor_failures_name_the_region(monkeypatch, tmp_path):
    def failing(*args, **kwargs):
        raise RuntimeError("no kernel\nlong story")

    monkeypatch.setattr(regions, "compile_fx_inner", failing)
    compiled = Compiled(Mlp(), backend="inductor", cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"\[capture\] fwd0.0: .*RuntimeError: no kernel\. Call"):
        compiled(X)


def test_a_compilers_error_is_said_with_its_first_line():
    error = CppCompileError(["g++", "x.cpp"], "x.cpp: In f:\nx.cpp:3:9: error: no AVX\nx: error: y")
    assert regions._cause(error) == "C++ compile error: x.cpp:3:9: error: no AVX"
    assert regions._cause(RuntimeError()) == ""


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    compiled = Compiled(Mlp(), backend="inductor", cache_dir=str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match=r"\[capture\] .*below: Inductor's cache cannot be written"):
        compiled(X)
    with pytest.raises(UserError, match=r"TORCHINDUCTOR_CACHE_DIR=/dev/null/x: cannot be written"):
        cache_folder.check("/dev/null/x")
    there = tmp_path / "new" / "one"
    cache_folder.check(str(there))
    assert there.is_dir()


def run_python(code: str, *flags: str, **variables: str) -> str:
    """The last line of what it says on stderr."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables,
        timeout=200,
        check=False,
    )
    return (done.stderr.strip().splitlines() or [""])[-1]


def test_what_torch_needs_of_its_process_is_said_before_dynamo_fails():
    said = run_python("import deepcompile.capture", TORCHINDUCTOR_CACHE_DIR="/dev/null/x")
    assert said.startswith("deepcompile._core.UserError: [capture] TORCHINDUCTOR_CACHE_DIR=/dev/nu")
    said = run_python(
        "from deepcompile.capture import compile\n"
        "compile.RegionCompiler(compile.CaptureOptions(backend='eager'))",
        "-O",
    )
    assert said.startswith("deepcompile._core.UserError: [capture] python -O: torch.compile does")
