# SPDX-License-Identifier: Apache-2.0
"""What would fail in every rank, or behind the first condition, found before anything starts:
models that are not there, folders that cannot be written, models that the host cannot hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import UserError, check_writable, writing
from .conditions import Condition
from .options import Options
from .process import Place
from .results import ROWS

STATE_BYTES = 16
"""Of one parameter in training, on all ranks together: fp32 master and two moments, weight and
gradient."""


def models(names: Iterable[str]) -> None:
    """Raises UserError for the first that cannot be built."""
    from .weights import model_config

    for name in dict.fromkeys(names):
        model_config(name)


def folder(path: str | Path, file: str) -> None:
    """Raises UserError if `file` could not be written in a folder, which may not be there yet."""
    place = Path(path) / file
    while not place.parent.exists():
        place = place.parent
    if not place.parent.is_dir():
        with writing("bench", path):
            raise NotADirectoryError(20, f"{place.parent} is a file")
    check_writable("bench", place)


def folders(options: Options, logs: Path) -> None:
    """Of results, traces and logs."""
    folder(options.results, ROWS)
    if options.profile:
        folder(options.profile_dir, "trace")
    folder(logs, "log")


def host_memory(conditions: Sequence[Condition], place: Place) -> None:
    """Raises UserError for a model whose training state alone is more than this host's memory,
    where that is all that its ranks have."""
    import torch

    from .. import budget
    from .suites import elements
    from .weights import model_config

    if torch.cuda.is_available() or place.nodes > 1 or place.slurm:
        return
    total, _ = budget.host_memory()
    shapes = {(c.model, c.num_layers): c for c in conditions}
    for (model, layers), condition in shapes.items():
        rest, layer = elements(model)
        count = rest + layer * (layers or model_config(model).num_hidden_layers)
        if STATE_BYTES * count > total:
            raise UserError(
                f"[bench] {condition.model_label}: its {count / 1e9:.1f} B parameters take "
                f"{STATE_BYTES * count / 2**30:.0f} GiB to train, and this host has no GPU and "
                f"{total / 2**30:.0f} GiB. Give --num-layers for fewer layers, --model for a "
                "smaller one, or the suite tiny (here: it is chosen where there are no GPUs)."
            )
