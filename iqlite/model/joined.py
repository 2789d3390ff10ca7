"""Fewer operations for a token on a card, for as long as answers are decoded.

Adapters are float32; here they are rounded to the compute dtype once for a rollout and not for each token. Layers that are given the same
input, as q, k and v are, share one product with all their A's. Norms are torch's own fused kernel, where that says what a model's own does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iqlite.model.linear import base_product, is_adapted

EPSILONS = ("variance_epsilon", "eps")  # transformers' names
NORM_ULPS = 4  # what two ways to round a norm may differ by, in units of the dtype's precision


@contextmanager
def joined(model: Any, decoder: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the block the adapters that are on compute with copies in `dtype` and share products, and the decoder's norms are fused.

    Costs the memory of the adapter in `dtype`. Without a gradient only. Results differ by rounding.
    """
    together = _Together()
    layers = [module for module in model.modules() if is_adapted(module)]
    norms = fusible(decoder, dtype)
    try:
        for layer in layers:
            layer.joined = _Joined(layer, dtype, together)
        for norm, epsilon in norms.items():
            norm.forward = functools.partial(_norm, norm, epsilon)
        yield
    finally:
        for layer in layers:
            layer.joined = None
        for norm in norms:
            del norm.forward


class _Joined:
    """One layer's adapters that are on, as one: y = x·Wᵀ + (x·Aᵀ)·Bᵀ with the scale in B."""

    def __init__(self, layer: Any, dtype: torch.dtype, together: _Together):
        self.base, self.together = layer.base_layer, together
        names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
        self.a_rI: Tensor | None = None
        if names:
            self.a_rI = torch.cat([layer.lora_A[name].weight for name in names]).to(dtype)
            self.b_rO = torch.cat([layer.scaling[name] * layer.lora_B[name].weight for name in names], 1).to(dtype).t()

    def __call__(self, x: Tensor) -> Tensor:
        y = base_product(self.base, x)
        if self.a_rI is None:
            return y
        return y.flatten(0, -2).addmm_(self.together.low(self, x), self.b_rO).view_as(y)


class _Together:
    """Who is given the same tensor shows in the first forward: layers that are called with it one after the other are a group from then on."""

    def __init__(self) -> None:
        self.groups: dict[_Joined, _Group] = {}
        self.last: tuple[Tensor, _Group] | None = None

    def low(self, layer: _Joined, x: Tensor) -> Tensor:
        """x·Aᵀ of a layer [n, r]."""
        if layer in self.groups:
            self.last = None
            return self.groups[layer].low(layer, x)
        if self.last is None or self.last[0] is not x:
            self.last = (x, _Group())
        group = self.groups[layer] = self.last[1]
        group.layers.append(layer)
        return _low(x, layer.a_rI)


class _Group:
    """Layers with one input; their A's lie in one matrix from their second call on."""

    def __init__(self) -> None:
        self.layers: list[_Joined] = []
        self.a_sI: Tensor | None = None
        self.x: Tensor | None = None
        self.lows: dict[_Joined, Tensor] = {}

    def low(self, layer: _Joined, x: Tensor) -> Tensor:
        if layer is self.layers[0]:
            ranks = [len(one.a_rI) for one in self.layers]  # type: ignore[arg-type]
            if self.a_sI is None:
                self.a_sI = torch.cat([one.a_rI for one in self.layers])  # type: ignore[misc]
                for one, a_rI in zip(self.layers, torch.split(self.a_sI, ranks), strict=True):
                    one.a_rI = a_rI
            self.x, self.lows = x, dict(zip(self.layers, torch.split(_low(x, self.a_sI), ranks, -1), strict=True))
        if self.x is not x or layer not in self.lows:  # called alone after all
            return _low(x, layer.a_rI)
        found = self.lows.pop(layer)
        if not self.lows:
            self.x = None
        return found


def _low(x: Tensor, a_rI: Tensor | None) -> Tensor:
    assert a_rI is not None
    return F.linear(x.flatten(0, -2), a_rI)


def fusible(decoder: nn.Module, dtype: torch.dtype) -> dict[Any, float]:
    """The norms that `torch.nn.functional.rms_norm` computes as their own code does, and their ε: tried once for each class and size."""
    tried: dict[tuple[type, int], bool] = {}
    found: dict[Any, float] = {}
    for module in decoder.modules():
        weight, epsilon = getattr(module, "weight", None), next((getattr(module, name) for name in EPSILONS if hasattr(module, name)), None)
        if (
            not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor) or weight.ndim != 1 or weight.dtype != dtype
            or not isinstance(epsilon, float) or "forward" in vars(module) or len(inspect.signature(module.forward).parameters) != 1
        ):  # fmt: skip
            continue
        key = (type(module), len(weight))
        if key not in tried:
            tried[key] = _same(module, weight, epsilon)
        if tried[key]:
            found[module] = epsilon
    return found


def _same(module: nn.Module, weight: Tensor, epsilon: float) -> bool:
    x = torch.linspace(-3, 5, 4 * len(weight)).view(4, -1).to(weight.device, weight.dtype)
    with torch.no_grad():
        own, fused = module(x).float(), _norm(module, epsilon, x).float()
    return bool(((own - fused).abs() <= NORM_ULPS * torch.finfo(weight.dtype).eps * own.abs() + 1e-30).all())


def _norm(module: Any, epsilon: float, x: Tensor) -> Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, epsilon)
