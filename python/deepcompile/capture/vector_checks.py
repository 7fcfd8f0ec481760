# SPDX-License-Identifier: Apache-2.0
"""Which vector instructions Inductor may use on this CPU, asked once a machine.

In every process it builds up to ten small libraries, or finds them in its cache, and loads each in
a Python of its own that imports torch: 18 s for a rank on two cores, rank after rank. What passed
once is written down here, in the cache's folder.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import filelock
from torch._inductor import cpu_vec_isa
from torch._inductor.runtime.cache_dir_utils import cache_dir

_NEEDED = ("VecISA", "x86_isa_checker", "_get_isa_dry_compile_fingerprint")


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """While it is entered, a check that passed in this cache's folder, with this torch, compiler
    and CPU, is not made again. Where torch has no such checks, nothing changes."""
    if not all(hasattr(cpu_vec_isa, name) for name in _NEEDED):
        yield
        return
    make = cpu_vec_isa.VecISA.check_build

    def check_build(isa: cpu_vec_isa.VecISA, code: str) -> bool:
        made_with = cpu_vec_isa._get_isa_dry_compile_fingerprint(isa._arch_flags)
        key = "\n".join([code, made_with, *cpu_vec_isa.x86_isa_checker()])
        folder = Path(cache_dir()) / "deepcompile-vector-checks"
        folder.mkdir(parents=True, exist_ok=True)
        passed = folder / hashlib.sha256(key.encode()).hexdigest()
        with filelock.FileLock(f"{passed}.lock"):
            if not passed.exists():
                if not make(isa, code):
                    return False  # of whatever reason: asked again next time
                passed.touch()
        return True

    cpu_vec_isa.VecISA.check_build = check_build
    try:
        yield
    finally:
        cpu_vec_isa.VecISA.check_build = make
