# SPDX-License-Identifier: Apache-2.0
"""Allocations on the CPU that fail as a full device's do (tests/fake_memory)."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

from fake_driver import COMPILER, ROOT

SOURCE = ROOT / "tests" / "fake_memory" / "failing_allocator.cpp"


def build(folder: Path) -> str:
    import torch
    from torch.utils.cpp_extension import include_paths

    library = folder / "libfailing_allocator.so"
    torch_libraries = Path(torch.__file__).parent / "lib"
    command = [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(library)]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-isystem{path}" for path in include_paths()]
    command += [f"-L{torch_libraries}", "-lc10", f"-Wl,-rpath,{torch_libraries}"]
    subprocess.run(command, check=True)
    return str(library)


class FailingMemory:
    """Which allocations of this thread fail, from the first object of a process on."""

    def __init__(self, library: str):
        self._library = ctypes.CDLL(library)
        self._library.fail_allocations.argtypes = [ctypes.c_int64] * 3
        self._library.failed_allocations.restype = ctypes.c_int64

    def fail(self, bytes: int = 0, after: int = 0, count: int = 1) -> None:
        """Of the allocations of so many `bytes` (0: of all), `after` succeed, then `count` fail."""
        self._library.fail_allocations(bytes, after, count)

    def stop(self) -> int:
        """None fails any more. How many did."""
        failed = self._library.failed_allocations()
        self._library.fail_allocations(0, 0, 0)
        return failed
