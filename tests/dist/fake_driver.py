# SPDX-License-Identifier: Apache-2.0
"""The stand-in for libcuda of tests/fake_cuda: built, and its hooks and counts in a process."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FAKE = ROOT / "tests" / "fake_cuda"
COMPILER = shutil.which("g++") or shutil.which("c++")


def build(folder: Path) -> str:
    library = folder / "libfake_cuda.so"
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*command, str(FAKE / "fake_cuda.cpp"), "-o", str(library)], check=True)
    return str(library)


class Fake:
    """The driver's hooks and counts in this process."""

    def __init__(self, library: str):
        self._library = ctypes.CDLL(library)

    def set(self, **hooks: int) -> None:
        for name, value in hooks.items():
            self._library.fake_cuda_set(name.encode(), value)

    def count(self, what: str) -> int:
        return self._library.fake_cuda_count(what.encode())
