"""The LM head, as a model applies it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iqlite.base.anatomy import Anatomy
from iqlite.device import multiplies_into_float32
from iqlite.model.linear import FewRows, is_few

SCALES = {"logits_scaling": -1, "logit_scale": 1, "lm_head_multiplier": 1}
"""What configurations call a scale of the logits, and the power it is taken to (transformers' names)."""

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Head:
    """Hidden states [n, D] → float32 logits [n, V], with the scale or soft cap that some models put after the head."""

    linear: nn.Linear
    scale: float = 1.0
    soft_cap: float | None = None

    @classmethod
    def of(cls, anatomy: Anatomy) -> Head:
        """A model's head, with what its configuration says comes after; `model.proof` holds it against the model's own logits."""
        config, scale = anatomy.config, 1.0
        for name, power in SCALES.items():
            scale *= float(getattr(config, name, None) or 1.0) ** power
        return cls(anatomy.head, scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, hidden_nD: Tensor) -> Tensor:
        weight = self.linear.weight
        hidden_nD = hidden_nD.to(device=weight.device, dtype=weight.dtype)
        if weight.dtype in HALVES and self.linear.bias is None and multiplies_into_float32(weight.device):
            logits_nV: Tensor = Wide.apply(hidden_nD, weight)
        else:
            product = FewRows.apply if is_few(hidden_nD) else F.linear
            logits_nV = product(hidden_nD, weight, self.linear.bias).float()
        if self.scale != 1.0:
            logits_nV = logits_nV * self.scale
        if self.soft_cap is not None:
            logits_nV = torch.tanh(logits_nV / self.soft_cap) * self.soft_cap
        return logits_nV


class Wide(torch.autograd.Function):
    """x·Wᵀ of 16-bit x [n, D] and W [V, D] as it is summed, in float32. Rounded to bfloat16 logits are off by 0.03 to 0.06 where they are near 16,
    and rewards, which are differences of such, by a tenth of what they measure."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.mm(x.flatten(0, -2), weight.t(), out_dtype=torch.float32).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grads[0].to(weight.dtype) @ weight, None
