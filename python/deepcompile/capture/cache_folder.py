# SPDX-License-Identifier: Apache-2.0
"""Inductor's cache, where the environment says where: importing torch._dynamo makes its folder, so
that one which cannot be is told of before."""

from __future__ import annotations

import os

from deepcompile.errors import UserError

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def check(folder: str | None) -> None:
    """UserError unless `folder`, the variable's value, is there or can be made."""
    if not folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"[capture] {VARIABLE}={folder}: cannot be written ({error.strerror}). Set it to a "
            "folder that can be, or unset it."
        ) from None


check(os.environ.get(VARIABLE))
