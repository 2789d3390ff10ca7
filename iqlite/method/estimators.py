"""Superior-policy estimators: readings' logits [n, V] → log π̃ [n, V] (docs/method.md, equation 3). Plain functions in one dict.

The names of an estimator's positional parameters are the readings it asks for; its keyword-only parameters are its settings in
the recipe's `[superior]` table, with their defaults. To add one: write the function, add a line to `ESTIMATORS`.

Every estimator returns `(log_superior_nV, metrics)`: float32, no gradient needed, rows normalised (logsumexp 0); metrics are
per-token float32 [n].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Estimate = tuple["Tensor", dict[str, "Tensor"]]


def contrastive(
    reference_nV: Tensor,
    wanted_nV: Tensor,
    unwanted_nV: Tensor,
    *,
    strength: float = 3.0,
    clip: float = 5.0,
    plausibility: float = 1e-4,
) -> Estimate:
    """Equation (3): log π̃ = log_softmax(z_ref + strength · clip(log π⁺ − log π⁻, ±clip)) on the plausible set.

    Source: docs/method.md, equation (3), after Inverse-Q* (arXiv 2408.14874); plausibility from contrastive decoding (arXiv 2210.15097).
    `strength` is 1/β ≥ 0; `clip` C in nats > 0, may be inf; `plausibility` ε in [0, 1): tokens with π_ref < ε · max π_ref keep
    the reference's logit. The strength, C and ε are our choice. With equal readings or strength 0 the result is π_ref to the bit.
    """
    return _add(reference_nV, [(1.0, wanted_nV, unwanted_nV)], strength, clip, plausibility)


def prompted(reference_nV: Tensor, wanted_nV: Tensor, *, strength: float = 1.0) -> Estimate:
    """Equation (3) with π_ref in π⁻'s place, C = ∞ and ε = 0: at strength 1, plain context distillation, π̃ = π⁺."""
    return _add(reference_nV, [(1.0, wanted_nV, reference_nV)], strength, math.inf, 0.0)


def adapter(
    reference_nV: Tensor,
    adapter_nV: Tensor,
    unwanted_adapter_nV: Tensor,
    *,
    strength: float = 1.0,
    clip: float = 5.0,
    plausibility: float = 1e-4,
) -> Estimate:
    """Equation (3) with an existing LoRA, read with the plain prompt, in π⁺'s place; π⁻ is π_ref or a second adapter."""
    return _add(reference_nV, [(1.0, adapter_nV, unwanted_adapter_nV)], strength, clip, plausibility)


def mixture(
    reference_nV: Tensor,
    behaviors: Sequence[tuple[float, Tensor, Tensor]],
    *,
    strength: float = 3.0,
    clip: float = 5.0,
    plausibility: float = 1e-4,
) -> Estimate:
    """Equation (3) for several weighted (wanted, unwanted) pairs: each Δ is clipped, then they are added by weight."""
    return _add(reference_nV, behaviors, strength, clip, plausibility)


ESTIMATORS: dict[str, Callable[..., Estimate]] = {
    "contrastive": contrastive,
    "prompted": prompted,
    "adapter": adapter,
    "mixture": mixture,
}

SETTINGS = {
    "strength": "1/β, how far beyond the base the target lies.",
    "clip": "No token's log-ratio of wanted and unwanted counts more than this, nats.",
    "plausibility": "Tokens less likely than this share of the base's likeliest keep their odds.",
}
"""What the settings mean, for `iqlite recipe`."""


def _add(
    reference_nV: Tensor,
    behaviors: Sequence[tuple[float, Tensor, Tensor]],
    strength: float,
    clip: float,
    plausibility: float,
) -> Estimate:
    """The one home of equation (3). Largest temporaries: four [n, V] in float32."""
    total_nV = reference_nV * 0.0
    clipped_n = reference_nV[:, 0] * 0.0
    for weight, wanted_nV, unwanted_nV in behaviors:
        delta_nV = wanted_nV.log_softmax(-1).sub_(unwanted_nV.log_softmax(-1))
        clipped_n = clipped_n + (delta_nV.abs() > clip).sum(-1) / (delta_nV.shape[-1] * len(behaviors))
        total_nV = total_nV.add_(delta_nV.clamp_(-clip, clip), alpha=weight)
    metrics = {"superior/clipped_share": clipped_n}
    if plausibility > 0:
        threshold_n1 = reference_nV.amax(-1, keepdim=True) + math.log(plausibility)
        implausible_nV = reference_nV < threshold_n1
        total_nV = total_nV.masked_fill_(implausible_nV, 0.0)
        metrics["superior/implausible_mass"] = (reference_nV.softmax(-1) * implausible_nV).sum(-1)
    return total_nV.mul_(strength).add_(reference_nV).log_softmax(-1), metrics
