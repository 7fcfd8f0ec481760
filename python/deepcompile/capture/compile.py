# SPDX-License-Identifier: Apache-2.0
"""Compile each distinct region once.

With Inductor, the ranks of one machine share its disk cache: a file lock per
region lets one of them compile while the others take the next region, rank r
starting at the r-th; what another rank compiled is then read from disk. (Code
is specific to a device number, so ranks share it where each sees its
accelerator under the same number, as CPU ranks do.)
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
import torch._inductor.config as inductor_config
from torch import fx
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.virtualized import V

from deepcompile.capture import vector_checks
from deepcompile.capture.graph import BoxedCode, CaptureOptions
from deepcompile.errors import UserError

LOCK_TIMEOUT_S = 1800.0
"""Longest wait for another process to compile one region."""
_LONGEST_CAUSE = 300
"""Characters of a compiler's error."""
_CACHE_COUNTERS = {
    "disk_hits": "fxgraph_cache_hit",
    "disk_misses": "fxgraph_cache_miss",
    "disk_bypassed": "fxgraph_cache_bypass",
}


@dataclass
class _Pending:
    code: int
    key: str
    region: str
    build: Callable[[], fx.GraphModule]
    is_backward: bool
    static_inputs: tuple[int, ...]


class RegionCompiler:
    """The compiled functions of one backend: ``codes``, indexed by code id."""

    def __init__(self, options: CaptureOptions):
        _check_interpreter()
        _check_options(options)
        self.options = options
        self.codes: list[BoxedCode] = []
        self._ids: dict[tuple[str, bool], int] = {}
        self._pending: list[_Pending] = []

    def add(
        self,
        key: str,
        region: str,
        build: Callable[[], fx.GraphModule],
        is_backward: bool,
        static_inputs: tuple[int, ...],
    ) -> tuple[int, bool]:
        """(code id, whether it is new) of the computation ``key``; compiled by the next
        ``compile``."""
        ident = (key, is_backward)
        if ident in self._ids:
            return self._ids[ident], False
        code = self._ids[ident] = len(self._ids)
        self._pending.append(_Pending(code, key, region, build, is_backward, static_inputs))
        return code, True

    def compile(self, fake_mode: Any) -> dict[str, int]:
        """Compile what was added since the last call. Returns counts of the disk cache's use."""
        pending, self._pending = self._pending, []
        self.codes.extend([_missing] * (len(self._ids) - len(self.codes)))
        if self.options.backend == "inductor":
            return self._compile_inductor(pending, fake_mode)
        if self.options.backend == "eager":
            for item in pending:
                self.codes[item.code] = _eager(item.build())
        return dict.fromkeys(_CACHE_COUNTERS, 0)

    def _compile_inductor(self, pending: list[_Pending], fake_mode: Any) -> dict[str, int]:
        before = Counter(counters["inductor"])
        first = _rank() % len(pending) if pending else 0
        with _inductor_settings(self.options):
            locks = _lock_folder()
            busy = []
            for item in pending[first:] + pending[:first]:
                lock = filelock.FileLock(str(locks / f"{item.key}.lock"))
                try:
                    with lock.acquire(timeout=0):
                        self.codes[item.code] = _inductor(item, fake_mode)
                except filelock.Timeout:
                    busy.append((item, lock))
            for item, lock in busy:
                with _acquire(item, lock):
                    self.codes[item.code] = _inductor(item, fake_mode)
        now = counters["inductor"]
        return {name: now[c] - before[c] for name, c in _CACHE_COUNTERS.items()}


def _check_interpreter() -> None:
    """Dynamo compiles an assert statement to know its bytecode, and fails where Python leaves
    them out."""
    try:
        from torch._dynamo.symbolic_convert import get_assert_bytecode_sequence

        get_assert_bytecode_sequence(False)
    except (ImportError, TypeError):  # of another torch, which may do without
        return
    except StopIteration:
        raise UserError(
            "[capture] python -O: torch.compile does not work without assert statements. Start "
            "Python without -O and unset PYTHONOPTIMIZE, or train without engine.compile()."
        ) from None


def _check_options(options: CaptureOptions) -> None:
    known = ("inductor", "eager", "none")
    if options.backend not in known:
        raise UserError(
            f"[capture] backend {options.backend!r}: unknown. Use one of {', '.join(known)}."
        )
    if options.region_host not in ("python", "cpp"):
        raise UserError(
            f"[capture] region_host {options.region_host!r}: unknown. Use python or cpp."
        )
    if options.region_bytes <= 0:
        raise UserError(
            f"[capture] region_bytes {options.region_bytes}: must be positive. Give the bytes of "
            "parameters a region may read."
        )
    unknown = sorted(k for k in options.inductor_options if not _is_setting(k))
    if unknown:
        raise UserError(
            f"[capture] inductor_options: {', '.join(unknown)} not known to this torch "
            f"({torch.__version__}). See torch._inductor.list_options()."
        )


def _is_setting(name: str) -> bool:
    return name.replace("-", "_") in inductor_config.get_config_copy()


def _missing(args: list) -> Any:
    raise AssertionError("a region that was captured for planning only was run")


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


def _eager(gm: fx.GraphModule) -> BoxedCode:
    def run(args: list) -> Any:
        values = list(args)
        args.clear()
        return gm.forward(*values)

    return run


def _cpp_settings() -> dict[str, Any]:
    """What Inductor itself sets for code around the kernels in C++."""
    try:
        from torch._inductor.compile_fx import get_cpp_wrapper_config
    except ImportError:
        raise UserError(
            f'[capture] region_host "cpp": not available with torch {torch.__version__}. Use '
            "python."
        ) from None
    return get_cpp_wrapper_config()


@contextlib.contextmanager
def _inductor_settings(options: CaptureOptions) -> Iterator[None]:
    settings: dict[str, Any] = {}
    if options.region_host == "cpp":
        settings = {"cpp_wrapper": True, **_cpp_settings()}
    settings |= {k.replace("-", "_"): v for k, v in options.inductor_options.items()}
    if options.compile_threads is not None:
        settings["compile_threads"] = options.compile_threads
    variable = "TORCHINDUCTOR_CACHE_DIR"  # Inductor has no other way to be told
    old = os.environ.get(variable)
    if options.cache_dir is not None:
        os.environ[variable] = str(options.cache_dir)
    try:
        with inductor_config.patch(settings), vector_checks.remembered():
            yield
    finally:
        if options.cache_dir is not None:
            if old is None:
                del os.environ[variable]
            else:
                os.environ[variable] = old


@contextlib.contextmanager
def _acquire(item: _Pending, lock: filelock.BaseFileLock) -> Iterator[None]:
    start = time.monotonic()
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_S)
    except filelock.Timeout:
        waited = time.monotonic() - start
        raise UserError(
            f"[capture] {item.region}: another process has been compiling it for {waited:.0f} s "
            f"and holds {lock.lock_file}. End that process, or give this job its own cache_dir."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _inductor(item: _Pending, fake_mode: Any) -> BoxedCode:
    gm = item.build()
    examples = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    try:
        with tracing(TracingContext(fake_mode)), V.set_fake_mode(fake_mode):
            return compile_fx_inner(
                gm,
                examples,
                static_input_idxs=item.static_inputs,
                is_backward=item.is_backward,
                cpp_wrapper=inductor_config.cpp_wrapper,
            )
    except Exception as error:
        raise UserError(
            f"[capture] {item.region}: Inductor cannot compile it: {type(error).__name__}: "
            f'{_cause(error)}. Call engine.compile(backend="eager") to run it uncompiled, and '
            "report the graph."
        ) from error


def _cause(error: Exception) -> str:
    """An error's first line; with a compiler's own first error, which stands below its command."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    said = next((line for line in lines[1:] if re.search(r"\berror:", line)), None)
    return lines[0] if said is None else f"{lines[0]}: {said[:_LONGEST_CAUSE]}"


def _lock_folder() -> Path:
    """The folder of the regions' locks, in Inductor's cache."""
    try:
        folder = Path(cache_dir()) / "deepcompile-locks"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"[capture] {error.filename}: Inductor's cache cannot be written ({error.strerror}). "
            "Set compile.cache_dir or TORCHINDUCTOR_CACHE_DIR to a folder that can be."
        ) from None
    return folder
