# SPDX-License-Identifier: Apache-2.0
"""Plans kept between runs: a second run of a job starts with the first one's.

One JSON file a job, in the folder that compile.plan_cache names, written by
rank 0 after each planning and read by it in engine.compile(). The job's key
covers what a plan depends on; a file whose content does not fit its name, its
version or its own checksum is ignored with a warning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import _core, budget
from .agreement import Agreed
from .config import Config
from .distributed import Ranks
from .params import ParamTable
from .pass_identity import identity
from .schedule import Entry

FORMAT = 2
_SECTIONS = ("bf16", "zero_optimization")
_COMPILE_KEYS = (
    "region_bytes", "differentiable_outputs", "memory_budget", "memory_reserve", "early_updates",
    "checkpoint_marks", "region_host", "cuda_graphs", "gather", "reduce", "loss_only",
    "causal_attention", "experts", "embedding_rows", "equal_layers",
)  # fmt: skip


@dataclasses.dataclass
class Kept:
    """What a run leaves to the next."""

    agreed: Agreed
    costs: str
    """A _core.CostTable's text."""
    regions: dict[str, list[int | None]]
    """Key of a region's computation to [nanoseconds, bytes of scratch or None]."""


def _version() -> str:
    from . import __version__

    return __version__


def job(
    table: ParamTable,
    config: Config,
    ranks: Ranks,
    schedule: Sequence[Entry],
    backend: str,
) -> dict[str, Any]:
    """What plans of a job depend on, in JSON's types."""
    device, memory = "cpu", None
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name(ranks.device)
        memory = torch.cuda.get_device_properties(ranks.device).total_memory
    return {
        "params": [
            [spec.name, str(spec.dtype), spec.numel, spec.placement, spec.trainable,
             [[m.name, list(m.shape)] for m in spec.members]]
            for spec in table.params
        ],
        "config": {
            **{key: str(getattr(config, key)) for key in _SECTIONS},
            **{key: str(getattr(config.compile, key)) for key in _COMPILE_KEYS},
            "micro_batch": config.train_micro_batch_size_per_gpu,
            "accumulation": config.gradient_accumulation_steps,
            "clip": config.gradient_clipping > 0,
            "reduce": config.reduce_dtype,
        },
        "schedule": [[entry.step, [identity(p) for p in entry.passes]] for entry in schedule],
        "backend": backend,
        "world": ranks.world,
        "ranks_per_host": budget.local_ranks(ranks.world),
        "device": device,
        "device_bytes": memory,
        "machine": _machine(config.compile.machine),
        "torch": torch.__version__,
        "deepcompile": _version(),
    }  # fmt: skip


def _machine(named: str | None) -> str | None:
    """A built-in machine's name, or what is in the file."""
    path = Path(named or "")
    return path.read_text(encoding="utf-8") if named and path.is_file() else named


def job_key(facts: dict[str, Any]) -> str:
    """32 hexadecimal digits over a job's facts: the file's name."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def path_of(folder: str, key: str) -> Path:
    return Path(folder) / f"{key}.json"


def write(folder: str, facts: dict[str, Any], kept: Kept) -> Path | None:
    """Keep a plan; the file appears whole or not at all. A folder that cannot be written to is
    a warning."""
    key = job_key(facts)
    body = {"key": key, "job": facts, "kept": dataclasses.asdict(kept)}
    text = json.dumps(body, sort_keys=True)
    whole = {"format": FORMAT, "sum": hashlib.sha256(text.encode()).hexdigest(), "body": text}
    path = path_of(folder, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with contextlib.ExitStack() as undo:
            undo.callback(lambda: Path(name).unlink(missing_ok=True))
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(whole, file)
            os.replace(name, path)
    except OSError as error:
        warnings.warn(
            f"[plan_cache] {path}: cannot be written: {error}. The next run measures anew.",
            stacklevel=2,
        )
        return None
    return path


def read(folder: str, facts: dict[str, Any]) -> Kept | None:
    """What was kept of this job; None, with a warning if there is a file that is no use."""
    key = job_key(facts)
    path = path_of(folder, key)
    try:
        return _parse(path.read_text(encoding="utf-8"), key)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is in the file: a run does not depend on it
        warnings.warn(
            f"[plan_cache] {path}: is ignored, {_why(error)}. This run plans anew, and writes it "
            "again.",
            stacklevel=2,
        )
        return None


def fetch(
    folder: str,
    there: int,
    table: ParamTable,
    config: Config,
    ranks: Ranks,
    schedule: Sequence[Entry],
    backend: str,
) -> tuple[dict[str, Any], Kept | None, Entry | None]:
    """A job's facts, what was kept of it and the entry of the schedule whose plan that is: None if
    nothing is or if it takes more than `there`, bytes for a plan now. Collective."""

    def work() -> tuple[dict[str, Any], Kept | None]:
        facts = job(table, config, ranks, schedule, backend)
        return facts, read(folder, facts) if ranks.rank == 0 else None

    facts, kept = ranks.together("[plan_cache]", work)
    kept = ranks.from_first(kept)
    entries = [e for e in schedule if kept and e.measured and e.names() == kept.agreed.entry]
    if not entries:
        return facts, None, None
    peak = kept.agreed.predicted_peak or 0
    if peak <= there:
        return facts, kept, entries[-1]
    if ranks.rank == 0:
        warnings.warn(
            f"[plan_cache] the kept plan takes {peak / 2**30:.2f} GiB, and there are "
            f"{there / 2**30:.2f} GiB now. This run plans anew.",
            stacklevel=2,
        )
    return facts, None, None


def _why(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def _parse(text: str, key: str) -> Kept:
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON ({error.msg} at {error.pos})") from None
    if not isinstance(whole, dict) or "format" not in whole:
        raise ValueError("it is not a file of this cache")
    if whole["format"] != FORMAT:
        raise ValueError(f"it has format {whole['format']}, not {FORMAT}")
    body = whole["body"]
    if hashlib.sha256(body.encode()).hexdigest() != whole["sum"]:
        raise ValueError("its checksum is wrong")
    body = json.loads(body)
    if body["key"] != key:
        raise ValueError(f"it is of job {body['key']}")
    kept = body["kept"]
    agreed = Agreed(**kept["agreed"])
    agreed.reasons = [tuple(reason) for reason in agreed.reasons]
    for program in (*agreed.programs.values(), agreed.update):
        _core.StepProgram.parse(program)
    _core.CostTable.parse(kept["costs"], "its cost table")
    return Kept(agreed, kept["costs"], kept["regions"])
