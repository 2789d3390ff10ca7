"""Attention on cards that can't do it as transformers asks for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

NAME = "sdpa-repeated"


def repeat_keys(model: Any) -> None:
    """Lets a model with fewer keys than queries repeat them itself, where a kernel would have to.

    Before Ampere no fused kernel does: without a mask transformers leaves it to torch, which then keeps all scores in float32.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, repeated)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if model.config._attn_implementation == "sdpa":  # a model with a soft cap in its attention has another
        model.set_attn_implementation(NAME)


def repeated(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
    """transformers' own for as many keys as queries; a single query's heads stand side by side, so that nothing is copied."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    groups = getattr(module, "num_key_value_groups", 1)
    plain = SimpleNamespace(num_key_value_groups=1, is_causal=getattr(module, "is_causal", True))
    if groups == 1 or query.shape[2] > 1:
        found, _ = sdpa_attention_forward(plain, query, repeat_kv(key, groups), repeat_kv(value, groups), attention_mask, **kwargs)
        return found, None
    rows, heads, _, size = query.shape
    found, _ = sdpa_attention_forward(
        plain, query.view(rows, heads // groups, groups, size), key, value, attention_mask, **{**kwargs, "is_causal": False}
    )
    return found.transpose(1, 2).reshape(rows, 1, heads, -1), None
