# SPDX-License-Identifier: Apache-2.0
"""Causal attention without a mask, for the Hugging Face models and batches that allow it.

Under torch.compile, transformers builds an explicit causal mask, which rules out flash attention
and grouped heads: whether padding or packing make one necessary is a question of values. Here it
is a question of arguments: a batch of ids and labels alone has neither, and ``sdpa_causal``
leaves the mask to SDPA's ``is_causal``. What else a model asks for (a sliding window shorter than
the sequence, a cache that holds something, attention both ways) it gets as before.

``why_not`` finds out what a model asks for by running it up to its first attention, where
transformers decides by values.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from deepcompile.errors import UserError

NAME = "sdpa_causal"
_PROBE = "sdpa_causal_probe"
_PROBE_TOKENS = 8
_TENSORS = frozenset({"input_ids", "inputs_embeds", "labels", "shift_labels", "num_items_in_batch"})
_NUMBERS = frozenset({"use_cache", "return_dict", "output_hidden_states", "output_router_logits",
                      "logits_to_keep"})  # fmt: skip
_ASKS_FOR_SDPA = re.compile(r"_attn_implementation\s*(==|!=|in\b|not\s+in\b)[^\n]*[\"']sdpa[\"']")

_asked: list[dict[str, Any]] = []
"""What the model that is being tried asked for, one entry a mask."""


class _Attention(Exception):
    """The model that is being tried has come to its first attention."""


def needs_mask(batch: Mapping[str, Any]) -> str | None:
    """The argument of a model's forward that may ask for more than a causal mask, if there is
    one: anything but ids, labels and plain numbers."""
    for name, value in batch.items():
        if value is None or name in _TENSORS:
            continue
        if name not in _NUMBERS or not isinstance(value, bool | int | float):
            return name
    return None


def _is_plain_causal(asked: Mapping[str, Any]) -> bool:
    """Whether SDPA's is_causal stands for the mask that is asked for, given that the batch has
    no positions of its own: nothing but "not later than the query" remains to be said."""
    if "allow_is_causal_skip" not in asked or "allow_is_bidirectional_skip" in asked:
        return False
    if asked.get("attention_mask") is not None or asked.get("use_vmap"):
        return False
    offsets = (asked.get("q_offset"), asked.get("kv_offset"))
    if any(isinstance(offset, torch.Tensor) or offset != 0 for offset in offsets):
        return False
    length, window = asked.get("kv_length"), asked.get("local_size")
    return asked.get("q_length") == length and (window is None or length < window)


def _mask(**asked: Any) -> torch.Tensor | None:
    from transformers.masking_utils import sdpa_mask

    return None if _is_plain_causal(asked) else sdpa_mask(**asked)


def _probe_mask(**asked: Any) -> torch.Tensor | None:
    from transformers.masking_utils import sdpa_mask

    _asked.append(asked)
    return sdpa_mask(**asked)


def _probe_attention(*args: Any, **kwargs: Any) -> None:
    raise _Attention


def register() -> None:
    """Make the forms known to transformers, under names of their own."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionMaskInterface.register(NAME, _mask)
    AttentionInterface.register(NAME, sdpa_attention_forward)
    AttentionMaskInterface.register(_PROBE, _probe_mask)
    AttentionInterface.register(_PROBE, _probe_attention)


def sdpa_configs(model: nn.Module) -> list[Any]:
    """The configurations in ``model`` that say how to attend, and say sdpa."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            found[id(config)] = config
    return list(found.values())


@contextmanager
def implementation(configs: list[Any], name: str) -> Iterator[None]:
    """``configs`` name another implementation of attention inside the with statement, those that
    say sdpa: what someone has set since stays."""
    configs = [config for config in configs if config._attn_implementation == "sdpa"]
    try:
        for config in configs:
            config._attn_implementation = {"": name}  # without its sub-configurations
        yield
    finally:
        for config in configs:
            config._attn_implementation = {"": "sdpa"}


def _source_asks_for_sdpa(model: nn.Module) -> str | None:
    """The class of a module whose source compares its implementation with "sdpa" by name."""
    files: dict[str, type] = {}
    for module in model.modules():
        files.setdefault(type(module).__module__, type(module))
    for name, kind in files.items():
        if name.startswith("torch."):
            continue
        try:
            source = inspect.getsource(sys.modules[name])
        except (KeyError, OSError, TypeError):
            continue
        if _ASKS_FOR_SDPA.search(source):
            return kind.__name__
    return None


def _stand_ins(model: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """Zeros of the parameters' shapes that take no memory, and the buffers, on ``device``; once for
    each place that has one, tied or not, even if its module has two names."""
    found = {}
    for prefix, module in model.named_modules():
        places = {"prefix": prefix, "recurse": False, "remove_duplicate": False}
        for name, p in module.named_parameters(**places):
            found[name] = torch.zeros((), dtype=p.dtype, device=device).expand(p.shape)
        for name, buffer in module.named_buffers(**places):
            found[name] = (
                torch.zeros_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            )
    return found


def _try(model: nn.Module, configs: list[Any], device: torch.device) -> str | None:
    """Run ``model`` on a few tokens up to its first attention; what is wrong, if anything. What it
    asks for there depends on no parameter's value, so that it may have none yet."""
    token = 1 if getattr(model.config, "pad_token_id", None) == 0 else 0
    tokens = torch.full((1, _PROBE_TOKENS), token, dtype=torch.int64, device=device)
    devices = [device] if device.type == "cuda" else []
    _asked.clear()
    try:
        with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices):
            warnings.simplefilter("ignore")
            with implementation(configs, _PROBE):
                inputs = {"input_ids": tokens, "use_cache": False}
                # It would tie by name, and leave a stand-in in a module that has two names.
                stand_ins = _stand_ins(model, device)
                functional_call(model, stand_ins, (), inputs, tie_weights=False)
    except _Attention:
        if not _asked:
            return "it makes no mask before its first attention"
        if not all(asked.get("allow_is_causal_skip") for asked in _asked):
            return "it asks for masks that are more than causal"
        if any(asked.get("attention_mask") is not None for asked in _asked):
            return "it makes a padding mask by itself"
        return None
    except Exception as error:  # whatever a model raises that takes other inputs
        cause = (str(error).splitlines() or [""])[0]
        return f"a trial run on {_PROBE_TOKENS} tokens failed ({type(error).__name__}: {cause})"
    finally:
        _asked.clear()
    return "its attention does not go through transformers' attention functions"


def why_not(model: nn.Module, device: torch.device) -> str | None:
    """Why ``model`` cannot use sdpa_causal in any batch; None: it can. It is run up to its first
    attention on ``device``, with stand-ins for its parameters."""
    if not hasattr(model, "set_attn_implementation"):
        return "it is no Hugging Face model"
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder and a decoder"
    configs = sdpa_configs(model)
    text = model.config.get_text_config(decoder=True)
    if not any(config is text for config in configs):
        return f"its attention is {text._attn_implementation}, not sdpa"
    kind = _source_asks_for_sdpa(model)
    if kind is not None:
        return f"{kind} treats sdpa apart from other implementations"
    register()
    return _try(model, configs, device)


def use_causal_attention(model: nn.Module) -> None:
    """Switch ``model`` to ``sdpa_causal`` for good: for captures without values, whose batches
    are ids and labels alone. A model that treats sdpa apart keeps its own, as in an engine.
    Raises UserError where that would change its result: no Hugging Face model, or not causal."""
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
    if _source_asks_for_sdpa(model) is None:
        register()
        model.set_attn_implementation(NAME)
