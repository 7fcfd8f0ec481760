# SPDX-License-Identifier: Apache-2.0
"""The two kinds of error. UserError names stage, object, cause and remedy;
InternalError is a bug of ours."""

from __future__ import annotations

from ._core import InternalError, UserError

__all__ = ["InternalError", "UserError"]
