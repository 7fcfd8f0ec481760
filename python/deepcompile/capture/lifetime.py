# SPDX-License-Identifier: Apache-2.0
"""A capture lives as long as its CaptureBackend, whatever Dynamo and autograd keep of it.

Dynamo keeps backends until it is reset, and each compiled graph as a global of the module whose
function it compiled, until the new code of that function dies. That may be never: the flight
recorder of torch.distributed keeps the code of every frame that called a collective. An output
keeps its autograd node. So all of these hold weakly what leads to an engine's memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from deepcompile.capture.graph import Runner
from deepcompile.errors import UserError


def borrowed(owned: Any, method: str = "__call__") -> Callable[..., Any]:
    """A method of what someone else holds; an error once nobody does."""
    held = weakref.ref(owned)

    def call(*args: Any) -> Any:
        target = held()
        if target is None:
            raise UserError(
                "[capture] compiled graph: its engine is gone. Keep the engine while you call what "
                "it compiled, and until the backward of its last forward."
            )
        return getattr(target, method)(*args)

    return call


class BorrowedRunner:
    """A Runner that someone else holds."""

    def __init__(self, runner: Runner):
        self.forward = borrowed(runner, "forward")
        self.backward = borrowed(runner, "backward")
        self.inference = borrowed(runner, "inference")
