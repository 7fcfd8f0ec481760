# SPDX-License-Identifier: Apache-2.0
"""Which torch the extension was built for: another one cannot load it, or crashes with it.
Importing this module checks it."""

from __future__ import annotations

from pathlib import Path

from .errors import UserError

RECORD = Path(__file__).parent / "built_for_torch.txt"
"""What the build installs beside the extension."""


def check(record: Path = RECORD) -> None:
    """UserError if the torch of this process is another release than the extension's."""
    import torch

    if not record.is_file():
        return
    built = record.read_text(encoding="utf-8").strip()
    if _release(built) != _release(torch.__version__):
        raise UserError(
            f"[initialize] torch {torch.__version__}: deepcompile was built for {built}. Build it "
            "again: make install, or pip install --no-build-isolation --force-reinstall --no-deps ."
        )


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


check()
