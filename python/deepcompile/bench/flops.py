# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a training step, and the peak of the device that runs it.

Counted are the matrix products of a decoder: projections (with grouped keys and
values as narrow as they are), attention, the feed-forward (gated or not; of a
mixture of experts those that a token visits, and the router), and the output
layer at its real vocabulary, tied or not. A multiplication with its addition
is two operations. The backward is twice the forward: each product has two
gradients. Not counted: what a run computes again (activation checkpointing,
flash attention's scores), lookups, norms, activation functions, the optimizer.

Causal attention is counted once: position i attends to i + 1 positions, so a
sequence has s (s + 1) / 2 pairs, as flash attention computes them, and not the
s^2 that torch.utils.flop_counter counts. A sliding window cuts them further.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from .conditions import Condition, local_model
from .results import Row

GATED = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2"}
PLAIN = {"gpt2", "gpt_neox", "opt", "phi"}
"""Model types by their feed-forward: three matrices (gate, up, down), or two."""


@dataclass(frozen=True)
class Geometry:
    """What the count depends on."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Width of the feed-forward, of one expert."""
    gated: bool
    vocabulary: int
    experts: int = 0
    """0: no mixture."""
    experts_in_use: int = 1
    """For each token."""
    window: int = 0
    """Of sliding attention; 0: none."""
    slides: tuple[bool, ...] = ()
    """Which layers have that window, in turn; empty: all."""

    @staticmethod
    def of(config: Any) -> Geometry:
        """From a transformers config."""
        kind = config.model_type
        if kind not in GATED | PLAIN:
            raise UserError(
                f"[bench] model type {kind!r}: its operations are not known. Known types: "
                f"{', '.join(sorted(GATED | PLAIN))}; other metrics need no count."
            )
        heads, hidden = config.num_attention_heads, config.hidden_size
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
        ffn = getattr(config, "ffn_dim", None) if inner is None else inner
        uses_window = getattr(config, "use_sliding_window", True)
        kinds = getattr(config, "layer_types", None) or ()
        return Geometry(
            layers=config.num_hidden_layers,
            hidden=hidden,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            ffn=ffn or 4 * hidden,
            gated=kind in GATED,
            vocabulary=config.vocab_size,
            experts=getattr(config, "num_local_experts", 0) or 0,
            experts_in_use=getattr(config, "num_experts_per_tok", 1) or 1,
            window=(uses_window and getattr(config, "sliding_window", None)) or 0,
            slides=tuple(kind == "sliding_attention" for kind in kinds),
        )


def forward_flops(shape: Geometry, batch: int, seq: int, causal: bool = True) -> int:
    """Of one forward over ``batch`` sequences. ``causal`` False counts all seq^2 pairs."""
    tokens = batch * seq
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    projections = shape.hidden * (2 * wide + 2 * narrow)  # query and output, key and value
    matrices = 3 if shape.gated else 2
    feed_forward = matrices * shape.hidden * shape.ffn
    if shape.experts:
        feed_forward = feed_forward * shape.experts_in_use + shape.hidden * shape.experts
    slides = shape.slides or (True,)
    windows = [shape.window * slides[at % len(slides)] for at in range(shape.layers)]
    pairs = sum(windows.count(w) * attention_pairs(seq, causal, w) for w in set(windows))
    layers = shape.layers * tokens * (projections + feed_forward) + 2 * wide * batch * pairs
    return 2 * (layers + tokens * shape.hidden * shape.vocabulary)


def attention_pairs(seq: int, causal: bool = True, window: int = 0) -> int:
    """(query, key) pairs of one sequence and head."""
    if not causal:
        return seq * seq
    w = min(seq, window or seq)
    return w * (w + 1) // 2 + (seq - w) * w


def step_flops(
    shape: Geometry, batch: int, seq: int, accumulation: int = 1, causal: bool = True
) -> int:
    """Of one rank's optimizer step: forwards and backwards of its micro batches."""
    return 3 * accumulation * forward_flops(shape, batch, seq, causal)


def condition_flops(condition: Condition) -> int:
    """Of one rank's step under a condition; its model must be found on this machine."""
    shape = Geometry.of(_config(condition.model))
    if condition.num_layers:
        shape = replace(shape, layers=condition.num_layers)
    return step_flops(shape, condition.batch_size, condition.seq_length, condition.accumulation)


def row_flops(row: Row) -> float:
    return row.model_flops if row.model_flops else condition_flops(row.condition)


def _config(model: str) -> Any:
    """A built-in config by its own or its Hugging Face name, a file, a folder, or what the
    Hugging Face cache holds. Nothing is downloaded."""
    from .. import models

    local = local_model(model)
    if local in models.names() or Path(local).exists():
        return models.load_config(local)
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(model, local_files_only=True)
    except Exception:  # transformers raises several kinds
        raise UserError(
            f"[bench] {model}: its config is not on this machine. Put its config.json at that "
            "path, or choose a metric that needs no count of operations."
        ) from None


PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"\bGB200\b", {"bf16": 2500e12, "fp32": 80e12}),
    (r"\bB200\b", {"bf16": 2250e12, "fp32": 75e12}),
    (r"\bH200 NVL\b", {"bf16": 835e12, "fp32": 60e12}),
    (r"\bGH200\b|\bH200\b", {"bf16": 989e12, "fp32": 67e12}),
    (r"\bH100 PCIe\b", {"bf16": 756e12, "fp32": 51e12}),
    (r"\bH100 NVL\b", {"bf16": 835e12, "fp32": 60e12}),
    (r"\bH100\b", {"bf16": 989e12, "fp32": 67e12}),
    (r"\bA100\b", {"bf16": 312e12, "fp32": 19.5e12}),
    (r"\bA800\b", {"bf16": 312e12, "fp32": 19.5e12}),
    (r"\bL40S\b", {"bf16": 362e12, "fp32": 91.6e12}),
    (r"\bL40\b", {"bf16": 181e12, "fp32": 90.5e12}),
    (r"\bL4\b", {"bf16": 121e12, "fp32": 30.3e12}),
    (r"\bA10\b", {"bf16": 125e12, "fp32": 31.2e12}),
)
"""Names as torch.cuda.get_device_name gives them -> operations a second by the data sheets, dense;
fp32 without TF32."""


def peak_flops(device: str, dtype: str) -> float | None:
    """A device's peak, operations a second: from its machine file, else PEAKS; None if unknown, as
    a part of one (MIG) is."""
    key = {"bf16": "bf16", "fp32": "f32"}.get(dtype)
    for path in sorted((Path(__file__).parent.parent / "machines").glob("*.json")):
        described = json.loads(path.read_text())["device"]
        if described["name"] == device:
            return described["flops"].get(key)
    words = re.sub(r"[-_]", " ", device)
    for pattern, peaks in PEAKS:
        if re.search(pattern, words) and not re.search(r"\bMIG\b", words):
            return peaks.get(dtype)
    return None


def row_peak(row: Row, override_tflops: float | None = None) -> float:
    """The peak to hold a row against. Raises UserError for a device that is not known."""
    if override_tflops is not None:
        return override_tflops * 1e12
    device = str(row.machine.get("device", "")) or "a device that the row does not name"
    peak = peak_flops(device, row.condition.dtype)
    if peak is None:
        raise UserError(
            f"[bench] mfu: the peak of {device} for {row.condition.dtype} is not known. Give it "
            "with --peak-tflops."
        )
    return peak
