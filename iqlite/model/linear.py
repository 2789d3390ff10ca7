"""The adapted linear layer: y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ, on a plain or a 4-bit W, with no more work around the products than they need.

PEFT's own forward copies the input to float32 for every layer (three times for q, k and v) and keeps each copy for the backward
pass. Here adapter parameters stay float32 and are rounded to the compute dtype for the product, as under autocast: q, k and v
share one saved input. While decoding on a CPU, W is multiplied in blocks of its rows, which MKL does up to twice as fast.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 128  # up to so many rows blocks are quicker, 1.0 to 2.3 times (more the larger W is); measured
BLOCK = (32, 128)  # rows of W, at least and at most, that are multiplied at once then; measured


def make_lean(model: Any) -> None:
    """Gives every LoRA layer of a PEFT model the forward of this module."""
    for module in model.modules():
        if is_adapted(module):
            module.folded = None
            module.forward = types.MethodType(_adapted, module)


def is_adapted(module: Any) -> bool:
    """True for a linear layer with LoRA on it."""
    return hasattr(module, "lora_A") and isinstance(getattr(module, "base_layer", None), torch.nn.Linear)


def few_rows_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b for few rows of x on a CPU: W [out, in] in blocks, none of them copied; the same as `linear` up to rounding."""
    out, inside = weight.shape
    size = _block(out)
    if size is None:
        return F.linear(x, weight, bias)
    x_MI, weight_KIb = x.reshape(-1, inside), weight.view(-1, size, inside).transpose(1, 2)
    y_KMb = torch.bmm(x_MI.expand(len(weight_KIb), *x_MI.shape), weight_KIb)
    y = y_KMb.transpose(0, 1).reshape(*x.shape[:-1], out)
    return y if bias is None else y + bias


@functools.cache
def _block(out: int) -> int | None:
    """The largest block size within limits that divides `out`, if there is one."""
    low, high = BLOCK
    return next((size for size in range(high, low - 1, -1) if out % size == 0), None)


def is_few(x: Tensor) -> bool:
    """True where `few_rows_product` pays: few rows, on a CPU."""
    return x.device.type == "cpu" and x.numel() <= FEW_ROWS * x.shape[-1]


class FewRows(torch.autograd.Function):
    """`few_rows_product` with a gradient in x. Autograd's own would keep a copy of x's gradient for every block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return few_rows_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad_y @ weight, None, None


@contextmanager
def folded(model: Any) -> Iterator[None]:
    """Within the block every adapted layer multiplies by one matrix, W + s·B·A of the adapters that are on, in the compute dtype.

    Pays from a few small products on (decoding). Costs the memory of the adapted weights. For float32 only: 16 bits would round a
    small adapter away.
    """
    layers = [module for module in model.modules() if is_adapted(module)]
    try:
        for layer in layers:
            layer.folded = _fold(layer)
        yield
    finally:
        for layer in layers:
            layer.folded = None


def _fold(layer: Any) -> Tensor:
    with torch.no_grad():
        weight = dense(layer.base_layer)
        if not layer.disable_adapters:
            for name in layer.active_adapters:
                if name in layer.lora_A:
                    a_rI, b_Or = (part[name].weight.to(weight.dtype) for part in (layer.lora_A, layer.lora_B))
                    weight = torch.addmm(weight, b_Or, a_rI, alpha=layer.scaling[name])
        return weight


def dense(layer: Any) -> Tensor:
    """A linear layer's weight in the compute dtype: itself, or dequantised."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        weight: Tensor = layer.weight.detach()  # a plain tensor: a Parameter would join the layer
        return weight
    from bitsandbytes.functional import dequantize_4bit

    made: Tensor = dequantize_4bit(layer.weight, state)
    return made


def _adapted(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """The forward of one LoRA layer, for whichever adapters are on."""
    if self.folded is not None:
        return (few_rows_product if is_few(x) else F.linear)(x, self.folded, self.base_layer.bias)
    y = _base(self.base_layer, x)
    if self.disable_adapters:
        return y
    for name in self.active_adapters:
        if name in self.lora_A:
            low = F.linear(x, self.lora_A[name].weight.to(x.dtype)).flatten(0, -2)
            b_rO = self.lora_B[name].weight.to(x.dtype).t()
            y = torch.addmm(y.flatten(0, -2), low, b_rO, alpha=self.scaling[name]).view_as(y)
    return y


def _base(layer: Any, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() or not is_few(x):
        y: Tensor = layer(x)
        return y
    return few_rows_product(x, dense(layer), layer.bias)
