# SPDX-License-Identifier: Apache-2.0
"""Causal attention without a mask, for Hugging Face models whose batches have no padding.

Under torch.compile, transformers builds an explicit causal mask, which rules
out flash attention and grouped heads. ``sdpa_causal`` passes no mask and lets
SDPA be causal by itself. A batch with padding must keep the model's own
attention: nothing here looks at ``attention_mask``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from deepcompile.errors import UserError

NAME = "sdpa_causal"


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _register() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionMaskInterface.register(NAME, _no_mask)
    AttentionInterface.register(NAME, sdpa_attention_forward)


def use_causal_attention(model: nn.Module) -> None:
    """Switch ``model`` to ``sdpa_causal``. Raises UserError where that would change its result:
    no Hugging Face model, not causal, or attention in a window smaller than its context."""
    name = type(model).__name__
    if not hasattr(model, "set_attn_implementation"):
        raise UserError(
            f"[capture] {name}: is no Hugging Face model, so its attention cannot be replaced. "
            "Call scaled_dot_product_attention with is_causal=True in the model instead."
        )
    config = model.config
    if getattr(config, "is_encoder_decoder", False) or not model.can_generate():
        raise UserError(
            f"[capture] {name}: its attention is not causal everywhere. Keep the model's own."
        )
    window = getattr(config, "sliding_window", None)
    context = getattr(config, "max_position_embeddings", None)
    if window and (context is None or window < context):
        raise UserError(
            f"[capture] {name}: attends in a window of {window} tokens. Keep the model's own "
            "attention, or set config.sliding_window to None."
        )
    _register()
    model.set_attn_implementation(NAME)
