# SPDX-License-Identifier: Apache-2.0
"""Which operators AOTAutograd takes apart, and which stay whole for their own kernel.

The list is Inductor's, less what would cost determinism: Inductor's embedding backward adds
rows with atomics, in no fixed order, into an fp32 table as large as the whole embedding. The
operator's own kernel sums each row in order, in the gradient's type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import lowering
from torch._inductor.decomposition import select_decomp_table

KEPT_WHOLE = (torch.ops.aten.embedding_dense_backward.default,)


def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """Operator -> decomposition, for ``aot_autograd``; regions call KEPT_WHOLE as they are."""
    for op in KEPT_WHOLE:
        if op not in lowering.lowerings:  # only graphs that were not decomposed ever ask for it
            lowering.make_fallback(op, warn=False, override_decomp=True)
    return {op: f for op, f in select_decomp_table().items() if op not in KEPT_WHOLE}
