"""Which kernel scaled_dot_product_attention takes on a card (ATen's sdp_utils.cpp in short), and what it keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.card.played import Card, blank, playing

REAL = torch.nn.functional.scaled_dot_product_attention
HALVES = (torch.float16, torch.bfloat16)


def attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch's function as a card runs it."""
    if not isinstance(query, Card):
        return REAL(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    for name, tensor in (("key", key), ("value", value)):
        if not isinstance(tensor, Card) or tensor.dtype != query.dtype:
            raise RuntimeError(
                f"Expected query, key, and value to have the same dtype and device, {name}: {tensor.dtype}, query: {query.dtype} [played]"
            )
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
        raise RuntimeError(f"Expected attn_mask dtype to be bool or to match query dtype, but got {attn_mask.dtype} [played]")
    kernel = kernel_of(query, key, value, attn_mask, is_causal, enable_gqa)
    many = "one" if query.shape[2] == 1 else "many"
    playing().counts.attention[f"{kernel}, {many}{', mask' if attn_mask is not None else ''}{', grouped' if enable_gqa else ''}"] += 1
    mask = attn_mask
    if mask is not None and mask.dtype == torch.bool:  # made numbers of each time
        mask = torch.where(mask, torch.zeros((), dtype=query.dtype), torch.full((), float("-inf"), dtype=query.dtype, device=query.device))
    if mask is not None and kernel == "efficient" and (short := -mask.shape[-1] % 8):
        mask = torch.nn.functional.pad(mask, (0, short))[..., : mask.shape[-1]]
    if kernel == "math":
        return _in_float32(query, key, value, mask, is_causal, scale, enable_gqa)
    made: Tensor = Fused.apply(query, key, value, mask, is_causal, scale, enable_gqa, kernel)  # type: ignore[no-untyped-call]
    return made


def kernel_of(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, grouped: bool) -> str:
    """flash (16 bits, no mask, from Ampere on), efficient, or math."""
    size, capability = query.shape[-1], playing().model.capability
    square = not causal or query.shape[2] == key.shape[2]
    if capability >= (8, 0) and mask is None and query.dtype in HALVES and size <= 256 and size % 8 == 0 and square:
        return "flash"
    known = query.dtype in (torch.float16, torch.float32) or capability >= (8, 0)
    dense = query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    whole = size % (8 if query.dtype != torch.float32 else 4) == 0
    return "efficient" if known and dense and whole and not grouped and query.shape[1] == key.shape[1] else "math"


def _in_float32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, grouped: bool) -> Tensor:
    """ATen's own mathematics; 16 bits are widened there."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype, (q, k, v) = q.dtype, (t.float() for t in (q, k, v))
    if grouped:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = (q * scale**0.5) @ (k.transpose(-2, -1) * scale**0.5)
    if causal:
        scores = scores.masked_fill(~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(), float("-inf"))
    if mask is not None:
        scores = scores + mask.float()
    return (scores.softmax(-1) @ v).to(dtype)


class Fused(torch.autograd.Function):
    """A fused kernel: beyond its inputs it keeps its result and the logarithm of its sums."""

    @staticmethod
    def forward(ctx: Any, q: Card, k: Card, v: Card, mask: Any, causal: bool, scale: Any, grouped: bool, kernel: str) -> Card:
        card, inner, m = playing(), [t.inner for t in (q, k, v)], None if mask is None else mask.inner
        if any(t.is_meta for t in inner):
            out = blank((q.shape[0], q.shape[2], q.shape[1], v.shape[-1]), q.dtype).transpose(1, 2)
        else:
            out = REAL(*inner, attn_mask=m, is_causal=causal, scale=scale, enable_gqa=grouped)
        kept = [q, k, v, card.own(out)]
        if any(ctx.needs_input_grad[:3]) or kernel == "flash":
            kept.append(card.own(blank((q.shape[0], q.shape[1], -(-q.shape[2] // 32) * 32), torch.float32)))
        ctx.save_for_backward(*kept, *([] if mask is None else [mask]))
        ctx.how = (mask is not None, causal, scale, grouped, kernel)
        card.kernel(f"attention {kernel}", 1 + (kernel == "flash" and q.shape[2] == 1), *inner, out)
        return kept[3]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        card, (q, k, v, *rest) = playing(), ctx.saved_tensors
        masked, causal, scale, grouped, kernel = ctx.how
        card.kernel(f"attention {kernel} backward", 3, *(t.inner for t in (q, k, v, q, k, v)))
        card.passing(q.numel() * 4, q.shape[0] * q.shape[1] * q.shape[2] * 4)  # a float32 gradient of q, and each row's sum
        if q.inner.is_meta or grad.inner.is_meta:
            return *(card.own(blank(t.shape, t.dtype)) for t in (q, k, v)), None, None, None, None, None
        with torch.enable_grad():
            inner = [t.inner.detach().requires_grad_() for t in (q, k, v)]
            out = REAL(*inner, attn_mask=rest[-1].inner if masked else None, is_causal=causal, scale=scale, enable_gqa=grouped)
            found = torch.autograd.grad(out, inner, grad.inner)
        return *(card.own(g) for g in found), None, None, None, None, None
