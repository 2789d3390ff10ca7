"""The adapted linear layer: y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ, on a plain or a 4-bit W, with no more work around the products than they need.

PEFT's own forward copies the input to float32 for every layer (three times for q, k and v) and keeps each copy for the backward
pass. Here adapter parameters stay float32 and are rounded to the compute dtype for the product, as under autocast: q, k and v
share one saved input. While decoding on a CPU, W is multiplied in blocks of its rows, which MKL does up to twice as fast.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 64  # up to so many rows a product is bound by reading W; measured
BLOCK = (32, 128)  # rows of W, at least and at most, that are multiplied at once then; measured


def make_lean(model: Any) -> None:
    """Gives every LoRA layer of a PEFT model the forward of this module."""
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            module.forward = types.MethodType(_adapted, module)


def few_rows_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b for few rows of x on a CPU: W [out, in] in blocks, none of them copied; the same as `linear` up to rounding."""
    out, inside = weight.shape
    size = _block(out)
    if size is None:
        return F.linear(x, weight, bias)
    y_KMb = torch.matmul(x.reshape(-1, inside), weight.view(-1, size, inside).transpose(1, 2))
    y = y_KMb.transpose(0, 1).reshape(*x.shape[:-1], out)
    return y if bias is None else y + bias


@functools.cache
def _block(out: int) -> int | None:
    """The largest block size within limits that divides `out`, if there is one."""
    low, high = BLOCK
    return next((size for size in range(high, low - 1, -1) if out % size == 0), None)


def is_few(x: Tensor) -> bool:
    """True where `few_rows_product` pays: few rows, on a CPU, without a gradient."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and x.numel() <= FEW_ROWS * x.shape[-1]


def _adapted(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """The forward of one LoRA layer, for whichever adapters are on."""
    y = _base(self.base_layer, x)
    if self.disable_adapters:
        return y
    for name in self.active_adapters:
        if name in self.lora_A:
            low = F.linear(x, self.lora_A[name].weight.to(x.dtype))
            y = torch.add(y, F.linear(low, self.lora_B[name].weight.to(x.dtype)), alpha=self.scaling[name])
    return y


def _base(layer: Any, x: Tensor) -> Tensor:
    if not is_few(x):
        y: Tensor = layer(x)
        return y
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return few_rows_product(x, layer.weight, layer.bias)
    from bitsandbytes.functional import dequantize_4bit

    return few_rows_product(x, dequantize_4bit(layer.weight, state), layer.bias)
