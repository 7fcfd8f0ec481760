# SPDX-License-Identifier: Apache-2.0
"""The toy step with runs that hand on views of other parts of a storage, and with values on the
host: what recordings must not lose."""

from __future__ import annotations

import torch
import toy_step
from toy_step import CODES, GRAPH, first, second

OFFSET = 64  # elements

ALIASED = (
    GRAPH.replace("value h 64B", "value h 64B\nvalue h2 64B")
    .replace(
        "region fwd.1 code=1 (h, t", "region mid code=4 (h) -> (h2)\nregion fwd.1 code=1 (h2, t"
    )
    .replace("region bwd.1 code=2 (g.loss, h, t", "region bwd.1 code=2 (g.loss, h2, t")
    .replace("  run fwd.1\n", "  run mid\n  run fwd.1\n")
)
"""GRAPH with a run between the two that hands h on as h2."""


def _at_an_offset(value: torch.Tensor) -> torch.Tensor:
    memory = torch.zeros(OFFSET + value.numel(), dtype=value.dtype, device=value.device)
    memory[OFFSET:].copy_(value.flatten())
    return memory[OFFSET:].view(value.shape)


def _twice_at_an_offset(args):
    x, w1, bias = args
    args.clear()
    h = first(x, w1, bias)
    return [_at_an_offset(torch.cat([h, h * 3]))]


def _half(args):
    (h,) = args
    args.clear()
    return [h[: h.shape[0] // 2]]


def _once_at_an_offset(args):
    x, w1, bias = args
    args.clear()
    return [_at_an_offset(first(x, w1, bias))]


def _all(args):
    (h,) = args
    args.clear()
    return [h.view(h.shape)]


def _once_in_front(args):
    x, w1, bias = args
    args.clear()
    h = first(x, w1, bias)
    both = torch.stack([h * 3, h])
    return [both[0]]


def _behind(args):
    (h,) = args
    args.clear()
    return [h.as_strided(h.shape, h.stride(), h.storage_offset() + h.numel())]


ALIASES = {
    "a part of it": [_twice_at_an_offset, *CODES[1:], _half],
    "all of it": [_once_at_an_offset, *CODES[1:], _all],
    "what lies behind it": [_once_in_front, *CODES[1:], _behind],
}
"""Codes of ALIASED: what h2 is of h's storage."""

ON_HOST = (
    GRAPH.replace("value h 64B", "value h 64B\nvalue c 4KiB")
    .replace(
        "region fwd.1 code=1 (h, t, w2, small[1])",
        "region const code=4 () -> (c)\nregion fwd.1 code=1 (h, t, w2, small[1], c)",
    )
    .replace("  run fwd.0\n", "  run const\n  run fwd.0\n")
)
"""GRAPH with a run without inputs, whose output the last run of the forward reads."""


def host_codes(device: str) -> list:
    """Codes of ON_HOST; the constant lies on `device`."""

    def constant(args):
        args.clear()
        return [torch.full((1024,), 3.0, device=device)]

    def second_scaled(args):
        h, t, w2, scale, c = args
        args.clear()
        return [second(h if c.is_meta else h * c[0].item(), t, w2, scale)]

    return [CODES[0], second_scaled, *CODES[2:], constant]


def use(monkeypatch, graph: str) -> None:
    monkeypatch.setattr(toy_step, "GRAPH", graph)
