"""The LM head, as a model applies it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iqlite.base.anatomy import Anatomy
from iqlite.model.linear import FewRows, is_few

SCALES = {"logits_scaling": -1, "logit_scale": 1, "lm_head_multiplier": 1}
"""What configurations call a scale of the logits, and the power it is taken to (transformers' names)."""


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
        product = FewRows.apply if is_few(hidden_nD) else F.linear
        logits_nV = product(hidden_nD, weight, self.linear.bias).float()
        if self.scale != 1.0:
            logits_nV = logits_nV * self.scale
        if self.soft_cap is not None:
            logits_nV = torch.tanh(logits_nV / self.soft_cap) * self.soft_cap
        return logits_nV
