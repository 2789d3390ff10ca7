"""The LM head, as each architecture applies it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iqlite.base.architectures import SUPPORTED
from iqlite.errors import BaseError
from iqlite.model.linear import FewRows, is_few


@dataclass(frozen=True)
class Head:
    """Hidden states [n, D] → float32 logits [n, V], with the scale or soft cap that some architectures put after the head."""

    linear: nn.Linear
    scale: float = 1.0
    soft_cap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a transformers causal LM; BaseError names an architecture that isn't supported."""
        config = model.config
        if config.model_type not in SUPPORTED:
            raise BaseError(f"the architecture {config.model_type!r} isn't supported; choose a base of one of: {', '.join(SUPPORTED)}.")
        scale = 1.0
        if config.model_type == "granite":
            scale = 1.0 / config.logits_scaling
        elif config.model_type == "cohere":
            scale = config.logit_scale
        soft_cap = config.final_logit_softcapping if config.model_type == "gemma2" else None
        return cls(model.get_output_embeddings(), scale, soft_cap)

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
